"""Time to nanoGPT's loss on tiny Shakespeare, character by character."""

import argparse
import contextlib
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from mla_lm.data.windows import EvaluationWindows
from mla_lm.errors import UserError
from mla_lm.runs.folder import RunFolder
from mla_lm.terminal import cli
from scripts.bench import measure, peers

DESCRIPTION = """Time from the start of the process to the loss that nanoGPT ends with, over nanoGPT's whole time.

nanoGPT runs its README's recipe for a CPU, in a copy of its folder; ours is experiment=shakespeare_char, first with
empty caches of tokens and of compiled code ("cold"), then with those that the first left ("warm"). Both losses are over
the whole validation split, the last tenth of the text, in windows of 64.
"""
TRAIN = Path(__file__).parents[2] / "train.py"
SEQ_LEN = 64
LOOK_EVERY = 0.1  # seconds, at whether the loss is reached
# https://github.com/karpathy/nanoGPT, "I only have a macbook". Its config saves the best checkpoint, here the last.
RECIPE = (
    "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 "
    f"--block_size={SEQ_LEN} --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --dropout=0.0 "
    "--always_save_checkpoint=True"
).split()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nanogpt", metavar="DIR", required=True, help="a clone of nanoGPT")
    parser.add_argument("--text", metavar="FILE", required=True, help="the text, such as tiny Shakespeare's input.txt")
    parser.add_argument(
        "--steps", type=measure.at_least_one, default=2000, metavar="N", help="of nanoGPT (default: %(default)s)"
    )
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="for our train.py, over the experiment's")
    measure.add_repeats(parser, default=1)


class Run(NamedTuple):
    """A training run of either."""

    seconds: float  # of the whole process
    loss: float  # of the weights that it ended with
    parameters: int
    seconds_to_loss: float | None = None  # until a validation was at or below the other's; None: never


def bench(args: argparse.Namespace) -> dict[str, Any]:
    folder, text = peers.nanogpt_folder(args.nanogpt), Path(args.text).expanduser().absolute()
    if not text.is_file():
        raise UserError(f"--text {args.text}: there is no such file")
    runs: dict[str, list[Run]] = {"nanogpt": [], "cold": [], "warm": []}
    with tempfile.TemporaryDirectory() as temporary:
        clone = prepared(folder, text, Path(temporary, "nanogpt"))
        for number in range(args.repeats):
            runs["nanogpt"].append(theirs := run_nanogpt(clone, args.steps))
            place = Path(temporary, f"ours{number}")  # of both runs: the second finds the caches of the first
            for name in ("cold", "warm"):
                runs[name].append(run_ours(place, name, text, theirs.loss, args.overrides))
        summary = RunFolder(place / "warm").summary()
    ratios = {
        name: measure.median_ratio(
            [run.seconds_to_loss or math.inf for run in runs[name]], [run.seconds for run in runs["nanogpt"]]
        )
        for name in ("cold", "warm")
    }
    ratios = {name: ratio if math.isfinite(ratio) else None for name, ratio in ratios.items()}
    return {
        "tokens_per_second": summary["tokens_per_second"],
        "model_flops_utilization": summary["model_flops_utilization"],
        "ratios": {"nanogpt": ratios["cold"], "nanogpt_warm": ratios["warm"]},
        "rows": [row_of(name, of_name, ratios.get(name, 1.0)) for name, of_name in runs.items()],
        "runs": {name: [run._asdict() for run in of_name] for name, of_name in runs.items()},
    }


def row_of(name: str, runs: list[Run], ratio: float | None) -> dict[str, Any]:
    reached = [run.seconds_to_loss for run in runs]
    return {
        "who": name if name == "nanogpt" else f"ours, {name}",
        "parameters": runs[0].parameters,
        "last loss": median(run.loss for run in runs),
        "seconds": median(run.seconds for run in runs),
        "seconds to nanogpt's loss": None if None in reached else median(reached),
        "over nanogpt's": ratio,
    }


def prepared(folder: Path, text: Path, clone: Path) -> Path:
    """A copy of nanoGPT with the tokens of the text."""
    shutil.copytree(folder, clone, ignore=shutil.ignore_patterns(".git", "*.bin"))
    data = clone / "data" / "shakespeare_char"
    shutil.copyfile(text, data / "input.txt")
    watch(["prepare.py"], data)
    return clone


