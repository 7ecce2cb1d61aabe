"""What end-to-end tests share: a corpus of real text, and runs started as a user starts them."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest
import torch

import train as train_script
from mla_lm.config import TrainConfig
from mla_lm.terminal import cli

ROOT = Path(__file__).parents[1]
# Small enough to train in seconds; fp32 on the CPU is what runs are bit-equal in.
SMALL = (
    "model=mla_tiny",
    "model.num_layers=2",
    "model.d_model=64",
    "model.seq_len=32",
    "model.ff_hidden=96",
    "model.attention.kv_compressed_dim=16",
    "model.attention.rope_dim=4",
    "model.attention.nope_dim=12",
    "model.attention.value_dim=16",
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


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """About 300 kB of Python, one text file."""
    folder = Path(os.__file__).parent
    text = "\n".join((folder / name).read_text() for name in ("argparse.py", "typing.py", "tarfile.py"))
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text(text)
    return path


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

    def start(self, *overrides: str) -> subprocess.Popen:
        """A process of its own, to be sent signals."""
        return subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *overrides],
            cwd=self.folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    @staticmethod
    def finish(process: subprocess.Popen) -> Result:
        out, err = process.communicate(timeout=300)
        return Result(process.returncode, out, err)


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


@pytest.fixture(autouse=True, scope="session")
def _plain_machine(tmp_path_factory):
    """No GPU, no wandb account, a key of its own that signs runs, and one thread, as runs that are compared bit by bit
    must have the same number.
    """
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("settings")))
        torch.set_num_threads(1)
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def train(tmp_path, corpus) -> TrainCommand:
    data = (
        "data=text",
        f"data.files={corpus}",
        "data.tokenizer.vocab_size=300",
        "data.val_tokens=512",
        f"data.cache_dir={corpus.parent / 'cache'}",
    )
    return TrainCommand(tmp_path, data)


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
