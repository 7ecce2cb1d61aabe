"""What goes wrong around training does not end it, or ends it with a word and with everything saved."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch

from mla_lm.runs.checkpoint import load_checkpoint
from mla_lm.training.module import LanguageModel
from tests.conftest import ROOT, SMALL, TrainCommand, rows_of, succeeded, summary_of
from tests.runs.test_resume import ACCUMULATING, assert_same, start_run, wait_for_step

# Runs train.py as a user does, after `prelude`; what follows it is the command line.
PRELUDE = """
import sys
sys.path.insert(0, {root!r})
{prelude}
import train
from mla_lm.terminal import cli
from mla_lm.config import TrainConfig
cli.run(train.main, TrainConfig)
"""


def start_with(prelude: str, train, *overrides: str, **options) -> subprocess.Popen:
    """A training process in which something goes wrong: `prelude` is Python that runs before anything else."""
    program = PRELUDE.format(root=str(ROOT), prelude=textwrap.dedent(prelude))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen(
        [sys.executable, "-c", program, *SMALL, *train.data, *overrides],
        cwd=train.folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, **pipes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory, corpus) -> Path:
    """The run of `ACCUMULATING` that nothing happened to."""
    data = ("data=text", f"data.files={corpus}", "data.tokenizer.vocab_size=300", "data.val_tokens=512")
    train = TrainCommand(tmp_path_factory.mktemp("whole"), (*data, f"data.cache_dir={corpus.parent / 'cache'}"))
    succeeded(train(*ACCUMULATING, "hydra.run.dir=run"))
    return train.folder / "run"


# signals


@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGUSR1])
def test_signals_of_terminals_and_schedulers(train, tmp_path, whole, signum):
    """The run is saved at a step; the same signal again, or another, does not cut that short."""
    process = start_run(train, "hydra.run.dir=run")
    wait_for_step(tmp_path / "run", 5, process)
    for number in (signum, signum, signal.SIGTERM):
        process.send_signal(number)
    assert train.finish(process).returncode == 128 + signum
    assert 5 <= summary_of(tmp_path / "run")["steps"] < 40
    succeeded(train.bare("ckpt_path=run"))
    assert_same(tmp_path / "run", whole)


def test_two_processes_save_on_a_signal_however_long_it_takes(train, tmp_path):
    """Where one of them ended before the file is there, Lightning would kill the one that writes it."""
    script = tmp_path / "slow.py"
    slow = """
        import time
        from mla_lm import saving
        before = saving._write_file
        def write(*arguments):
            time.sleep(8)
            before(*arguments)
        saving._write_file = write
    """
    script.write_text(PRELUDE.format(root=str(ROOT), prelude=textwrap.dedent(slow)))
    options = (
        "trainer.devices=2",
        "trainer.max_steps=100000",
        "val_every_n_steps=90000",
        "checkpoint.every_n_steps=90000",
    )
    process = subprocess.Popen(
        [sys.executable, str(script), *SMALL, *train.data, *options, "hydra.run.dir=run"], text=True,
        cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    wait_for_step(tmp_path / "run", 3, process)
    process.send_signal(signal.SIGTERM)
    result = train.finish(process)
    assert result.returncode == 143, result.stderr[-2000:]
    steps = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"]
    assert steps == summary_of(tmp_path / "run")["steps"] >= 3


def test_a_second_interrupt_ends_at_once(train, tmp_path):
    """The network takes a minute for a step, so that the first one is not seen to."""
    slow = """
        import time
        from mla_lm.training.module import LanguageModel
        before = LanguageModel.training_step
        def step(self, *arguments):
            if self.global_step == 2:
                print("sleeping", flush=True)
                time.sleep(60)
            before(self, *arguments)
        LanguageModel.training_step = step
    """
    process = start_with(slow, train, "hydra.run.dir=run")
    while "sleeping" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert "SIGINT: stopping after this step" in process.stderr.readline() + process.stderr.readline()
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert train.finish(process).returncode == 130
    assert time.monotonic() - began < 30


def test_what_nohup_ignores_stays_ignored(train, tmp_path):
    prelude = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    process = start_with(prelude, train, "hydra.run.dir=run")
    wait_for_step(tmp_path / "run", 1, process)
    process.send_signal(signal.SIGHUP)
    assert train.finish(process).returncode == 0


# saving


def test_a_disk_that_is_full_for_a_while(train, tmp_path, whole):
    """The saves of two steps fail, one of them the best one's: told, and nothing is lost in the end."""
    full = """
        import resource
        from mla_lm.training.background_save import BackgroundCheckpointIO
        before = BackgroundCheckpointIO._write
        def write(self, left, state, paths):
            most = 2**14 if state["global_step"] in (6, 8) else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
            try:
                return before(self, left, state, paths)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        BackgroundCheckpointIO._write = write
    """
    result = train.finish(start_with(full, train, *ACCUMULATING, "hydra.run.dir=run"))
    succeeded(result)
    assert result.stderr.count("cannot be written: File too large; training goes on") == 3
    assert_same(tmp_path / "run", whole)


