"""A run that was stopped and resumed ends bit-equal to one that was not: weights, optimizer, random states, losses."""

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

from mla_lm import load_run
from mla_lm.runs.checkpoint import load_checkpoint
from scripts.soak.programs import before
from scripts.soak.runs import check_same
from tests.conftest import (
    ACCUMULATING,
    ROOT,
    SMALL,
    TrainCommand,
    refused,
    rows_of,
    send_at,
    succeeded,
    summary_of,
    wait_until_stopped,
)


@pytest.fixture(scope="module")
def killed(tmp_path_factory, on_corpus) -> Path:
    """A run that was killed after step 8, in the middle of accumulating the next."""
    train = TrainCommand(tmp_path_factory.mktemp("killed"), on_corpus)
    command = (*SMALL, *on_corpus, *ACCUMULATING, "hydra.run.dir=run")
    assert train.start(*command, prepare=send_at(8, signal.SIGKILL)).wait().returncode == -signal.SIGKILL
    return train.folder / "run"


def test_after_kill(train, tmp_path, killed, uninterrupted):
    """By its folder, and by the command that began it: overrides that say what the run already is are no changes."""
    for name in ("run", "again"):
        shutil.copytree(killed, tmp_path / name)
    succeeded(train.bare("ckpt_path=run"))
    succeeded(train(*ACCUMULATING, "ckpt_path=again"))
    for name in ("run", "again"):
        check_same(tmp_path / name, uninterrupted)


def test_from_the_best_checkpoint(train, tmp_path, killed, uninterrupted):
    """best.ckpt is saved within a validation; going on from it cuts the rows after it."""
    run = Path(shutil.copytree(killed, tmp_path / "run"))
    assert load_checkpoint(run / "checkpoints" / "best.ckpt")["global_step"] < 8
    succeeded(train.bare("ckpt_path=run/checkpoints/best.ckpt"))
    assert [row["step"] for row in rows_of(run) if "train/loss" in row] == list(range(1, 17))
    check_same(run, uninterrupted)


def test_after_two_signals(train, tmp_path, uninterrupted):
    run = tmp_path / "run"
    begun = (*SMALL, *train.data, *ACCUMULATING, "hydra.run.dir=run")
    for step, signum, command in ((3, signal.SIGTERM, begun), (7, signal.SIGINT, ["ckpt_path=run"])):
        result = train.start(*command, prepare=send_at(step, signum)).wait()
        assert result.returncode == 128 + signum
        assert "python train.py ckpt_path=run" in result.stdout
        assert not summary_of(run)["finished"]
        assert summary_of(run)["steps"] == step + 1
    succeeded(train.bare("ckpt_path=run"))
    check_same(run, uninterrupted)


def test_signal_while_testing(train, tmp_path):
    """After the last step nothing is lost either, and resuming only tests."""
    run = tmp_path / "run"
    command = (*SMALL, *train.data, "micro_batch_tokens=32", "hydra.run.dir=run")
    terminate = lambda: before("test_step", lambda module: os.kill(os.getpid(), signal.SIGTERM))  # noqa: E731
    result = train.start(*command, prepare=terminate).wait()
    assert result.returncode == 143
    assert "resume      python train.py ckpt_path=run" in result.stdout
    assert not summary_of(run)["finished"]
    succeeded(train.bare(f"ckpt_path={run}"))
    assert summary_of(run)["finished"]
    assert summary_of(run)["steps"] == 6


def test_more_steps_from_a_moved_folder(train, run, tmp_path):
    """The finished run goes on where it was moved to, from another working directory; the change is recorded."""
    moved = tmp_path / "else where" / "it's"
    moved.parent.mkdir()
    run.rename(moved)
    refused(train.bare(f"ckpt_path={moved}"), "already has 6 steps", "trainer.max_steps")
    succeeded(train.bare(f"ckpt_path={moved}", "trainer.max_steps=8", "val_every_n_steps=4"))
    assert summary_of(moved)["steps"] == 8
    assert "max_steps: 8" in (moved / "config.yaml").read_text()
    assert [row["step"] for row in rows_of(moved) if "train/loss" in row] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_dollar_in_a_text(train, tmp_path):
    run = tmp_path / "run"
    succeeded(train(r"data.prompts=['echo \${HOME}']", "hydra.run.dir=run"))
    assert load_run(run)[2].data.prompts == ["echo ${HOME}"]
    succeeded(train.bare("ckpt_path=run", "trainer.max_steps=7"))
    assert load_run(run)[2].data.prompts == ["echo ${HOME}"]
    succeeded(train.bare("ckpt_path=run", "trainer.max_steps=8", r"data.prompts=['\${oc.env:HOME}']"))
    assert load_run(run)[2].data.prompts == ["${oc.env:HOME}"]


