"""The jobs of a study: a run of train.py each, what became of it, and which are to be run next.

All that a study knows of its runs lies in their folders, so it goes on wherever it was stopped.
"""

import math
import shlex
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mla_lm.config import with_absolute_paths
from mla_lm.errors import UserError
from mla_lm.runs.folder import RunFolder
from mla_lm.runs.resume import different_keys
from mla_lm.study.declaration import StudyConfig
from mla_lm.study.planned_rows import PlannedRow
from mla_lm.study.tuning import Search, search

Role = Literal["tuning", "seed"]


@dataclass(frozen=True)
class Job:
    """A run of a row: to tune its learning rate, or one of its seeds."""

    row: str
    role: Role
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """Of its folder within that of the row."""
        return f"lr{self.lr}-seed{self.seed}"

    def __str__(self) -> str:
        return f"{self.row} lr {self.lr:g} seed {self.seed}"


class Plan:
    """The rows of a study, and the state of their runs in its folder.

    Args:
        name: of the study, under which wandb groups its runs
        folder: of the study
    """

    def __init__(self, study: StudyConfig, rows: list[PlannedRow], name: str, folder: Path):
        self.study, self.name, self.folder = study, name, folder
        self.rows = {row.name: row for row in rows}
        self.given_up: set[Job] = set()  # jobs that failed since this process began

    def run(self, job: Job) -> RunFolder:
        return RunFolder(self.folder / "runs" / job.row / job.name)

    def log(self, job: Job) -> Path:
        return self.folder / "logs" / job.row / f"{job.name}.log"

    def overrides(self, job: Job) -> list[str]:
        """The command line of train.py that makes this run, but for where it lies."""
        row = self.rows[job.row]
        return [
            *row.overrides,
            f"trainer.max_steps={row.steps}",
            f"optimizer.lr={job.lr}",
            f"seed={job.seed}",
            f"logger.group={self.name}",
            f"tags=[{job.row},{job.role}]",
        ]

    def outcome(self, job: Job) -> float | None:
        """Its validation loss; infinity if it diverged, None if it has not come to its end."""
        run = self.run(job)
        if run.is_finished:
            return run.summary()["val_loss"]
        try:
            return math.inf if run.summary().get("diverged") else None
        except UserError:  # a damaged summary, which the run writes anew
            return None

    def rate_of(self, row: PlannedRow) -> PlannedRow:
        """The row whose learning rate this one takes."""
        return self.rows[row.rate_of] if row.rate_of else row

    def search(self, row: PlannedRow) -> Search | None:
        """The search for the learning rate of a row; None if the rate is given."""
        tuning, row = self.study.tuning, self.rate_of(row)
        if len(tuning.learning_rates) == 1 or (tuning.kinds is not None and row.kind not in tuning.kinds):
            return None
        return search(
            tuning.learning_rates, tuning.most, lambda lr: self.outcome(Job(row.name, "tuning", lr, tuning.seed))
        )

    def lr(self, row: PlannedRow) -> float | None:
        """The learning rate of a row's seeds; None while it is searched for, and where every rate diverged."""
        found, rates = self.search(row), sorted(self.study.tuning.learning_rates)
        return found.best if found else rates[len(rates) // 2]

    def tuning_jobs(self, row: PlannedRow) -> list[Job]:
        """Those that have an outcome, and the next ones."""
        found = self.search(row) if row.rate_of is None else None
        rates = [*found.tried, *found.missing] if found else []
        return [Job(row.name, "tuning", lr, self.study.tuning.seed) for lr in rates]

    def seed_jobs(self, row: PlannedRow) -> list[Job]:
        """None before the learning rate is known."""
        lr = self.lr(row)
        return [] if lr is None else [Job(row.name, "seed", lr, seed) for seed in self.study.seeds_for(row.kind)]

    def jobs(self) -> list[Job]:
        """All that are known: tuning first, then seed by seed over all rows, as seeds are compared across rows."""
        tuning = [job for row in self.rows.values() for job in self.tuning_jobs(row)]
        seeds = [(place, job) for row in self.rows.values() for place, job in enumerate(self.seed_jobs(row))]
        return tuning + [job for _, job in sorted(seeds, key=lambda placed: placed[0])]

    def ready(self, running: Collection[Job] = ()) -> list[Job]:
        """Jobs that can be run now, in order."""
        return [
            job for job in self.jobs() if self.outcome(job) is None and job not in running and job not in self.given_up
        ]

    def still_unknown(self) -> int:
        """Jobs that wait for a learning rate, as far as they can be counted: the seeds of its rows."""
        return sum(len(self.study.seeds_for(row.kind)) for row in self.rows.values() if self.lr(row) is None)

    def progress(self) -> tuple[int, int]:
        """Runs that have an outcome, and all that are known of."""
        jobs = self.jobs()
        return sum(self.outcome(job) is not None for job in jobs), len(jobs) + self.still_unknown()

    def unfinished(self) -> list[Job]:
        """Jobs that have no outcome."""
        return [job for job in self.jobs() if self.outcome(job) is None]

    def check_runs(self) -> None:
        """Raises UserError where a run in the folder was made with other settings or text than the study declares."""
        for job in self.jobs():
            run = self.run(job)
            if run.config_file.is_file():
                config = with_absolute_paths(self.rows[job.row].config)
                other = [key for key in different_keys(config, run) if key not in ("seed", "optimizer.lr")]
                if other:
                    raise UserError(
                        f"{run.path} was made with another {' and '.join(other[:3])} than this study declares: declare "
                        "it as it was, or begin in another folder with --out"
                    )

        if len({summary["data_fingerprint"] for _, summary in self.finished()}) > 1:
            raise UserError(
                f"the runs in {self.folder} have read different texts, as {self.study.corpus} has changed since the "
                "first: begin in another folder with --out"
            )

    def finished(self) -> Iterator[tuple[Job, dict]]:
        """The finished runs, with their summaries."""
        for job in self.jobs():
            if self.run(job).is_finished:
                yield job, self.run(job).summary()


def as_typed(overrides: list[str], threads: int | None = None) -> str:
    """The command line of train.py that a user would type."""
    environment = f"OMP_NUM_THREADS={threads} " if threads else ""
    return f"{environment}python train.py {shlex.join(overrides)}"
