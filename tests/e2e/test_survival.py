"""What goes wrong around training does not end it, or ends it with a word and with everything saved."""

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

from mla_lm.data.windows import Windows
from mla_lm.runs.checkpoint import load_checkpoint
from mla_lm.training.background_save import BackgroundCheckpointIO
from mla_lm.training.loggers import MetricsFile
from mla_lm.training.module import LanguageModel
from scripts.soak.programs import Program, before
from scripts.soak.runs import check_same
from scripts.soak.runs import rows_of as without_times
from tests.conftest import ACCUMULATING, ROOT, SMALL, TrainCommand, plant, rows_of, send_at, succeeded, summary_of


def start(train: TrainCommand, *overrides: str, prepare: Callable[[], object]) -> Program:
    """A small run into ./run, in a process in which something goes wrong."""
    return train.start(*SMALL, *train.data, *overrides, "hydra.run.dir=run", prepare=prepare)


@contextmanager
def longest_file(most: int) -> Iterator[None]:
    """No file may grow beyond so many bytes, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def around_saves(prepare_save: Callable[[int], int | None]) -> Callable[[], None]:
    """For `prepare`: `prepare_save(step)` is called before a save, and says how long files may be while it lasts."""

    def plant() -> None:
        write = BackgroundCheckpointIO._write

        def limited(self: BackgroundCheckpointIO, left: list, state: dict, paths: list[Path]) -> dict:
            most = prepare_save(state["global_step"])
            with longest_file(resource.RLIM_INFINITY if most is None else most):
                return write(self, left, state, paths)

        BackgroundCheckpointIO._write = limited

    return plant


# signals


@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGUSR1])
def test_signals_of_terminals_and_schedulers(train, tmp_path, uninterrupted, signum):
    """The run is saved at a step; the same signal again, or another, does not cut that short."""
    process = start(train, *ACCUMULATING, prepare=send_at(5, signum, signum, signal.SIGTERM))
    assert process.wait().returncode == 128 + signum
    assert summary_of(tmp_path / "run")["steps"] == 6
    succeeded(train.bare("ckpt_path=run"))
    check_same(tmp_path / "run", uninterrupted)


# The first process of two saves only after the other has ended, or has shown for a while that it waits for that.
SLOW = """
import os, signal, subprocess, sys
sys.path.insert(0, {root!r})
import train
from mla_lm.config import TrainConfig
from mla_lm.terminal import cli
from mla_lm.training import background_save
from mla_lm.training.module import LanguageModel

write, step = background_save._write_file, LanguageModel.training_step
is_first, others = "LOCAL_RANK" not in os.environ, []

class Started(subprocess.Popen):
    def __init__(self, command, *arguments, **options):
        super().__init__(command, *arguments, **options)
        if __file__ in command:
            others.append(self)

def slow(*arguments):
    try:
        others[0].wait(timeout=3)
    except subprocess.TimeoutExpired:
        print("the other process waits", flush=True)
    write(*arguments)

def stopping(self, *arguments):
    if self.global_step == 3 and is_first:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(self, *arguments)

subprocess.Popen, background_save._write_file, LanguageModel.training_step = Started, slow, stopping
cli.run(train.main, TrainConfig)
"""


def test_two_processes_save_on_a_signal_however_long_it_takes(train, tmp_path):
    """Where one of them ended before the file is there, Lightning would kill the one that writes it."""
    script = tmp_path / "slow.py"
    script.write_text(SLOW.format(root=str(ROOT)))
    options = ("trainer.devices=2", "trainer.max_steps=100", "val_every_n_steps=90", "checkpoint.every_n_steps=90")
    result = subprocess.run(
        [sys.executable, str(script), *SMALL, *train.data, *options, "hydra.run.dir=run"], text=True,
        cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 143, result.stderr[-2000:]
    assert "the other process waits" in result.stdout
    steps = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"]
    assert steps == summary_of(tmp_path / "run")["steps"] >= 3


def test_a_second_interrupt_ends_at_once(train, tmp_path):
    """In the middle of a step, which never ends."""

    def interrupt(module: LanguageModel) -> None:
        if module.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            Event().wait()

    result = start(train, prepare=lambda: before("training_step", interrupt)).wait()
    assert result.returncode == 130
    assert "SIGINT: stopping after this step" in result.stderr
    assert len(rows_of(tmp_path / "run")) == 2


def test_what_nohup_ignores_stays_ignored(train):
    def as_nohup() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        send_at(2, signal.SIGHUP)()

    succeeded(start(train, prepare=as_nohup).wait())


# saving


def test_a_disk_that_is_full_for_a_while(train, tmp_path, uninterrupted):
    """The saves of two steps fail, one of them the best one's: told, and nothing is lost in the end."""
    full = around_saves(lambda step: 2**14 if step in (6, 8) else None)
    result = succeeded(start(train, *ACCUMULATING, prepare=full).wait())
    assert result.stderr.count("cannot be written: File too large; training goes on") == 3
    check_same(tmp_path / "run", uninterrupted)


