"""A checkpoint is written while training goes on: it holds the state as it was, whole, and no error is lost."""

import copy
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn

from mla_lm.config import TrainConfig
from mla_lm.runs.checkpoint import load_checkpoint
from mla_lm.runs.folder import RunFolder
from mla_lm.training.background_save import BackgroundCheckpointIO
from mla_lm.training.callbacks import Metrics
from mla_lm.training.checkpointing import Checkpoints
from tests.conftest import ROOT, refused


def assert_equal(a, b) -> None:
    assert a.keys() == b.keys()
    torch.testing.assert_close(dict(a), dict(b), rtol=0, atol=0)


def test_the_file_holds_what_was_saved_though_training_goes_on(tmp_path):
    """Weights, moments, step counters and lists change while the file, a large one, is being written."""
    large = torch.ones(50_000_000)
    net = nn.Linear(500, 500)
    optimizer = torch.optim.AdamW(net.parameters())
    rates = [1.0]
    io = BackgroundCheckpointIO()

    def step() -> None:
        net(torch.ones(1, 500)).sum().backward()
        io.wait_until_copied()
        optimizer.step()
        large[::1_000_000] += 1
        rates.append(2.0)

    step()
    for name in ("first.ckpt", "second.ckpt"):  # the second into the memory of the first
        state = {"large": large, "state_dict": net.state_dict(), "optimizer": optimizer.state_dict(), "rates": rates}
        expected = copy.deepcopy(state)
        io.save(state, [tmp_path / name])
        step()
        assert not io.written.done()
        assert not (tmp_path / name).exists()
        step()
        io.wait()
        assert_equal(load_checkpoint(tmp_path / name), expected)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="the threads of a process are read off Linux's /proc")
def test_saving_starts_one_thread_and_no_workers_for_it(tmp_path):
    """More OpenMP workers than cores slow down every parallel operation of the process, for good."""
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        (large := torch.ones(5_000_000)).add_(1)  # the main thread has its workers from here on
        before = len(os.listdir("/proc/self/task"))
        io = BackgroundCheckpointIO()
        io.save({"large": large}, [tmp_path / "a.ckpt"])
        io.wait()
        assert len(os.listdir("/proc/self/task")) == before + 1
    finally:
        torch.set_num_threads(threads)


def test_keeps_every_kind_of_tensor_and_what_is_shared(tmp_path):
    table = torch.randn(300, 100)
    state = {
        "state_dict": {"embedding": table, "head": table, "part": table[:10], "columns": table[:, ::2]},
        "bf16": [torch.randn(3).bfloat16(), (torch.tensor(4), torch.empty(0))],
        "parameter": nn.Parameter(torch.ones(2)),
        "words": {"epoch": 1, "name": "x", "none": None},
    }
    io = BackgroundCheckpointIO()
    io.save(state, [tmp_path / "a.ckpt"])
    io.wait()
    there = load_checkpoint(tmp_path / "a.ckpt")
    assert there["words"] == state["words"]
    assert_equal(there["state_dict"], state["state_dict"])
    assert there["state_dict"]["embedding"].data_ptr() == there["state_dict"]["head"].data_ptr()
    torch.testing.assert_close(there["bf16"], state["bf16"], rtol=0, atol=0)
    assert torch.equal(there["parameter"], torch.ones(2))


def test_a_save_waits_for_the_one_before(tmp_path):
    io = BackgroundCheckpointIO()
    first, second = ({"state_dict": {"w": torch.full((5_000_000,), float(number))}} for number in (1, 2))
    io.save(first, [tmp_path / "best.ckpt", tmp_path / "last.ckpt"])
    io.save(second, [tmp_path / "last.ckpt"])
    assert_equal(load_checkpoint(tmp_path / "best.ckpt")["state_dict"], first["state_dict"])
    io.teardown()
    assert_equal(load_checkpoint(tmp_path / "last.ckpt")["state_dict"], second["state_dict"])
    assert not io.memory


def test_a_save_that_fails_keeps_no_other_from_being_tried(tmp_path):
    """Neither the next file of the same save, nor the next save; what failed is told once, in the system's words."""
    (tmp_path / "file").touch()
    blocked, later = tmp_path / "file" / "best.ckpt", tmp_path / "last.ckpt"
    first, second = ({"state_dict": {"w": torch.full((3,), float(number))}} for number in (1, 2))
    io = BackgroundCheckpointIO()
    io.save(first, [blocked, later])
    failures = io.wait()
    assert list(failures) == [blocked]
    assert str(failures[blocked]) == f"{blocked} cannot be written: File exists"
    assert_equal(load_checkpoint(later)["state_dict"], first["state_dict"])
    assert io.wait() is io.failures() is None
    io.save(first, [blocked])
    io.save(second, [later])
    assert io.wait() == {}
    assert_equal(load_checkpoint(later)["state_dict"], second["state_dict"])
    io.save(first, [blocked])
    io.teardown()
    assert list(io.wait()) == [blocked]