def test_two_devices(train, runs, tmp_path):
    """The same global batch over two processes gives the losses of one but for rounding, and is resumed as one is."""
    run = tmp_path / "run2"
    two = (*SMALL, *train.data, "trainer.devices=2", "micro_batch_tokens=64", "hydra.run.dir=run2")
    succeeded(train.start(*two, prepare=as_script).wait())
    a, b = ([row["train/loss"] for row in rows_of(folder) if "train/loss" in row] for folder in (run, runs / "mla"))
    assert a == pytest.approx(b, abs=1e-4)
    assert summary_of(run)["test_loss"] == pytest.approx(summary_of(runs / "mla")["test_loss"], abs=1e-4)
    succeeded(train.start(f"ckpt_path={run}", "trainer.max_steps=8", prepare=as_script).wait())
    assert summary_of(run)["steps"] == 8
    succeeded(train.bare(f"ckpt_path={run}", "trainer.max_steps=9", "trainer.devices=1"))
    assert [row["step"] for row in rows_of(run) if "train/loss" in row] == list(range(1, 10))


def as_script() -> None:
    """For Lightning, which starts the other process as this one was started."""
    sys.argv[0], sys.modules["__main__"].__spec__ = str(ROOT / "train.py"), None


def test_overfit_goes_on_with_its_batch(train, tmp_path):
    succeeded(train("trainer.overfit_batches=1", "optimizer.lr=0.01", "trainer.max_steps=40", "hydra.run.dir=run"))
    run = tmp_path / "run"
    succeeded(train.bare(f"ckpt_path={run}", "trainer.max_steps=44"))
    losses = [row["train/loss"] for row in rows_of(run) if "train/loss" in row]
    assert max(losses[40:]) < 1.2 * losses[39] < 0.5 * losses[0]
    refused(train.bare(f"ckpt_path={run}", "trainer.max_steps=50", "trainer.overfit_batches=2"), "overfit_batches=2")


def test_one_process_at_a_time(train, tmp_path):
    process = train.start(*SMALL, *train.data, "hydra.run.dir=run", prepare=send_at(1, signal.SIGSTOP))
    wait_until_stopped(process)
    refused(train("hydra.run.dir=run"), "another process is at work")
    refused(train.bare("ckpt_path=run", "trainer.max_steps=7"), "another process is at work")
    process.kill()


def test_refusals(train, run, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in sorted(run.rglob("*")) if path.is_file()}
    refused(train("hydra.run.dir=run"), "already holds a run", "ckpt_path=")
    refused(train.bare(f"ckpt_path={run}", "trainer.max_steps=9", "optimizer.lr=0.1"), "optimizer.lr=0.1")
    refused(train.bare(f"ckpt_path={run}", "model=mha_tiny"), "model.")
    refused(train.bare(f"ckpt_path={run}", "debug=limit"), "debug")
    refused(train.bare(f"ckpt_path={run}", "-m", "seed=1,2"), "-m")
    refused(train.bare(f"ckpt_path={tmp_path / 'nothing'}"), "does not exist")
    refused(train.bare(f"ckpt_path={tmp_path}"), "no run folder")
    assert before == {path: path.stat().st_mtime_ns for path in sorted(run.rglob("*")) if path.is_file()}

    more = "trainer.max_steps=9"
    last = run / "checkpoints" / "last.ckpt"
    whole = last.read_bytes()
    last.write_bytes(whole[: len(whole) // 2])
    refused(train.bare(f"ckpt_path={last}", more), "last.ckpt", "damaged")
    other = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    other["state_dict"]["norm.weight"] = torch.ones(3)
    torch.save(other, last)
    refused(train.bare(f"ckpt_path={run}", more), "another model", "norm.weight")
    last.write_bytes(whole)


def test_changed_data(train, tmp_path, corpus):
    text = Path(shutil.copy(corpus, tmp_path / "text.txt"))
    succeeded(train("data.files=text.txt", "data.tokenizer.kind=bytes", "trainer.max_steps=1", "hydra.run.dir=run"))
    text.write_text(corpus.read_text() + "more")
    refused(train.bare("ckpt_path=run", "trainer.max_steps=2"), "data have changed")