def test_a_disk_that_stays_full(train, tmp_path, uninterrupted):
    """After three saves that failed the run ends with the reason; the one before them is there to go on from."""
    full = around_saves(lambda step: 2**14 if step >= 8 else None)
    result = start(train, *ACCUMULATING, prepare=full).wait()
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].endswith("last.ckpt cannot be written: File too large")
    succeeded(train.bare("ckpt_path=run"))
    check_same(tmp_path / "run", uninterrupted)


def test_the_save_on_a_signal_is_tried_whatever_became_of_the_one_before(train, tmp_path, uninterrupted):
    failed = []

    def fail_once(step: int) -> int | None:
        if step == 8 and not failed:
            failed.append(step)
            os.kill(os.getpid(), signal.SIGTERM)
            return 2**14
        return None

    assert start(train, *ACCUMULATING, prepare=around_saves(fail_once)).wait().returncode == 143
    steps = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"]
    assert 8 <= steps == summary_of(tmp_path / "run")["steps"] < 16
    succeeded(train.bare("ckpt_path=run"))
    check_same(tmp_path / "run", uninterrupted)


# logging and output


def test_a_full_disk_under_the_metrics(train, tmp_path, uninterrupted):
    """Rows that could not be written, one of them in part, are written as soon as they can be."""

    def full() -> None:
        write = MetricsFile.log_metrics

        def log(self: MetricsFile, metrics: dict, step: int) -> None:
            with longest_file(self.path.stat().st_size + 10 if 3 <= step < 9 else resource.RLIM_INFINITY):
                write(self, metrics, step)

        MetricsFile.log_metrics = log

    seldom = "checkpoint.every_n_steps=20"  # or a save could meet that limit
    result = succeeded(start(train, *ACCUMULATING, seldom, prepare=full).wait())
    assert result.stderr.count("metrics.jsonl could not log") == 1
    assert without_times(tmp_path / "run") == without_times(uninterrupted)


def test_wandb_that_raises(train, tmp_path, monkeypatch):
    from mla_lm.training.wandb_run import WandbRun

    def log(*_: Any, **__: Any) -> None:
        raise RuntimeError("the service is gone")

    monkeypatch.setattr(WandbRun, "log_metrics", log)
    monkeypatch.setattr(WandbRun, "log_samples", log)
    result = succeeded(train("logger=wandb", "hydra.run.dir=run"))
    assert result.stderr.count("wandb could not log (the service is gone): training goes on") == 1
    assert summary_of(tmp_path / "run")["finished"]


def test_output_that_nobody_reads_any_more(train, tmp_path, uninterrupted):
    """`| tee` that dies: the run goes on to its end, and says so once."""
    read, write = os.pipe()
    process = start(train, *ACCUMULATING, prepare=lambda: os.dup2(write, 1) and os.close(read))
    os.close(write)
    os.read(read, 10)
    os.close(read)
    result = succeeded(process.wait())
    assert result.stderr.count("standard output cannot be written (Broken pipe): the run goes on") == 1
    check_same(tmp_path / "run", uninterrupted)


def test_a_sample_that_cannot_be_printed(train):
    """A terminal of ASCII, and a prompt that is not."""
    process = start(train, "data.prompts=['é☃']", prepare=lambda: sys.stdout.reconfigure(encoding="ascii"))
    assert r"\xe9\u2603" in succeeded(process.wait()).stdout


# what hangs, and what needs too much


def test_no_step_for_too_long(train):
    def hang() -> None:
        item, left = Windows.__getitem__, iter(range(1, 40))
        Windows.__getitem__ = lambda self, index: item(self, index) if next(left, 0) else Event().wait()

    result = start(train, "step_timeout=2", prepare=hang).wait()
    assert result.returncode == 1
    assert "no step has ended for 2 s (step_timeout)" in result.stderr
    assert "in <lambda>" in result.stderr  # where the main thread stands
    assert "_watch" in result.stderr  # and the others
    succeeded(train.bare("ckpt_path=run", "step_timeout=600"))


def test_out_of_memory(train, tmp_path):
    """One micro-batch whose activations are beyond the memory that the process may take."""

    def limit(module: LanguageModel) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**25, resource.RLIM_INFINITY))

    def limited() -> None:
        before("on_train_start", limit)

    result = start(train, "tokens_per_step=65536", "micro_batch_tokens=65536", prepare=limited).wait()
    assert result.returncode == 1, result.stderr[-2000:]
    assert "out of memory with 2048 x 32 tokens at once" in result.stderr
    assert "scripts.plan says" in result.stderr
    assert "micro_batch_tokens=32768 or model.activation_checkpointing=true" in result.stderr