def test_a_disk_that_stays_full(train, tmp_path, whole):
    """After three saves that failed the run ends with the reason; the one before them is there to go on from."""
    full = """
        import resource
        from mla_lm.training.background_save import BackgroundCheckpointIO
        before = BackgroundCheckpointIO._write
        def write(self, left, state, paths):
            if state["global_step"] == 10:
                resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, resource.RLIM_INFINITY))
            return before(self, left, state, paths)
        BackgroundCheckpointIO._write = write
    """
    result = train.finish(start_with(full, train, *ACCUMULATING, "hydra.run.dir=run"))
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].endswith("last.ckpt cannot be written: File too large")
    succeeded(train.bare("ckpt_path=run"))
    assert_same(tmp_path / "run", whole)


def test_the_save_on_a_signal_is_tried_whatever_became_of_the_one_before(train, tmp_path, whole):
    full = """
        import os, resource, signal
        from mla_lm.training.background_save import BackgroundCheckpointIO
        before = BackgroundCheckpointIO._write
        def write(self, left, state, paths):
            most = resource.RLIM_INFINITY
            if state["global_step"] == 8 and not write.has_failed:
                most, write.has_failed = 2**14, True
                os.kill(os.getpid(), signal.SIGTERM)
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
            return before(self, left, state, paths)
        write.has_failed = False
        BackgroundCheckpointIO._write = write
    """
    result = train.finish(start_with(full, train, *ACCUMULATING, "hydra.run.dir=run"))
    assert result.returncode == 143
    steps = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"]
    assert steps == summary_of(tmp_path / "run")["steps"] >= 8
    succeeded(train.bare("ckpt_path=run"))
    assert_same(tmp_path / "run", whole)


# logging and output


def test_a_full_disk_under_the_metrics(train, tmp_path, whole):
    """Rows that could not be written, one of them in part, are written as soon as they can be."""
    full = """
        import resource
        from mla_lm.training.loggers import MetricsFile
        before = MetricsFile.log_metrics
        def log(self, metrics, step=None):
            size = self.path.stat().st_size
            most = size + 10 if 3 <= step < 9 else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
            try:
                before(self, metrics, step)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        MetricsFile.log_metrics = log
    """
    result = train.finish(start_with(full, train, *ACCUMULATING, "checkpoint.every_n_steps=20", "hydra.run.dir=run"))
    succeeded(result)
    assert result.stderr.count("metrics.jsonl could not log") == 1
    measured = ("seconds", "memory/peak_mib", "train/tokens_per_second", "train/mfu")
    a, b = (
        [{k: v for k, v in row.items() if k not in measured} for row in rows_of(f)] for f in (tmp_path / "run", whole)
    )
    assert a == b


def test_wandb_that_raises(train, tmp_path, monkeypatch):
    from lightning.pytorch.loggers import WandbLogger

    def log(*_: Any, **__: Any) -> None:
        raise RuntimeError("the service is gone")

    monkeypatch.setattr(WandbLogger, "log_metrics", log)
    monkeypatch.setattr(WandbLogger, "log_text", log)
    result = succeeded(train("logger=wandb", "hydra.run.dir=run"))
    assert result.stderr.count("WandbLogger could not log (the service is gone): training goes on") == 1
    assert summary_of(tmp_path / "run")["finished"]


