"""A run that was stopped and resumed ends bit-equal to one that was not: weights, optimizer, random states, losses."""

import signal
import time
from pathlib import Path

import pytest
import torch

from mla_lm import load_run
from tests.conftest import SMALL, TrainCommand, refused, rows_of, succeeded, summary_of

# Micro-batches of two windows: every step accumulates four of them. Dropout draws random numbers.
ACCUMULATING = ("micro_batch_tokens=64", "model.dropout=0.1", "trainer.max_steps=40")


def start_run(train: TrainCommand, *overrides: str):
    return train.start(*SMALL, *train.data, *ACCUMULATING, *overrides)


def wait_for_step(run: Path, step: int, process) -> None:
    """Until metrics.jsonl has a row of that step."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (run / "metrics.jsonl").is_file() and (run / "metrics.jsonl").read_text().count('"train/loss"') >= step:
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} was never reached: {process.communicate()}")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, corpus) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    data = ("data=text", f"data.files={corpus}", "data.tokenizer.vocab_size=300", "data.val_tokens=512")
    train = TrainCommand(folder, (*data, f"data.cache_dir={corpus.parent / 'cache'}"))
    succeeded(train(*ACCUMULATING, "hydra.run.dir=run"))
    return folder / "run"


def assert_same(run: Path, uninterrupted: Path) -> None:
    """Bit-equal checkpoints, and the same row for every step."""
    for name in ("last.ckpt", "best.ckpt"):
        a, b = (torch.load(folder / "checkpoints" / name, weights_only=True) for folder in (run, uninterrupted))
        assert a["global_step"] == b["global_step"]
        torch.testing.assert_close(a["state_dict"], b["state_dict"], rtol=0, atol=0)
        torch.testing.assert_close(a["optimizer_states"], b["optimizer_states"], rtol=0, atol=0)
        assert torch.equal(a["random_state"], b["random_state"])
    measured = ("seconds", "memory/peak_mib", "train/tokens_per_second", "train/mfu")
    a, b = ([{k: v for k, v in row.items() if k not in measured} for row in rows_of(f)] for f in (run, uninterrupted))
    assert a == b
    assert summary_of(run)["test_loss"] == summary_of(uninterrupted)["test_loss"]


def test_after_kill(train, tmp_path, uninterrupted):
    run = tmp_path / "run"
    process = start_run(train, "hydra.run.dir=run")
    wait_for_step(run, 5, process)  # in the middle of a pass over the data, past the checkpoint of step 4
    process.kill()
    process.communicate()
    succeeded(train.bare(f"ckpt_path={run}"))
    assert_same(run, uninterrupted)


def test_after_two_signals(train, tmp_path, uninterrupted):
    run = tmp_path / "run"
    for step, signum, status in ((3, signal.SIGTERM, 143), (7, signal.SIGINT, 130)):
        process = start_run(train, "hydra.run.dir=run") if step == 3 else train.start(f"ckpt_path={run}")
        wait_for_step(run, step, process)
        process.send_signal(signum)
        result = train.finish(process)
        assert result.returncode == status
        assert f"python train.py ckpt_path={run.name}" in result.stdout
        summary = summary_of(run)
        assert not summary["finished"]
        assert step <= summary["steps"] < 40
    succeeded(train.bare(f"ckpt_path={run}"))
    assert_same(run, uninterrupted)


def test_signal_while_testing(train, tmp_path):
    """After the last step nothing is lost either, and resuming only tests."""
    run = tmp_path / "run"
    process = start_run(train, "hydra.run.dir=run", "trainer.max_steps=4", "micro_batch_tokens=32")
    deadline = time.monotonic() + 120
    while not ((run / "checkpoints" / "last.ckpt").is_file() and rows_of(run)[-1].get("val/loss") and saved(run) == 4):
        assert time.monotonic() < deadline
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    result = train.finish(process)
    assert result.returncode == 143
    assert f"resume      python train.py ckpt_path={run.name}" in result.stdout
    assert not summary_of(run)["finished"]
    succeeded(train.bare(f"ckpt_path={run}"))
    assert summary_of(run)["finished"]
    assert summary_of(run)["steps"] == 4


def saved(run: Path) -> int:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]


def test_from_the_best_checkpoint(train, tmp_path, uninterrupted):
    """best.ckpt is saved within a validation; going on from it cuts the rows after it."""
    run = tmp_path / "run"
    process = start_run(train, "hydra.run.dir=run")
    wait_for_step(run, 8, process)
    process.kill()
    process.communicate()
    succeeded(train.bare(f"ckpt_path={run / 'checkpoints' / 'best.ckpt'}"))
    steps = [row["step"] for row in rows_of(run) if "train/loss" in row]
    assert steps == list(range(1, 41))
    last = [torch.load(f / "checkpoints" / "last.ckpt", weights_only=True) for f in (run, uninterrupted)]
    torch.testing.assert_close(last[0]["state_dict"], last[1]["state_dict"], rtol=0, atol=0)


def test_more_steps_from_a_moved_folder(train, tmp_path):
    """The finished run goes on where it was moved to, from another working directory; the change is recorded."""
    succeeded(train("hydra.run.dir=run"))
    moved = tmp_path / "else where" / "it's"
    moved.parent.mkdir()
    (tmp_path / "run").rename(moved)
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


def test_the_same_command_again_resumes(train, tmp_path, uninterrupted):
    """Overrides that say what the run already is are no changes."""
    run = tmp_path / "run"
    process = start_run(train, "hydra.run.dir=run")
    wait_for_step(run, 4, process)
    process.kill()
    process.communicate()
    succeeded(train(*ACCUMULATING, f"ckpt_path={run}"))
    assert_same(run, uninterrupted)


def test_two_devices(train, tmp_path):
    """The same global batch over two processes gives the losses of one but for rounding, and is resumed as one is."""
    for devices in (1, 2):
        options = (f"trainer.devices={devices}", "micro_batch_tokens=64", f"hydra.run.dir=run{devices}")
        succeeded(train.finish(train.start(*SMALL, *train.data, *options)))
    run = tmp_path / "run2"
    a, b = ([row["train/loss"] for row in rows_of(tmp_path / f"run{n}") if "train/loss" in row] for n in (1, 2))
    assert a == pytest.approx(b, abs=1e-4)
    assert summary_of(run)["test_loss"] == pytest.approx(summary_of(tmp_path / "run1")["test_loss"], abs=1e-4)
    succeeded(train.finish(train.start(f"ckpt_path={run}", "trainer.max_steps=8")))
    assert summary_of(run)["steps"] == 8
    succeeded(train.bare(f"ckpt_path={run}", "trainer.max_steps=9", "trainer.devices=1"))
    assert [row["step"] for row in rows_of(run) if "train/loss" in row] == list(range(1, 10))


def test_overfit_goes_on_with_its_batch(train, tmp_path):
    succeeded(train("trainer.overfit_batches=1", "optimizer.lr=0.01", "trainer.max_steps=40", "hydra.run.dir=run"))
    run = tmp_path / "run"
    succeeded(train.bare(f"ckpt_path={run}", "trainer.max_steps=44"))
    losses = [row["train/loss"] for row in rows_of(run) if "train/loss" in row]
    assert max(losses[40:]) < 1.2 * losses[39] < 0.5 * losses[0]
    refused(train.bare(f"ckpt_path={run}", "trainer.max_steps=50", "trainer.overfit_batches=2"), "overfit_batches=2")


def test_one_process_at_a_time(train, tmp_path):
    process = start_run(train, "hydra.run.dir=run", "trainer.max_steps=100000")
    wait_for_step(tmp_path / "run", 1, process)
    refused(train("hydra.run.dir=run"), "another process is at work")
    refused(train.bare(f"ckpt_path={tmp_path / 'run'}", "trainer.max_steps=200000"), "another process is at work")
    process.terminate()
    assert train.finish(process).returncode == 143


def test_refusals(train, tmp_path, corpus):
    run = tmp_path / "run"
    succeeded(train("hydra.run.dir=run"))
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
    text = corpus.read_text()
    try:
        corpus.write_text(text + "more")
        refused(train.bare(f"ckpt_path={run}", more), "data have changed")
    finally:
        corpus.write_text(text)
