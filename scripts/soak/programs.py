"""train.py and the tools, each at work in a process that is forked from this one.

This process has imported everything, so that hundreds of them cost no import.
"""

import multiprocessing
import os
import resource
import shlex
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import mla_lm.training.loop  # noqa: F401  train.py imports it late
import train
from mla_lm.config import TrainConfig
from mla_lm.runs.load import load_run
from mla_lm.terminal import cli
from mla_lm.training.module import LanguageModel
from scripts import compare, convert, evaluate, export, generate, import_hf

PROGRAMS: dict[str, Callable[[], NoReturn]] = {
    "train.py": lambda: cli.run(train.main, TrainConfig),
    "load_run": lambda: cli.run(lambda: load_run(sys.argv[1])),
    **{
        module.__name__: lambda module=module: cli.run(module.main)
        for module in (compare, convert, evaluate, export, generate, import_hf)
    },
}
MOST_MEMORY = 6 * 2**30  # bytes of address space
PATIENCE = 120.0  # seconds that a program may take
FORK = multiprocessing.get_context("fork")


class Broken(Exception):
    """A promise that did not hold: what was seen."""


@dataclass
class Result:
    returncode: int  # minus the signal's number where a signal ended it
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        return self.stdout + self.stderr

    @property
    def shell_status(self) -> int:
        return 128 - self.returncode if self.returncode < 0 else self.returncode


class Program:
    """One of PROGRAMS at work in a process of its own; its command line and what it prints are kept in `folder`/log.

    Args:
        name: of PROGRAMS
        arguments: its command line
        folder: working directory
        prepare: called in the new process before the program, to plant a fault there
    """

    def __init__(
        self,
        name: str,
        arguments: list[str] | tuple[str, ...],
        folder: Path,
        prepare: Callable[[], object] | None = None,
    ):
        self.name = name
        (folder / "log").mkdir(exist_ok=True)
        self.log = folder / "log" / f"{len(list(folder.glob('log/*.command')))}"
        command = shlex.join([name, *map(str, arguments)])
        self.log.with_suffix(".command").write_text(f"{command}\n")
        sys.stdout.flush()
        self.process = FORK.Process(target=self._work, args=(name, list(map(str, arguments)), folder, prepare))
        self.process.start()

    def _work(self, name: str, arguments: list[str], folder: Path, prepare: Callable[[], object] | None) -> None:
        os.setsid()  # its own helpers die with it
        for signum in (signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1):  # whatever this process was started under
            signal.signal(signum, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, stream in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(self.log.with_suffix(f".{stream}"), os.O_WRONLY | os.O_CREAT), number)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        os.chdir(folder)
        sys.argv = [name, *arguments]
        if prepare:
            prepare()
        PROGRAMS[name]()

    @property
    def running(self) -> bool:
        return self.process.is_alive()

    def send(self, signum: int, group: bool = False) -> None:
        """A signal to the process, or to it and all that it started, as a terminal does on Ctrl-C."""
        (os.killpg if group else os.kill)(self.process.pid, signum)

    def kill(self) -> None:
        self.process.kill()
        with suppress(ProcessLookupError):
            self.send(signal.SIGKILL, group=True)
        self.process.join()

    def wait(self, seconds: float = PATIENCE) -> Result:
        """Its result; Broken where it does not end in time, or fails with a traceback."""
        self.process.join(seconds)
        if self.running:
            self.kill()
            raise Broken(f"{self} did not end within {seconds:.0f} s")
        out, err = (self.log.with_suffix(f".{stream}").read_text(errors="replace") for stream in ("stdout", "stderr"))
        result = Result(self.process.exitcode, out, err)
        if "Traceback (most recent call last)" in result.output:
            raise Broken(f"{self} ended in a traceback: {result.stderr.strip().splitlines()[-1]}")
        return result

    def __str__(self) -> str:
        return f"{self.name} (log/{self.log.name})"

    def expect(self, *statuses: int, seconds: float = PATIENCE) -> Result:
        """`wait`, and Broken for another exit status."""
        result = self.wait(seconds)
        if result.shell_status not in statuses:
            last = (result.stderr.strip() or result.stdout.strip() or "nothing").splitlines()[-1]
            raise Broken(f"{self} ended with status {result.shell_status}: {last}")
        return result


def until(process: Program, happened: Callable[[], bool], seconds: float = PATIENCE, pause: float = 0.002) -> bool:
    """Wait; False where the process ends before it has happened."""
    deadline = time.monotonic() + seconds
    while not happened():
        if not process.running:
            return False
        if time.monotonic() > deadline:
            process.kill()
            raise Broken(f"{process}: nothing happened for {seconds:.0f} s")
        time.sleep(pause)
    return True


def before(method: str, act: Callable[[Any], object]) -> None:
    """In a process that is about to train: have `act(module)` called before a hook of the Lightning module."""
    original = getattr(LanguageModel, method)

    def hooked(module: LanguageModel, *arguments: Any) -> Any:
        act(module)
        return original(module, *arguments)

    setattr(LanguageModel, method, hooked)


def limit_memory() -> None:
    """In a process that a broken file may tell to allocate anything."""
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
