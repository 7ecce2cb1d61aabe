"""How a study shows that it goes on: a line for each run that begins or ends; on a terminal, bars below the lines."""

import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mla_lm.study.jobs import Job, Plan
from mla_lm.terminal.plain_text import duration, printable

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

EVERY = 1.0  # seconds between looks at the runs' files
TAIL = 4096  # bytes at the end of metrics.jsonl, more than a row has


class Watch:
    """Tells of jobs as they begin, go on and end.

    Args:
        seconds_left: of all that is missing, None where nothing is known of it
        on_end: called after each job
    """

    def __init__(self, plan: Plan, seconds_left: Callable[[], float | None], on_end: Callable[[], None]):
        self.plan, self.seconds_left, self.on_end = plan, seconds_left, on_end
        self.began: dict[Job, float] = {}
        self.looked = 0.0
        self.bars = _bars() if sys.stdout.isatty() else None
        self.bar_of: dict[Job, TaskID] = {}

    def __enter__(self) -> "Watch":
        if self.bars:
            self.bars.start()
            done, known = self.plan.progress()
            self.total = self.bars.add_task("all runs", total=known, completed=done)
        return self

    def __exit__(self, *_: object) -> None:
        if self.bars:
            self.bars.stop()

    def begun(self, jobs: list[Job]) -> None:
        for job in jobs:
            self.began[job] = time.monotonic()
            self._say(f"begun       {job}")

    def ended(self, job: Job, outcome: float | None) -> None:
        what = "stopped     " if outcome is None else "diverged    " if math.isinf(outcome) else "finished    "
        figure = f": validation loss {outcome:.4f}" if outcome is not None and math.isfinite(outcome) else ""
        seconds = time.monotonic() - self.began.pop(job)
        self._say(f"{what}{job}{figure}, {duration(seconds)}")
        self._after(job)

    def failed(self, job: Job, status: int, log: Path, last: list[str]) -> None:
        self.began.pop(job)
        self._say(f"FAILED      {job}, with status {status}; {log} ends with", *(f"  | {line}" for line in last))
        self._after(job)

    def stopping(self, count: int) -> None:
        """Called by a signal handler, which may have interrupted a print."""
        os.write(2, f"\nstopping {count} runs after their next step; another Ctrl-C kills them\n".encode())

    def look(self, running: list[Job]) -> None:
        """Draw the bars anew, where there are any."""
        if not self.bars or time.monotonic() - self.looked < EVERY:
            return
        self.looked = time.monotonic()
        for job in running:
            if job not in self.bar_of:
                self.bar_of[job] = self.bars.add_task(str(job), total=self.plan.rows[job.row].steps)
            self.bars.update(self.bar_of[job], completed=step_of(self.plan.run(job).metrics_file))

    def _after(self, job: Job) -> None:
        self.on_end()
        done, known = self.plan.progress()
        if self.bars:
            if job in self.bar_of:
                self.bars.remove_task(self.bar_of.pop(job))
            self.bars.update(self.total, completed=done, total=known)
        left = self.seconds_left()
        time_left = "" if left is None else f", about {duration(left)} left"
        self._say(f"            {done} of {known} runs done{time_left}")

    def _say(self, *lines: str) -> None:
        for line in lines:
            if self.bars:
                self.bars.console.print(printable(line), soft_wrap=True)
            else:
                print(printable(line), flush=True)


def step_of(metrics: Path) -> int:
    """The last step that a run has logged."""
    if not metrics.is_file():
        return 0
    with open(metrics, "rb") as file:
        file.seek(max(0, metrics.stat().st_size - TAIL))
        rows = file.read().splitlines()
    for row in reversed(rows):
        try:
            return int(json.loads(row)["step"])
        except (ValueError, KeyError, TypeError):  # being written
            continue
    return 0


def _bars() -> "Progress":
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(markup=False, highlight=False, emoji=False),
        refresh_per_second=2,
    )