def run_nanogpt(clone: Path, steps: int) -> Run:
    """Train by the recipe, and evaluate the checkpoint of the last step."""
    interval = 250 if steps % 250 == 0 else steps  # of evaluating and saving: the last step has to be one
    arguments = [*RECIPE, f"--max_iters={steps}", f"--lr_decay_iters={steps}", f"--eval_interval={interval}"]
    seconds = watch(["train.py", *arguments], clone)
    checkpoint = torch.load(clone / "out-shakespeare-char" / "ckpt.pt", weights_only=True)
    model = peers.nanogpt(clone, **checkpoint["model_args"])
    model.load_state_dict(checkpoint["model"])
    tokens = np.fromfile(clone / "data" / "shakespeare_char" / "val.bin", np.uint16)
    run = Run(seconds, loss_of_nanogpt(model, tokens), sum(p.numel() for p in model.parameters()))
    print(f"nanogpt: {run.seconds:.0f} s, loss {run.loss:.4f}")
    return run


@torch.no_grad()
def loss_of_nanogpt(model: nn.Module, tokens: np.ndarray) -> float:
    """Nats per token over all of them but the first, in the windows that ours is evaluated on."""
    nats = torch.zeros((), dtype=torch.float64)
    for batch in DataLoader(EvaluationWindows(tokens, SEQ_LEN), batch_size=64):
        inputs, targets = batch[:, :-1].clamp(min=0), batch[:, 1:].contiguous()
        logits, _ = model.eval()(inputs, inputs)  # without targets it gives those of the last place alone
        nats += cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").double()
    return nats.item() / (len(tokens) - 1)


def run_ours(place: Path, name: str, text: Path, target: float, overrides: list[str]) -> Run:
    """Train in the folder `name` of a place, with the caches of the place."""
    place.mkdir(exist_ok=True)
    settings = {
        "data.files": text,
        "data.cache_dir": place / "tokens",
        "data.val_tokens": text.stat().st_size,  # at least the whole split
        "hydra.run.dir": place / name,
    }
    arguments = ["experiment=shakespeare_char", "logger=none", *(f"{k}={cli.quoted(v)}" for k, v in settings.items())]
    run, reached = RunFolder(place / name), []

    def look(seconds: float) -> None:
        if not reached and any(loss <= target for loss in losses_of(run)):
            reached.append(seconds)

    seconds = watch([str(TRAIN), *arguments, *overrides], place, {"TORCHINDUCTOR_CACHE_DIR": str(place / "code")}, look)
    done = Run(seconds, losses_of(run)[-1], run.summary()["parameters"], reached[0] if reached else None)
    print(f"ours, {name}: {seconds:.0f} s, loss {done.loss:.4f}, at nanogpt's after {done.seconds_to_loss} s")
    return done


def losses_of(run: RunFolder) -> list[float]:
    """Of the validations so far."""
    lines = run.metrics_file.read_text().splitlines(keepends=True) if run.metrics_file.is_file() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]  # the last may not be whole yet
    return [row["val/loss"] for row in rows if row.get("val/loss") is not None]


def watch(
    arguments: list[str],
    folder: Path,
    environment: dict[str, str] | None = None,
    look: Callable[[float], None] = lambda seconds: None,
) -> float:
    """Run a Python program in a folder, and return its seconds; `look` is called all the time with those so far.

    Raises:
        UserError: it failed, with the last it said.
    """
    began = time.monotonic()
    command, variables = [sys.executable, *arguments], {**os.environ, **(environment or {})}
    with (
        tempfile.TemporaryFile("w+") as output,
        subprocess.Popen(command, cwd=folder, env=variables, stdout=output, stderr=output) as process,
    ):
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(LOOK_EVERY)
                look(time.monotonic() - began)
        finally:
            process.kill()  # where we are interrupted
        seconds = time.monotonic() - began
        if process.returncode:
            output.seek(0)
            last = output.read().strip().splitlines()[-1:]
            raise UserError(f"{shlex.join(arguments)} ended with status {process.returncode}: {''.join(last)}")
    return seconds
