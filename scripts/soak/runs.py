"""Small runs for every row: the corpus, programs in forked processes, and the comparison bit by bit.

A process that has imported everything is forked for every run, so that hundreds of them cost no import.
"""

import json
import multiprocessing
import os
import resource
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

import mla_lm.training  # noqa: F401  train.py imports it late
import train
from mla_lm import cli
from mla_lm.checkpoint import load_checkpoint
from mla_lm.config import TrainConfig
from mla_lm.lightning_module import LanguageModel
from mla_lm.run import RunFolder, load_run
from scripts import compare, convert, evaluate, export, generate, import_hf

PROGRAMS: dict[str, Callable[[], NoReturn]] = {
    "train.py": lambda: cli.run(train.main, TrainConfig),
    "load_run": lambda: cli.run(lambda: load_run(sys.argv[1])),
    **{
        module.__name__: lambda module=module: cli.run(module.main)
        for module in (compare, convert, evaluate, export, generate, import_hf)
    },
}
STEPS, VALIDATE_EVERY, SAVE_EVERY = 32, 6, 4
# A step takes some 10 ms and a checkpoint a few MB. Dropout draws random numbers, and a step has two micro-batches.
SMALL = (
    "model=mla_tiny", "model.num_layers=2", "model.d_model=128", "model.seq_len=32", "model.ff_hidden=384",
    "model.attention.kv_compressed_dim=32", "model.attention.rope_dim=8", "model.attention.nope_dim=24",
    "model.attention.value_dim=32", "model.dropout=0.1",
    "trainer.accelerator=cpu", "trainer.precision=32-true", f"trainer.max_steps={STEPS}",
    "tokens_per_step=128", "micro_batch_tokens=64",
    f"val_every_n_steps={VALIDATE_EVERY}", f"checkpoint.every_n_steps={SAVE_EVERY}", "log_every_n_steps=1",
    "samples.max_tokens=4",
    "data=text", "data.tokenizer.vocab_size=300", "data.val_tokens=512", "logger=none", "compile=false",
)  # fmt: skip
MEASURED = ("seconds", "memory/peak_mib", "train/tokens_per_second", "train/mfu")
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


def prepare_root(root: Path) -> None:
    """What all rows share: corpus.txt, about 300 kB of Python, its token cache, and a run that is not interrupted."""
    library = Path(os.__file__).parent
    text = "\n".join((library / name).read_text() for name in ("argparse.py", "typing.py", "tarfile.py"))
    (root / "corpus.txt").write_text(text)
    reference(root).parent.mkdir()
    Program("train.py", new_run(root), reference(root).parent).expect(0)


def new_run(root: Path, *overrides: str) -> list[str]:
    """train.py's command line for a small run in ./run on the corpus in `root`; later overrides count."""
    data = (f"data.files={root / 'corpus.txt'}", f"data.cache_dir={root / 'cache'}")
    last = {argument.split("=")[0]: argument for argument in (*SMALL, *data, "hydra.run.dir=run", *overrides)}
    return list(last.values())


def reference(root: Path) -> Path:
    """The run that was not interrupted."""
    return root / "reference" / "run"


def go_on(folder: Path, command: list[str], prepare: Callable[[], object] | None = None) -> Result:
    """Resume ./run as its user would, to its end: from its checkpoint, or by the same command where it has none."""
    begun = RunFolder(folder / "run").is_begun
    return Program("train.py", ["ckpt_path=run"] if begun else command, folder, prepare).expect(0)


def copied(run: Path, to: Path) -> Path:
    """A copy of a folder, the programs' output left out."""
    return Path(shutil.copytree(run, to, ignore=shutil.ignore_patterns("log")))


def limit_memory() -> None:
    """In a process that a broken file may tell to allocate anything."""
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))


def checkpoints_of(run: Path) -> dict[str, dict]:
    """All checkpoints under their own names, by name; UserError for a damaged one."""
    return {file.name: load_checkpoint(file) for file in sorted((run / "checkpoints").glob("[!.]*.ckpt"))}


def before(method: str, act: Callable[[Any], object]) -> None:
    """In a process that is about to train: have `act(module)` called before a hook of the Lightning module."""
    original = getattr(LanguageModel, method)

    def hooked(module: LanguageModel, *arguments: Any) -> Any:
        act(module)
        return original(module, *arguments)

    setattr(LanguageModel, method, hooked)


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


def steps_done(run: Path) -> int:
    """Training steps in metrics.jsonl."""
    file = run / "metrics.jsonl"
    return file.read_text().count('"train/loss"') if file.is_file() else 0


def rows_of(run: Path) -> list[dict]:
    """metrics.jsonl without measured times."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in MEASURED} for row in rows]


def check_same(run: Path, other: Path) -> None:
    """Raises Broken unless weights, optimizer, random state, losses and test loss are equal bit by bit."""
    for name in ("last.ckpt", "best.ckpt"):
        here, there = (load_checkpoint(folder / "checkpoints" / name) for folder in (run, other))
        for key in ("global_step", "state_dict", "optimizer_states", "random_state"):
            if not equal(here[key], there[key]):
                raise Broken(f"{run / 'checkpoints' / name}: {key} is not that of the uninterrupted run")
    here, there = rows_of(run), rows_of(other)
    for a, b in zip(here, there, strict=False):
        if a != b:
            raise Broken(f"{run / 'metrics.jsonl'} has {a}, the uninterrupted run {b}")
    if len(here) != len(there):
        raise Broken(f"{run / 'metrics.jsonl'} has {len(here)} rows, that of the uninterrupted run {len(there)}")
    if RunFolder(run).summary()["test_loss"] != RunFolder(other).summary()["test_loss"]:
        raise Broken(f"{run / 'summary.json'} has another test_loss than the uninterrupted run")


def equal(a: Any, b: Any) -> bool:
    """Whether nested dicts and lists of tensors and numbers are the same, bit by bit."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    return a == b


def files_in(folder: Path) -> Iterator[Path]:
    """Every file below a folder but the programs' output."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and "log" not in path.parts)
