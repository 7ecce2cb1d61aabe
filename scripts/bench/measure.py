"""How everything here is measured: in turns, in one process, with medians; or for memory, in a process of its own."""

import argparse
import importlib.metadata
import importlib.util
import math
import multiprocessing
import platform
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import torch

from mla_lm.errors import UserError
from mla_lm.hardware import choose_accelerator, cpu_name, peak_memory_bytes, synchronize

SECONDS = 2.0  # that a contender runs in each round
PACKAGES = ("torch", "lightning", "transformers", "tokenizers")


def setup() -> dict[str, Any]:
    """Versions, threads and hardware: what figures depend on besides the arguments."""
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES if importlib.util.find_spec(name)},
        "cpu": f"{cpu_name()} ({torch.backends.cpu.get_cpu_capability()})",
        "threads": torch.get_num_threads(),
        **gpu,
    }


def add_device(parser: argparse.ArgumentParser) -> None:
    """The option --device."""
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="default: the best there is"
    )


def add_sizes(parser: argparse.ArgumentParser, sizes: dict[str, int]) -> None:
    """An option for each size, which takes a whole number, and the option --precision."""
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=at_least_one, default=default, metavar="N", help="default: %(default)s")
    parser.add_argument("--precision", choices=("auto", "bf16-mixed", "32-true"), default="auto", help="as train.py's")


def add_repeats(parser: argparse.ArgumentParser, default: int = 5) -> None:
    """The option --repeats."""
    parser.add_argument(
        "--repeats", type=at_least_one, default=default, help="of every contender (default: %(default)s)"
    )


def at_least_one(text: str) -> int:
    """Type of a command-line argument: a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number above 0")
    return int(text)


def device_of(args: argparse.Namespace) -> str:
    """The device type that --device names; UserError where there is none."""
    try:
        return choose_accelerator(args.device)[0]
    except UserError as error:  # which speaks of train.py's key
        raise UserError(f"--device {args.device}: this machine has none; --device auto takes what it has") from error


def interleaved(measurements: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """What the measurements give, by name, all in turns: A B C A B C. Each is made once before, for nothing.

    Args:
        measurements: each gives its seconds (see `seconds_of`), or its rate
    """
    for measure in measurements.values():
        measure()
    rounds = [{name: measure() for name, measure in measurements.items()} for _ in range(repeats)]
    return {name: [figures[name] for figures in rounds] for name in measurements}


def steps_in_a_round(run: Callable[[int], float]) -> int:
    """How many steps take about SECONDS, one at least; `run` does so many and returns its seconds."""
    run(1)  # compiles, allocates
    return math.ceil(SECONDS / run(1))


def seconds_of(call: Callable[[], Any], device: str = "cpu") -> float:
    """Wall time of a call, to the end of what it started on the device."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def median_ratio(of: list[float], to: list[float]) -> float:
    """Median over the rounds of `of` over `to`: what slows a whole round drops out."""
    return median(a / b for a, b in zip(of, to, strict=True))


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function of a module returns, called in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        return pool.submit(function, *arguments).result()


def resident_bytes(peak: bool = False) -> int:
    """Memory that this process holds, or the most it has held; without /proc always the most.

    getrusage alone would not do: on Linux its figure begins with that of the program that started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        sizes = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(sizes["VmHWM" if peak else "VmRSS"].split()[0]) * 1024
    return peak_memory_bytes("cpu")


def cells(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Rows of figures as those of a table, under the names of the first."""
    return [list(rows[0]), *([cell(value) for value in row.values()] for row in rows)]


def cell(value: object) -> str:
    """A figure with as many digits as it is worth; a dash for what was not measured."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