def test_output_that_nobody_reads_any_more(train, tmp_path, whole):
    """`| tee` that dies: the run goes on to its end, and says so once."""
    read, write = os.pipe()
    process = start_run_to(train, write)
    os.close(write)
    os.read(read, 10)
    os.close(read)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert err.count("standard output cannot be written (Broken pipe): the run goes on") == 1
    assert "Traceback" not in err
    assert_same(tmp_path / "run", whole)


def start_run_to(train, stdout: int) -> subprocess.Popen:
    return start_with("", train, *ACCUMULATING, "hydra.run.dir=run", stdout=stdout)


def test_a_sample_that_cannot_be_printed(train, tmp_path):
    """A terminal of ASCII, and a prompt that is not."""
    prelude = "sys.stdout.reconfigure(encoding='ascii')"
    process = start_with(prelude, train, "data.prompts=['é☃']", "hydra.run.dir=run")
    result = succeeded(train.finish(process))
    assert r"\xe9\u2603" in result.stdout


# what hangs, and what needs too much


def test_no_step_for_too_long(train, tmp_path):
    hangs = """
        import time
        from mla_lm.data.windows import Windows
        before = Windows.__getitem__
        def item(self, index):
            item.asked += 1
            if item.asked > 40:
                time.sleep(600)
            return before(self, index)
        item.asked = 0
        Windows.__getitem__ = item
    """
    result = train.finish(start_with(hangs, train, "step_timeout=3", "hydra.run.dir=run"))
    assert result.returncode == 1
    assert "no step has ended for 3 s (step_timeout)" in result.stderr
    assert "in item" in result.stderr  # where the main thread stands
    assert "watchdog" in result.stderr or "_watch" in result.stderr  # and the others
    succeeded(train.bare("ckpt_path=run"))


def test_out_of_memory(train, tmp_path):
    """One micro-batch whose activations are beyond the memory that the process may take."""
    limited = """
        import resource
        from mla_lm.training.module import LanguageModel
        before = LanguageModel.on_train_start
        def limit(self):
            pages = int(open("/proc/self/statm").read().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**25, resource.RLIM_INFINITY))
        LanguageModel.on_train_start = limit
    """
    result = train.finish(
        start_with(limited, train, "tokens_per_step=65536", "micro_batch_tokens=65536", "hydra.run.dir=run")
    )
    assert result.returncode == 1, result.stderr[-2000:]
    assert "out of memory with 2048 x 32 tokens at once" in result.stderr
    assert "scripts.plan says" in result.stderr
    assert "micro_batch_tokens=32768 or model.activation_checkpointing=true" in result.stderr
    assert "Traceback" not in result.stderr


# numbers that are none


def plant(monkeypatch, hook: str, steps: Collection[int], harm: Callable[[LanguageModel], None]) -> None:
    """Do harm to a run just before a hook of its module at these steps."""
    before = getattr(LanguageModel, hook)

    def planted(module: LanguageModel, *arguments: Any) -> Any:
        if module.global_step in steps:
            with torch.no_grad():
                harm(module)
        return before(module, *arguments)

    monkeypatch.setattr(LanguageModel, hook, planted)


def assert_finite(run: Path) -> None:
    for path in (run / "checkpoints").iterdir():
        state = load_checkpoint(path)
        assert all(torch.isfinite(tensor).all() for tensor in state["state_dict"].values()), path


@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
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
    assert [row["step"] for row in rows] == list(range(1, 41))
    succeeded(train.bare("ckpt_path=run", "trainer.max_steps=41"))
    assert [row["train/skipped_steps"] for row in rows_of(tmp_path / "run") if "train/loss" in row][40] == 2


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
    result = train(*ACCUMULATING, "on_nonfinite=skip", "hydra.run.dir=run")
    assert result.returncode == 1
    assert result.stderr.count("warning: a step is skipped") == 20
    assert "20 steps were skipped before it" in result.stderr
    assert_finite(tmp_path / "run")