def test_a_full_disk_is_told_in_the_words_of_the_system(tmp_path):
    """torch puts what a file raises into words of its own."""
    io = BackgroundCheckpointIO()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, before[1]))
    try:
        io.save({"state_dict": {"w": torch.ones(10**6)}}, [tmp_path / "last.ckpt"])
        (error,) = io.wait().values()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(error) == f"{tmp_path / 'last.ckpt'} cannot be written: File too large"
    assert not list(tmp_path.iterdir())


def test_the_last_versions_are_kept(tmp_path):
    io = BackgroundCheckpointIO(keep_last=3)
    for number in range(5):
        io.save({"state_dict": {}, "number": number}, [tmp_path / "last.ckpt", tmp_path / "best.ckpt"])
    io.wait()
    numbers = {path.name: load_checkpoint(path)["number"] for path in tmp_path.iterdir()}
    assert numbers == {"last.ckpt": 4, "last-1.ckpt": 3, "last-2.ckpt": 2, "best.ckpt": 4}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_not_finite_is_never_saved(tmp_path, bad, dtype):
    """Neither weights nor moments; the name of the first is told, and the files before it stay."""
    io = BackgroundCheckpointIO()
    state = {"state_dict": {"w": torch.ones(2**20 + 3, dtype=dtype)}, "optimizer_states": [{"state": {0: {}}}]}
    state["optimizer_states"][0]["state"][0] = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(0)}
    io.save(state, [tmp_path / "last.ckpt"])
    assert io.wait() == {}
    before = (tmp_path / "last.ckpt").read_bytes()
    state["state_dict"]["w"][-1] = bad
    io.save(state, [tmp_path / "best.ckpt", tmp_path / "last.ckpt"])
    failures = io.wait()
    assert list(failures) == [tmp_path / "best.ckpt", tmp_path / "last.ckpt"]
    assert "state_dict.w has a number that is not finite" in str(failures[tmp_path / "best.ckpt"])
    assert (tmp_path / "last.ckpt").read_bytes() == before
    assert not (tmp_path / "best.ckpt").exists()


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from mla_lm.training.background_save import BackgroundCheckpointIO

path, io = Path(sys.argv[1]), BackgroundCheckpointIO()
io.save({"state_dict": {"w": torch.zeros(3)}}, [path])
io.wait()
io.save({"state_dict": {"w": torch.ones(100_000_000)}}, [path])
while not any(os.path.getsize(f.path) > 2**20 for f in os.scandir(path.parent)):
    pass
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.e2e
def test_killed_while_it_writes_the_file_is_the_one_before(tmp_path):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "last.ckpt")], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    assert any(file.stat().st_size > 2**20 for file in tmp_path.iterdir())  # it was writing
    assert torch.equal(load_checkpoint(tmp_path / "last.ckpt")["state_dict"]["w"], torch.zeros(3))


class Counter(L.LightningModule):
    """A weight that every step raises by one; a large one, which never changes, is copied before it."""

    automatic_optimization = False

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.zeros(n), n == 1) for n in (50_000_000, 1)])

    def configure_optimizers(self):
        return torch.optim.SGD(self.weights[1:], lr=1.0)

    def training_step(self, batch, batch_idx):
        self.weights[1].grad = torch.tensor([-1.0])
        self.optimizers().step()

    def stop_if_diverged(self):
        pass


def test_the_optimizer_waits_for_the_copy(tmp_path):
    config = TrainConfig()
    config.trainer.max_steps, config.checkpoint.every_n_steps, config.val_every_n_steps = 3, 2, 1000
    run = RunFolder(tmp_path)
    checkpoints = Checkpoints(run, config, Metrics(config, 1.0, 1.0))
    trainer = L.Trainer(
        accelerator="cpu", max_steps=3, callbacks=[checkpoints], plugins=[checkpoints.io], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = Counter()
    trainer.fit(module, torch.utils.data.DataLoader(torch.zeros(3, 1)))
    assert module.weights[1] == 3
    assert load_checkpoint(run.last)["state_dict"]["weights.1"] == 2


def test_a_run_says_that_it_could_not_save(train, tmp_path):
    """No file may grow beyond a limit that the checkpoint does not keep to, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, before[1]))
    try:
        result = train("hydra.run.dir=run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    refused(result, "last.ckpt cannot be written")
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_from_a_gpu(tmp_path):
    weight = torch.ones(10_000_000, device="cuda")
    io = BackgroundCheckpointIO()
    io.save({"state_dict": {"weight": weight}}, [tmp_path / "a.ckpt"])
    weight.add_(1)
    io.wait()
    assert torch.equal(load_checkpoint(tmp_path / "a.ckpt")["state_dict"]["weight"], torch.ones(10_000_000))
