"""Every check and benchmark of a GPU in one command, for whoever has one for ten minutes."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from mla_lm.errors import UserError
from mla_lm.terminal.tables import markdown
from scripts.bench import measure

DESCRIPTION = """Runs the tests and benchmarks that only a GPU can answer, one process each, and keeps what each gives.

These are the checks of tests/test_gpu.py, the default run, the loss, training at 124M, and decoding at four sizes. The
figures and the output of each are in the folder --out as soon as it ends, and in report.md there are the tables of all,
so that little is lost where the machine goes away. --minutes stops what would take longer. With --tiny, everything has
sizes for a CPU.
"""
ROOT = Path(__file__).parents[2]


class Step(NamedTuple):
    """A command and the name under which its results are kept.

    In the command, {json} stands for the file that its figures go to, and {run} for the folder of a training run, whose
    summary is its figures.
    """

    name: str
    command: list[str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="DIR", default="bench_gpu", help="a folder (default: %(default)s)")
    parser.add_argument("--nanogpt", metavar="DIR", help="a clone of nanoGPT, to compare with")
    parser.add_argument("--minutes", type=measure.at_least_one, default=60, help="of all (default: %(default)s)")
    parser.add_argument("--only", metavar="STEP[,STEP]", help="these steps alone")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU, to see that it works")


def steps_of(args: argparse.Namespace) -> list[Step]:
    """What to run, in order."""
    beside = [f"--nanogpt={args.nanogpt}"] if args.nanogpt else []
    if args.tiny:
        training = ["--layers=1", "--d-model=32", "--heads=2", "--seq-len=32", "--sequences=2"]
        training += ["--repeats=1", "--no-compile"]
        loss = ["--tokens=512", "--d-model=32", "--vocab-size=300", "--repeats=1"]
        attention = ["--sequences=1", "--seq-len=64", "--repeats=1"]
        decoding = ["--context=32", "--batch=1", "--repeats=1", "--precision=bf16"]
        run = ["model=mla_tiny", "debug=limit", "logger=none"]
        models = ["6x384"]
    else:
        training = ["--layers=12", "--d-model=768", "--heads=12", "--seq-len=1024", "--sequences=16"]
        training += ["--vocab-size=50257", "--memory", "--repeats=3"]
        loss = attention = ["--repeats=10"]
        decoding = ["--context=1024,8192,32768", "--batch=1,8,32,128", "--precision=bf16", "--compile", "--repeats=3"]
        run = ["logger=none"]
        models = ["6x384", "medium", "serving", "large"]
    return [
        Step("checks", [sys.executable, "-m", "pytest", "-q", "-rs", "tests/test_gpu.py"]),
        Step("default_run", [sys.executable, "train.py", *run, "hydra.run.dir={run}"]),
        Step("loss", [*_bench("loss"), *loss]),
        Step("attention", [*_bench("attention"), *attention]),
        Step("train", [*_bench("train"), *training, *beside]),
        *(Step(f"decode_{model}", [*_bench("decode"), f"--model={model}", *decoding]) for model in models),
    ]


def _bench(name: str) -> list[str]:
    return [sys.executable, "-m", "scripts.bench", name, "--json={json}"]


def bench(args: argparse.Namespace) -> dict[str, Any]:
    steps, until, rows, out = chosen(args), time.monotonic() + 60 * args.minutes, [], Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for step in steps:
        rows.append(run_step(step, out, until - time.monotonic()))
        (out / "report.md").write_text(report(out, rows))
    figures = {step.name: figures_of(step.name, out) for step in steps}
    return {"tokens_per_second": None, "model_flops_utilization": None, "ratios": {}, "rows": rows, "steps": figures}


def chosen(args: argparse.Namespace) -> list[Step]:
    """The steps of --only, or all."""
    steps = {step.name: step for step in steps_of(args)}
    names = args.only.split(",") if args.only else list(steps)
    if unknown := [name for name in names if name not in steps]:
        raise UserError(f"--only {args.only}: there is no step {unknown[0]}; the steps are {', '.join(steps)}")
    return [steps[name] for name in names]


def figures_of(name: str, out: Path) -> dict[str, Any] | None:
    """What a step has measured; None if it did not come to that."""
    file = out / f"{name}.json"
    return json.loads(file.read_text()) if file.is_file() else None


def run_step(step: Step, out: Path, seconds: float) -> dict[str, Any]:
    """Run a step for at most so many seconds; its output is in STEP.txt, what it measured in STEP.json."""
    print(f"{step.name}: {' '.join(step.command[1:])}", flush=True)
    started = time.monotonic()
    row = {"step": step.name, "ended": "no time left", "seconds": 0.0}
    for old in ("json", "txt"):
        (out / f"{step.name}.{old}").unlink(missing_ok=True)
    if seconds <= 0:
        return row
    figures = out.resolve() / f"{step.name}.json"
    with (out / f"{step.name}.txt").open("w") as log, TemporaryDirectory() as elsewhere:
        run = Path(elsewhere, "run")
        command = [part.replace("{json}", str(figures)).replace("{run}", str(run)) for part in step.command]
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait(seconds)
            row["ended"] = "well" if status == 0 else f"with status {status}"
        except subprocess.TimeoutExpired:
            row["ended"] = "stopped"
        finally:  # also on Ctrl-C, which a session of its own does not get; with all that it has started
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if (run / "summary.json").is_file():
            shutil.copy(run / "summary.json", figures)
    return row | {"seconds": time.monotonic() - started}


def report(out: Path, rows: list[dict[str, Any]]) -> str:
    """Markdown of all steps so far: their tables, or the last lines of their output."""
    parts = ["# On this machine", "", *(f"- {name}: {value}" for name, value in measure.setup().items())]
    for row in rows:
        parts += ["", f"## {row['step']}", "", f"Ended {row['ended']} after {row['seconds']:.0f} seconds.", ""]
        log = out / f"{row['step']}.txt"
        if figures := figures_of(row["step"], out):
            parts.append(markdown(as_cells(figures)))
        elif log.is_file():
            parts += ["```", *log.read_text().splitlines()[-12:], "```"]
    return "\n".join(parts) + "\n"


def as_cells(figures: dict[str, Any]) -> list[list[str]]:
    """The table of a benchmark, or the summary of a run."""
    if rows := figures.get("rows"):
        return measure.cells(rows)
    return [["figure", "value"], *([name, measure.cell(value)] for name, value in figures.items())]
