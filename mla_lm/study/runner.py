"""Runs the jobs of a study as separate processes of train.py, several at once, until none is left.

Without a launcher, a process makes one run. With one of Hydra's launchers, a process is a multirun: it makes all runs
of a row that differ in their learning rate, or in their seed, wherever the launcher sends them.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mla_lm.errors import Interrupted
from mla_lm.files import make_folder
from mla_lm.runs.folder import RunFolder
from mla_lm.study.jobs import Job, Plan, as_typed
from mla_lm.study.watch import Watch
from mla_lm.terminal import cli

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PAUSE = 0.2  # seconds between looks at the processes
LAST_LINES = 5  # of a failed job's log that are shown


@dataclass
class Working:
    """A process at work, and the jobs that it is for."""

    process: subprocess.Popen
    jobs: list[Job]
    place: int
    log: Path
    is_multirun: bool

    def stop(self, signum: int) -> None:
        """A run ends by its own means; a multirun takes its workers along, which are in its process group."""
        with suppress(ProcessLookupError):
            (os.killpg if self.is_multirun else os.kill)(self.process.pid, signum)


class Runner:
    """Works through a plan.

    Args:
        program: the path of train.py
        environments: of each process that may be at work at once, the variables that it gets
        launcher: hydra/launcher=..., and the keys that go with it; empty: none
        watch: told of everything
    """

    def __init__(
        self, plan: Plan, program: Path, environments: list[dict[str, str]], launcher: list[str], watch: Watch
    ):
        self.plan, self.program, self.launcher, self.watch = plan, program, launcher, watch
        self.environments = environments
        self.working: list[Working] = []
        self.stopped_by = 0

    def run(self) -> None:
        """Run what is missing.

        Raises:
            Interrupted: by a signal; all processes have ended, and their runs are saved.
        """
        with self._listening():
            self._start_some()
            while self.working:
                time.sleep(PAUSE)
                ended = [one for one in self.working if one.process.poll() is not None]
                for one in ended:
                    self.working.remove(one)
                    self._ended(one)
                if ended and not self.stopped_by:
                    self._start_some()
                self.watch.look([job for one in self.working for job in one.jobs])
        if self.stopped_by:
            raise Interrupted(self.stopped_by)

    def _start_some(self) -> None:
        free = [n for n in range(len(self.environments)) if n not in [one.place for one in self.working]]
        for place in free:
            ready = self.plan.ready([job for one in self.working for job in one.jobs])
            if not ready:
                return
            first = ready[0]
            alike = [job for job in ready if (job.row, job.role) == (first.row, first.role)]
            self._start(alike if self.launcher else [first], place)

    def _start(self, jobs: list[Job], place: int) -> None:
        overrides = multirun(self.plan, jobs, self.launcher) if self.launcher else single_run(self.plan, jobs[0])
        log = self.plan.log(jobs[0])
        make_folder(log.parent)
        environment = self.environments[place]
        with open(log, "ab") as file:
            variables = "".join(f"{name}={value} " for name, value in environment.items())
            file.write(f"$ {variables}{as_typed(overrides)}\n".encode())
            file.flush()
            process = subprocess.Popen(
                [sys.executable, str(self.program), *overrides],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment, "PYTHONUNBUFFERED": "1", "PYTHONPATH": self._import_path()},
                process_group=0,  # Ctrl-C reaches this process alone, which then stops the others
            )
        self.working.append(Working(process, jobs, place, log, bool(self.launcher)))
        self.watch.begun(jobs)
        if self.stopped_by:  # the signal came while the process was being made
            self.working[-1].stop(signal.SIGTERM)

    def _import_path(self) -> str:
        """With the folder of train.py, where a launcher's job finds our package whatever folder it is started in."""
        return os.pathsep.join(filter(None, [str(self.program.parent), os.environ.get("PYTHONPATH")]))

    def _ended(self, one: Working) -> None:
        for job in one.jobs:
            outcome = self.plan.outcome(job)
            if outcome is None and not self.stopped_by:
                self.plan.given_up.add(job)
                self.watch.failed(job, one.process.returncode, one.log, last_lines(one.log))
            else:
                self.watch.ended(job, outcome)

    @contextmanager
    def _listening(self) -> Iterator[None]:
        before = {signum: signal.getsignal(signum) for signum in SIGNALS}
        heard = [signum for signum, handler in before.items() if handler is not signal.SIG_IGN]  # nohup ignores SIGHUP
        for signum in heard:
            signal.signal(signum, self._receive)
        try:
            yield
        finally:
            for signum in heard:
                signal.signal(signum, before[signum])
            for one in self.working:  # an error in this process
                one.stop(signal.SIGTERM)

    def _receive(self, signum: int, frame: Any) -> None:
        again, self.stopped_by = bool(self.stopped_by), self.stopped_by or signum
        for one in self.working:
            one.stop(signal.SIGKILL if again and signum == signal.SIGINT else signal.SIGTERM)
        self.watch.stopping(len(self.working))


def single_run(plan: Plan, job: Job) -> list[str]:
    """The command line of one run, which goes on with it where it was stopped."""
    name = f"logger.name={cli.quoted(f'{job.row} {job.name}')}"
    return [*plan.overrides(job), name, "run.resume=auto", f"hydra.run.dir={cli.quoted(plan.run(job).path)}"]


def multirun(plan: Plan, jobs: list[Job], launcher: list[str]) -> list[str]:
    """The command line of jobs of one row that differ in their learning rate, or in their seed.

    Hydra names the folder of each by the values that it has, and a multirun goes on with what lies there.
    """
    lists = {
        "optimizer.lr": ",".join(str(rate) for rate in dict.fromkeys(job.lr for job in jobs)),
        "seed": ",".join(str(seed) for seed in dict.fromkeys(job.seed for job in jobs)),
    }
    shared = [override for override in plan.overrides(jobs[0]) if override.partition("=")[0] not in lists]
    folder: RunFolder = plan.run(jobs[0])
    return [
        "-m",
        *shared,
        *(f"{key}={values}" for key, values in lists.items()),
        *launcher,
        f"hydra.sweep.dir={cli.quoted(folder.path.parent)}",
        "hydra.sweep.subdir=lr${optimizer.lr}-seed${seed}",
    ]


def last_lines(log: Path) -> list[str]:
    """The end of a job's log."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-LAST_LINES:]
