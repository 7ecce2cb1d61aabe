"""What tests share: a corpus of real text, train.py as its user starts it, and runs that have finished."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Collection
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

os.environ["TRITON_INTERPRET"] = "1"  # which Triton reads as it is imported, and torch may import it

import pytest
import torch
from filelock import FileLock
from hypothesis import settings

import train as train_script
from mla_lm.attention import KINDS
from mla_lm.config import TrainConfig
from mla_lm.terminal import cli

if TYPE_CHECKING:
    from mla_lm.training.module import LanguageModel
    from scripts.soak.programs import Program

ROOT = Path(__file__).parents[1]
# Small enough to train in a second; fp32 on the CPU is what runs are bit-equal in.
SIZES = ("model.num_layers=2", "model.d_model=64", "model.seq_len=32", "model.ff_hidden=96")
SMALL_MLA = (
    "model=mla_tiny",
    "model.attention.kv_compressed_dim=16",
    "model.attention.rope_dim=4",
    "model.attention.nope_dim=12",
    "model.attention.value_dim=16",
    *SIZES,
)
SHORT = (
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "trainer.max_steps=6",
    "tokens_per_step=256",
    "val_every_n_steps=3",
    "checkpoint.every_n_steps=2",
    "log_every_n_steps=1",
    "samples.max_tokens=4",
    "logger=none",
    "compile=false",
)
SMALL = (*SMALL_MLA, *SHORT)
# Every step accumulates four micro-batches of two windows, halved in the first 8 steps; dropout draws random numbers.
ACCUMULATING = ("micro_batch_tokens=64", "model.dropout=0.1", "schedule.short_seq_len=16", "trainer.max_steps=16")

# Settings of a study, of the smallest that compares anything.
TWO_KINDS = (
    "kinds=[mla,mha]",
    "cache_of=[]",
    "views=[parameters]",
    "tuning.kinds=null",
    "seeds=[1,2]",
    "more_seeds=[]",
)

# A busy machine is no failure. Most facts that hold for drawn examples fail, where they do, within a few of them.
settings.register_profile("tests", max_examples=30, deadline=None, print_blob=True)
settings.load_profile("tests")


def small(kind: str) -> tuple[str, ...]:
    """Overrides for a small run of a kind of attention."""
    return SMALL if kind == "mla" else (f"model={kind}_tiny", *SIZES, *SHORT)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as e2e what starts a training run, a tool or a Hub; tests of other processes say so themselves."""
    for item in items:
        if item.path.parent.name in ("e2e", "scripts") or {"on_corpus", "hub"} & set(item.fixturenames):
            item.add_marker(pytest.mark.e2e)


@pytest.fixture(scope="session")
def session(tmp_path_factory) -> Path:
    """A folder that all processes of a test session share."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(autouse=True, scope="session")
def _plain_machine(session):
    """No GPU, no wandb account, a key of its own that signs runs, signals that count although the tests may run in the
    background, and one thread, as runs that are compared bit by bit must have the same number.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("XDG_CONFIG_HOME", str(session / "settings"))
        torch.set_num_threads(1)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def corpus(session) -> Path:
    """About 300 kB of Python, one text file. Read only: other processes read it as well."""
    path = session / "corpus" / "corpus.txt"
    with FileLock(session / "corpus.lock"):
        if not path.exists():
            path.parent.mkdir()
            folder = Path(os.__file__).parent
            path.write_text(
                "\n".join((folder / name).read_text() for name in ("argparse.py", "typing.py", "tarfile.py"))
            )
    return path


@pytest.fixture(scope="session")
def on_corpus(corpus) -> tuple[str, ...]:
    """Overrides for training on the corpus."""
    return (
        "data=text",
        f"data.files={corpus}",
        "data.tokenizer.vocab_size=300",
        "data.val_tokens=512",
        f"data.cache_dir={corpus.parent / 'cache'}",
    )


@pytest.fixture
def train(tmp_path, on_corpus) -> "TrainCommand":
    return TrainCommand(tmp_path, on_corpus)


