"""Train a language model: `python train.py model=mla_small`, then any key=value of conf/.

`python train.py --cfg job` prints every key. This file composes the configuration, decides which run it is for, and
trains; what it calls is in mla_lm/.
"""

import logging
import os
import sys
import traceback
import warnings
from contextlib import nullcontext
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from mla_lm.config import TrainConfig, register_schema, with_absolute_paths
from mla_lm.errors import TrainingFailed, UserError
from mla_lm.runs import trust
from mla_lm.runs.folder import RunFolder, find_run
from mla_lm.runs.resume import GROUPS, WHOLE, different_keys, resumed_config, started_config
from mla_lm.runs.resume_point import ResumePoint, named_resume_point, newest_resume_point
from mla_lm.study import sweep
from mla_lm.terminal import cli
from mla_lm.terminal.help_page import register_options
from mla_lm.terminal.plain_text import say

CONF = Path(__file__).parent / "conf"


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def job(composed: DictConfig) -> float | None:
    """One run. Returns its validation loss, which sweepers minimise; None for a failed job of a multirun."""
    hydra_config = HydraConfig.get()
    run = RunFolder(Path(hydra_config.runtime.output_dir))
    trial = sweep.Trial.of_job(hydra_config) if hydra_config.mode == RunMode.MULTIRUN else None
    try:
        if trial:
            trial.write()
        cli.check_keys(composed, TrainConfig)
        return train_run(OmegaConf.to_object(composed), run, sweep.run_overrides(hydra_config))
    except Exception as error:
        named = any(override.startswith("hydra.run.dir=") for override in hydra_config.overrides.hydra)
        if not named and not os.listdir(run.path):
            run.path.rmdir()  # nothing was begun: leave no empty folder behind
        if isinstance(error, UserError | TrainingFailed):
            status = cli.report(error)
        elif trial:
            traceback.print_exc()
        else:
            raise
        if not trial:
            sys.exit(status)
        trial.write(error=str(error) if isinstance(error, UserError | TrainingFailed) else repr(error))
        return None


def train_run(composed: TrainConfig, run: RunFolder, overrides: list[str]) -> float:
    """Decide which configuration counts, refuse to overwrite another run, and train."""
    composed = with_absolute_paths(composed)
    multirun = HydraConfig.get().mode == RunMode.MULTIRUN
    sweep_job = sweep.job_of(HydraConfig.get()) if multirun else None
    if composed.ckpt_path and composed.init_from:
        raise UserError("ckpt_path goes on with a run, init_from begins a new one: give one of them")
    config, checkpoint = composed, None
    if composed.ckpt_path:
        run, checkpoint = find_run(composed.ckpt_path)
        trust.check_links(run)
        resumed = resumed_config(composed, run, overrides)
        config = trust.with_agreed_paths(resumed, run, composed.trust, "agree with trust=true", composed)
    elif composed.init_from:
        config = started_config(composed, find_run(composed.init_from)[0], overrides)
    config.check()
    check_launch(config, multirun, bool(composed.ckpt_path))

    from mla_lm.training.loop import train  # lightning and torch.compile: not needed to refuse a mistake

    with run.lock() if is_first_process() else nullcontext():
        if composed.ckpt_path:
            return train(config, run, chosen_resume_point(config, run, checkpoint))
        resume_point, key = None, "hydra.sweep.dir" if multirun else "hydra.run.dir"
        if (multirun or config.run.resume) and run.config_file.is_file():
            if different := different_keys(config, run):
                refuse_to_write_over(run, key, f", with another {' and '.join(different[:3])}")
            if run.is_finished:
                say(f"skipped     {run.path}: it has finished")
                return run.summary()["val_loss"]
            resume_point = newest_resume_point(run, config.trainer.max_steps)
        if not resume_point and is_first_process():
            refuse_to_write_over(run, key)
        return train(config, run, resume_point, sweep_job)


def chosen_resume_point(config: TrainConfig, run: RunFolder, checkpoint: Path | None) -> ResumePoint:
    """The checkpoint that ckpt_path names, or the newest of the run that it names; UserError where it has none."""
    if checkpoint:
        return named_resume_point(checkpoint)
    if resume_point := newest_resume_point(run, config.trainer.max_steps):
        return resume_point
    raise UserError(f"{run.path} stopped before its first checkpoint: begin it again, hydra.run.dir={run.path}")


def check_launch(config: TrainConfig, multirun: bool, goes_on: bool) -> None:
    """Raises UserError if the started processes or their run folder do not fit the configuration."""
    named = any(argument.startswith("hydra.run.dir=") for argument in sys.argv)
    if config.world_size > 1 and multirun:
        raise UserError("a multirun trains on one device: start one command for each run with trainer.devices above 1")
    if "TORCHELASTIC_RUN_ID" in os.environ and not named:
        raise UserError("under torchrun all processes need one run folder: give hydra.run.dir=FOLDER")
    if config.run.resume and not (named or multirun or goes_on):
        raise UserError("run.resume=auto needs to know which run to go on with: give hydra.run.dir=FOLDER")


def refuse_to_write_over(run: RunFolder, key: str, how: str = "") -> None:
    """Raises UserError where the folder of a new run, set by `key`, holds another run, or files that are no run's."""
    if run.is_begun:
        raise UserError(
            f"{run.path} already holds a run{how}: ckpt_path={run.path} goes on with it, another {key} begins a new one"
        )
    if foreign := run.foreign_files():
        raise UserError(f"{run.path} has {', '.join(foreign)}, which a run would write over: choose another {key}")


def is_first_process() -> bool:
    """Whether this process is the one that writes the run folder."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def resume_in_place(arguments: list[str]) -> list[str]:
    """Make RUN Hydra's run folder if the command line says ckpt_path=RUN."""
    paths = [argument.removeprefix("ckpt_path=") for argument in arguments if argument.startswith("ckpt_path=")]
    path = paths[-1].strip("'\"") if paths else ""
    if path in ("", "null"):
        return arguments
    if not is_first_process() and any(argument.startswith("hydra.run.dir=") for argument in arguments):
        return arguments  # as the first process made them
    if any(argument in ("-m", "--multirun") or argument.startswith("sweep=") for argument in arguments):
        raise UserError("ckpt_path goes on with one run: leave out -m and sweep=")
    if any(argument.startswith("hydra.run.dir=") for argument in arguments):
        raise UserError("ckpt_path goes on in the run's own folder: leave out hydra.run.dir")
    rest = [argument for argument in arguments if not argument.startswith("ckpt_path=")]
    folder = find_run(path)[0].path
    return [*rest, f"ckpt_path={cli.quoted(path)}", f"hydra.run.dir={cli.quoted(folder)}"]


def main() -> None:
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors, which cli.run words, instead of printing them
    warnings.filterwarnings("ignore", module="hydra")
    logging.getLogger("hydra").setLevel(logging.WARNING)  # of the jobs, which print their overrides themselves
    arguments = sorted(sys.argv[1:], key=lambda a: a not in ("-m", "--multirun"))  # Hydra wants -m before overrides
    register_schema()
    register_options(CONF)
    sys.argv[1:] = resume_in_place(arguments)
    cli.check_arguments(sys.argv[1:], (*GROUPS, *WHOLE))
    with sweep.reported(arguments):
        job()


if __name__ == "__main__":
    cli.run(main, TrainConfig)