# numbers that are none


def assert_finite(run: Path) -> None:
    for path in (run / "checkpoints").iterdir():
        state = load_checkpoint(path)
        assert all(torch.isfinite(tensor).all() for tensor in state["state_dict"].values()), path


@pytest.mark.parametrize(("bad", "every"), [(float("nan"), 1), (float("inf"), 5)])
def test_a_weight_that_is_lost_in_training(train, tmp_path, monkeypatch, bad, every):
    plant(monkeypatch, "training_step", [11], lambda module: module.net.norm.weight[0].fill_(bad))
    result = train(*ACCUMULATING, f"log_every_n_steps={every}", "hydra.run.dir=run")
    assert result.returncode == 1
    for word in ("loss is nan", "gradient norm", "at step 12,", "learning rate", "begin at training tokens"):
        assert word in result.stderr
    assert len(result.stderr.strip().splitlines()) <= 3
    assert_finite(tmp_path / "run")


def test_a_weight_that_is_lost_in_validation(train, tmp_path, monkeypatch):
    harm = lambda module: module.net.norm.weight[0].fill_(float("nan"))  # noqa: E731
    plant(monkeypatch, "on_validation_epoch_start", [12], harm)
    result = train(*ACCUMULATING, "hydra.run.dir=run")
    assert result.returncode == 1
    assert "the validation loss is nan after step 12" in result.stderr
    assert_finite(tmp_path / "run")
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] < 12


def test_a_weight_that_is_lost_in_an_update(train, tmp_path, monkeypatch):
    """Loss and gradient of the step were finite: the thread that saves finds it."""
    plant(monkeypatch, "on_save_checkpoint", [8], lambda module: module.net.norm.weight[0].fill_(float("inf")))
    result = train(*ACCUMULATING, "log_every_n_steps=100", "hydra.run.dir=run")
    assert result.returncode == 1
    assert "state_dict.norm.weight has a number that is not finite after step 8" in result.stderr
    assert_finite(tmp_path / "run")


def spoil_gradient(module: LanguageModel) -> None:
    module.net.norm.weight.grad[0] = float("nan")


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_steps_are_left_out(train, tmp_path, monkeypatch, optimizer):
    """on_nonfinite=skip: nothing of such a step is in the weights or moments, and it is counted over a resume."""
    plant(monkeypatch, "on_before_optimizer_step", [5, 8], spoil_gradient)
    succeeded(train(*ACCUMULATING, f"optimizer={optimizer}", "on_nonfinite=skip", "hydra.run.dir=run"))
    assert_finite(tmp_path / "run")
    rows = [row for row in rows_of(tmp_path / "run") if "train/loss" in row]
    assert [row["train/skipped_steps"] for row in rows[3:10]] == [0, 0, 1, 1, 1, 2, 2]
    assert [row["step"] for row in rows] == list(range(1, 17))
    succeeded(train.bare("ckpt_path=run", "trainer.max_steps=17"))
    assert [row["train/skipped_steps"] for row in rows_of(tmp_path / "run") if "train/loss" in row][16] == 2


def test_a_step_left_out_changes_nothing(train, tmp_path, monkeypatch):
    """The weights after it are those before it."""
    plant(monkeypatch, "on_before_optimizer_step", [4, 5], spoil_gradient)
    options = ("on_nonfinite=skip", "checkpoint.every_n_steps=1", "checkpoint.keep_last=3", "val_every_n_steps=100")
    succeeded(train(*options, "hydra.run.dir=run"))
    names = ("last-2.ckpt", "last-1.ckpt", "last.ckpt")  # after the last step it is saved, and none follows
    states = [load_checkpoint(tmp_path / "run" / "checkpoints" / name) for name in names]
    assert [state["global_step"] for state in states] == [4, 5, 6]
    for state in states[1:]:
        torch.testing.assert_close(state["state_dict"], states[0]["state_dict"], rtol=0, atol=0)
        moments, before = (s["optimizer_states"][0]["state"] for s in (state, states[0]))
        torch.testing.assert_close(moments, before, rtol=0, atol=0)


def test_too_many_steps_are_left_out(train, tmp_path, monkeypatch):
    plant(monkeypatch, "on_before_optimizer_step", range(4, 40), spoil_gradient)
    result = train(*ACCUMULATING, "trainer.max_steps=40", "on_nonfinite=skip", "hydra.run.dir=run")
    assert result.returncode == 1
    assert result.stderr.count("warning: a step is skipped") == 20
    assert "20 steps were skipped before it" in result.stderr
    assert_finite(tmp_path / "run")