@pytest.fixture(scope="session")
def runs(session, on_corpus) -> Path:
    """A folder with a finished run of each kind, and beside each, in KIND.out, what train.py printed. Read only."""
    folder = session / "runs"
    with FileLock(session / "runs.lock"):
        if not folder.exists():
            folder.mkdir()
            for kind in KINDS:
                command = (*small(kind), *on_corpus, f"hydra.run.dir={kind}")
                result = succeeded(TrainCommand(folder, on_corpus).bare(*command))
                (folder / f"{kind}.out").write_text(result.stdout)
    return folder


@pytest.fixture(scope="session")
def uninterrupted(session, on_corpus) -> Path:
    """The run of `ACCUMULATING` that nothing happened to. Read only."""
    folder = session / "uninterrupted"
    with FileLock(session / "uninterrupted.lock"):
        if not folder.exists():
            folder.mkdir()
            succeeded(TrainCommand(folder, on_corpus)(*ACCUMULATING, "hydra.run.dir=run"))
    return folder / "run"


@pytest.fixture
def run(runs, tmp_path) -> Path:
    """A copy of the MLA run, to change: tmp_path/run."""
    return Path(shutil.copytree(runs / "mla", tmp_path / "run"))


@dataclass
class Result:
    returncode: int
    stdout: str
    stderr: str


@dataclass
class TrainCommand:
    """train.py in a working directory of its own, on the corpus, with a small model."""

    folder: Path
    data: tuple[str, ...]

    def __call__(self, *overrides: str) -> Result:
        return self.bare(*SMALL, *self.data, *overrides)

    def bare(self, *overrides: str) -> Result:
        """With these overrides only; in this process, which saves the time to import torch."""
        return call_main(lambda: cli.run(train_script.main, TrainConfig), ["train.py", *overrides], self.folder)

    def start(self, *overrides: str, prepare: Callable[[], object] | None = None) -> "Program":
        """In a process of its own that is forked from this one, where `prepare` is called first: to plant a fault."""
        from scripts.soak.programs import Program

        return Program("train.py", overrides, self.folder, prepare)

    def process(self, *overrides: str) -> Result:
        """As a user starts it, which takes seconds to import everything."""
        command = [sys.executable, str(ROOT / "train.py"), *overrides]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=300)
        return Result(done.returncode, done.stdout, done.stderr)


def call_main(program: Callable[[], NoReturn], arguments: list[str], folder: Path) -> Result:
    """Call a program that ends in `cli.run` as if it had been started with these arguments in this folder."""
    before, sys.argv = sys.argv, arguments
    out, err = io.StringIO(), io.StringIO()
    try:
        with chdir(folder), redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as end:
            program()
    finally:
        sys.argv = before
    status = end.value.code
    return Result(status if isinstance(status, int) else 1, out.getvalue(), err.getvalue())


def send_at(step: int, *signals: int) -> Callable[[], None]:
    """For `start(prepare=...)`: within the step that follows so many, the process sends itself these signals."""

    def plant() -> None:
        from scripts.soak.programs import before

        left = list(signals)

        def send(module: Any) -> None:
            while left and module.global_step == step:
                os.kill(os.getpid(), left.pop(0))

        before("training_step", send)

    return plant


def plant(monkeypatch, hook: str, steps: Collection[int], act: Callable[["LanguageModel"], object]) -> None:
    """Do something to runs of this process just before a hook of their module, at these steps."""
    from mla_lm.training.module import LanguageModel

    before = getattr(LanguageModel, hook)

    def planted(module: LanguageModel, *arguments: Any) -> Any:
        if module.global_step in steps:
            with torch.no_grad():
                act(module)
        return before(module, *arguments)

    monkeypatch.setattr(LanguageModel, hook, planted)


def wait_until_stopped(process: "Program") -> None:
    """By SIGSTOP."""
    os.waitpid(process.process.pid, os.WUNTRACED)


def summary_of(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def rows_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def succeeded(result: Result) -> Result:
    assert result.returncode == 0, result.stderr[-3000:]
    return result


def refused(result: Result, *words: str) -> None:
    """A user's mistake: exit status 2, at most three lines that name it."""
    assert result.returncode == 2, result.stderr[-3000:]
    assert 1 <= len(result.stderr.strip().splitlines()) <= 3, result.stderr
    for word in words:
        assert word in result.stderr
