"""How long saving a checkpoint holds up training."""

import argparse
import math
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from mla_lm.config import TrainConfig
from mla_lm.files import write_atomically
from mla_lm.hardware import choose_precision, inference_autocast, synchronize
from mla_lm.model.transformer import Transformer
from mla_lm.optim.optimizer import build_optimizer
from mla_lm.training.background_save import BackgroundCheckpointIO
from scripts.bench import measure
from scripts.plan import composed

DESCRIPTION = """How long a save holds up training: train.py's, by a thread, over one that training waits for.

The state is that of a preset: weights and the optimizer's moments. "held up" is how long the loop stands still, in the
save and before the optimizer step after it. "slowed" is by how much a loop of steps takes longer with a save in it:
that counts also what the thread takes from the steps, and is noisy.
"""
MODELS = {"mla_small": 4096, "mla_medium": 50257}  # and their vocabularies


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--models", nargs="+", metavar="NAME", default=list(MODELS), help="presets of conf/model (default: %(default)s)"
    )
    parser.add_argument("--tokens", type=measure.at_least_one, default=2048, help="of each step (default: train.py's)")
    parser.add_argument("--dir", default=".", help="write below this folder (default: the current one)")
    measure.add_repeats(parser)
    measure.add_device(parser)


def bench(args: argparse.Namespace) -> dict[str, Any]:
    args.device = measure.device_of(args)
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        rows = [row(name, Path(folder), args) for name in args.models]
    return {
        "tokens_per_second": None,
        "model_flops_utilization": None,
        "ratios": {"synchronous": [row["held up, ours / synchronous"] for row in rows]},
        "rows": rows,
    }


def row(name: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All figures of one model."""
    config = composed([f"model={name}", f"model.vocab_size={MODELS.get(name, 4096)}"])
    training = Training(config, args, folder / f"{name}.ckpt")
    step = training.round(1, None).loop
    save = training.round(1, "synchronous").held_up
    steps = math.ceil(2 * save / step)  # the thread is done before the loop is
    rounds: dict[str | None, list[Round]] = {None: [], "synchronous": [], "ours": []}

    def turn(how: str | None) -> float:
        rounds[how].append(training.round(steps, how))
        return rounds[how][-1].loop

    loops = measure.interleaved({how: lambda how=how: turn(how) for how in rounds}, args.repeats)
    held_up = {how: [r.held_up for r in rounds[how][1:]] for how in ("synchronous", "ours")}
    slowed = {
        how: median(a - b for a, b in zip(loops[how], loops[None], strict=True)) for how in ("synchronous", "ours")
    }
    return {
        "model": name,
        "parameters": sum(p.numel() for p in training.net.parameters()),
        "file MiB": training.path.stat().st_size / 2**20,
        "held up, synchronous s": median(held_up["synchronous"]),
        "held up, ours s": median(held_up["ours"]),
        "held up, ours / synchronous": measure.median_ratio(held_up["ours"], held_up["synchronous"]),
        "slowed, synchronous s": slowed["synchronous"],
        "slowed, ours s": slowed["ours"],
        "ours is on disk after s": median(r.on_disk for r in rounds["ours"][1:]),
        "step s": median(loops[None]) / steps,
    }


class Round(NamedTuple):
    """Seconds of a loop of steps."""

    loop: float
    held_up: float = 0.0  # in which the loop stood still for a save
    on_disk: float = 0.0  # from the beginning of the save


class Training:
    """A model that is trained on random tokens, and saved to `path`."""

    def __init__(self, config: TrainConfig, args: argparse.Namespace, path: Path):
        self.device, self.path = args.device, path
        self.precision, _ = choose_precision("auto", args.device)
        self.net = Transformer(config.model).to(args.device)
        self.optimizer = build_optimizer(self.net, config.optimizer)
        seq_len = min(args.tokens, config.model.seq_len)
        self.tokens = torch.randint(config.model.vocab_size, (-(-args.tokens // seq_len), seq_len), device=args.device)
        self.io = BackgroundCheckpointIO()

    def state(self) -> dict[str, Any]:
        return {"state_dict": self.net.state_dict(), "optimizer_states": [self.optimizer.state_dict()]}

    def step(self) -> float:
        """Seconds that the optimizer waits for the copy of what was saved before."""
        with inference_autocast(self.device, self.precision):
            loss = self.net(self.tokens, self.tokens)
        loss.backward()
        waited = time.perf_counter()
        self.io.wait_until_copied()
        waited = time.perf_counter() - waited
        self.optimizer.step()
        self.optimizer.zero_grad()
        return waited

    def round(self, steps: int, how: str | None) -> Round:
        """A loop of steps, with a save before the first of them: synchronous, ours, or None."""
        synchronize(self.device)
        began = time.perf_counter()
        written: list[float] = []
        if how == "synchronous":
            state = self.state()
            write_atomically(self.path, lambda file: torch.save(state, file))
        elif how == "ours":
            self.io.save(self.state(), [self.path])
            self.io.written.add_done_callback(lambda _: written.append(time.perf_counter()))
        held_up = time.perf_counter() - began
        held_up += sum(self.step() for _ in range(steps))
        synchronize(self.device)
        loop = time.perf_counter() - began
        for failure in (self.io.wait() or {}).values():
            raise failure
        return Round(loop, held_up, written[0] - began if written else 0.0)
