"""Many trials of a row at once, one on each core, each in a folder of its own that is kept where it did not hold."""

import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.soak.programs import FORK, Broken


@dataclass
class Row:
    """What came of a row.

    Args:
        figure: for the table
        failures: what was seen where a promise did not hold, and where its files are
    """

    figure: str
    failures: list[str] = field(default_factory=list)


@dataclass
class Outcome:
    value: Any = None  # what the trial returned
    failure: str | None = None


def run_trials(trial: Callable[..., Any], cases: Sequence[tuple], folder: Path, seconds: float) -> list[Outcome]:
    """Call `trial(folder, *case)` for every case, as many at once as there are cores, each in a new folder.

    Args:
        trial: a function of a module; raises Broken where a promise does not hold
        seconds: after which no further trial begins
    """
    deadline = time.monotonic() + seconds
    folders = [folder / f"{number:03}" for number in range(len(cases))]
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), FORK) as pool:
        running = [pool.submit(_attempt, trial, case, f, deadline) for case, f in zip(cases, folders, strict=True)]
        return [future.result() for future in running]


def _attempt(trial: Callable[..., Any], case: tuple, folder: Path, deadline: float) -> Outcome:
    if time.monotonic() > deadline:
        return Outcome(failure=f"{label(case)}: not begun, the time of this row was over")
    folder.mkdir(parents=True)
    try:
        value = trial(folder, *case)
    except Exception as error:  # noqa: BLE001  a fault of the trial must not hide the others
        for program in multiprocessing.active_children():
            program.kill()
        seen = str(error) if isinstance(error, Broken) else repr(error)
        return Outcome(failure=f"{label(case)}: {seen}\n    files: {folder}")
    shutil.rmtree(folder)
    return Outcome(value)


def label(case: tuple) -> str:
    text = ", ".join(str(part) for part in case if part != "")
    return text if len(text) < 100 else f"{text[:97]}..."


def held(outcomes: list[Outcome]) -> str:
    """`49 of 50`."""
    return f"{sum(outcome.failure is None for outcome in outcomes)} of {len(outcomes)}"


def failures(outcomes: list[Outcome]) -> list[str]:
    return [outcome.failure for outcome in outcomes if outcome.failure]
