"""Answer a question with many runs: tune each row's learning rate, train fresh seeds at the best, and compare.

NAME is a file of conf/study/, which declares kinds, sizes, corpus, tokens, seeds and learning rates. What is missing in
the study's folder is run; stopped, the same command goes on.
"""

import argparse
import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from mla_lm.config import register_schema
from mla_lm.errors import Interrupted, UserError
from mla_lm.files import make_folder, write_atomically
from mla_lm.runs.folder import RunFolder
from mla_lm.study.compare import cells_of, remarks, shown_estimate
from mla_lm.study.declaration import StudyConfig, declared
from mla_lm.study.findings import findings
from mla_lm.study.forecast import Forecast
from mla_lm.study.jobs import Plan
from mla_lm.study.manifest import machine_lines, write_manifest
from mla_lm.study.planned_rows import Planner
from mla_lm.study.runner import Runner
from mla_lm.study.slots import slots_here
from mla_lm.study.watch import Watch
from mla_lm.terminal import cli
from mla_lm.terminal.plain_text import say
from mla_lm.terminal.tables import table

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
MOST_MULTIRUNS = 16  # that wait for a launcher's jobs at once
EXAMPLES = """examples:
  python -m scripts.study smoke                                     does it work? In minutes
  python -m scripts.study attention --plan                          how many runs, tokens and hours
  python -m scripts.study attention kinds=[mla,mha] seeds=[1,2,3]   other keys of the study
  python -m scripts.study attention data=tinystories logger=none    keys of train.py, for every run
  python -m scripts.study attention hydra/launcher=submitit_slurm hydra.launcher.partition=gpu
"""


def parse() -> argparse.Namespace:
    parser = cli.Parser(
        prog="python -m scripts.study",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME", help=f"of conf/study/: {', '.join(names())}")
    parser.add_argument("settings", metavar="key=value", nargs="*", help="of the study, or of train.py for all runs")
    parser.add_argument("--out", metavar="DIR", help="the study's folder (default: studies/NAME)")
    parser.add_argument("--plan", action="store_true", help="only say what the study would run, and how long it takes")
    parser.add_argument(
        "--measure",
        action="store_true",
        help="also measure each row's decoding over growing contexts, and sample texts, for the report: minutes",
    )
    return parser.parse_intermixed_args()


def names() -> list[str]:
    return sorted(file.stem for file in (CONF / "study").glob("*.yaml"))


def main() -> None:
    args = parse()
    launcher = [setting for setting in args.settings if setting.startswith(("hydra/", "hydra."))]
    study = declared(CONF, args.name, [setting for setting in args.settings if setting not in launcher])
    check_launcher(launcher)
    rows = Planner(study, CONF).rows()
    folder = Path(args.out or f"studies/{args.name}").expanduser().absolute()
    plan = Plan(study, rows, args.name, folder)
    plan.check_runs()
    slots = None if launcher else slots_here(study, rows)
    time = Forecast(plan, slots)
    say(f"study       {args.name}: {study.title}", *time.lines(), *machine_lines(plan, slots), f"folder      {folder}")
    if all(len(study.seeds_for(row.kind)) < 2 for row in rows):
        say("warning: fewer than two seeds give no interval and no answer: seeds=[1,2,3,4,5] would")
    if args.plan:
        return
    make_folder(folder)
    environments = slots.environments if slots else [{}] * (study.processes or min(MOST_MULTIRUNS, len(rows)))
    with RunFolder(folder).lock():
        write_atomically(folder / "study.yaml", lambda file: file.write(declaration(study).encode()))
        write_manifest(plan)
        try:
            with Watch(plan, time.total_seconds, lambda: write_manifest(plan)) as watch:
                Runner(plan, ROOT / "train.py", environments, launcher, watch).run()
        except Interrupted:
            say(f"go on       python -m scripts.study {shlex.join(sys.argv[1:])}")
            raise
        finally:
            write_manifest(plan)
        report(plan, args.measure)
    raise_for_failed(plan)


def declaration(study: StudyConfig) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(study))


def check_launcher(launcher: list[str]) -> None:
    """Raises Hydra's errors where the launcher is not there, or has no such key."""
    if launcher:
        register_schema()
        with initialize_config_dir(str(CONF), version_base="1.3"):
            compose("train", launcher, return_hydra_config=True)


def report(plan: Plan, measure: bool) -> None:
    """Print and keep what the study has found."""
    plan.check_runs()
    result = findings(plan, f"python -m scripts.study {shlex.join(sys.argv[1:])}", measure)
    if result is None:
        return
    content = json.dumps(asdict(result), indent=1).encode()
    write_atomically(plan.folder / "result.json", lambda file: file.write(content))
    fits = [
        f"{kind}: test loss = {fit.factor:.4g} x parameters ^ {shown_estimate(fit.exponent, '{:.4f}'.format)}"
        for kind, fit in result.fits.items()
    ]
    say("", table(cells_of(result, False), left=2), "", *remarks(result, False), *fits)
    from mla_lm.study.report import write_report  # needs a library, which the table does not

    page = write_report(result, plan.folder)
    say(
        "",
        f"report      {page}",
        f"figures     {plan.folder / 'result.json'}",
        f"runs        {plan.folder / 'manifest.json'}",
    )


def raise_for_failed(plan: Plan) -> None:
    """Raises UserError that names the jobs which failed."""
    if plan.given_up:
        failed = sorted(plan.given_up, key=str)
        count = "1 job" if len(failed) == 1 else f"{len(failed)} jobs"
        lines = [f"  {job}: {plan.log(job)}" for job in failed[:2]]
        raise UserError("\n".join([f"{count} failed; the same command runs them again. Their logs:", *lines]))


if __name__ == "__main__":
    cli.run(main, StudyConfig)
