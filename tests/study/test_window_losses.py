"""Test losses of a run by window and position: what they are, and when they are measured again."""

import shutil

import numpy as np
import pytest
import torch

from mla_lm import UserError, load_run
from mla_lm.data.tokenizer import end_of_text_id, token_bytes
from mla_lm.data.windows import EvaluationWindows
from mla_lm.inference.evaluate import sums_over
from mla_lm.inference.texts import tokens_of_split
from mla_lm.runs.folder import RunFolder
from mla_lm.study.window_losses import measure, window_losses
from tests.conftest import summary_of

NAME = "test_windows.safetensors"


def test_they_sum_to_the_figures_of_the_run(run):
    losses, summary = window_losses(RunFolder(run)), summary_of(run)
    assert losses.loss == pytest.approx(summary["test_loss"], rel=1e-6)
    bits = losses.nats.sum() / np.log(2) / losses.text_bytes.sum()
    assert bits == pytest.approx(summary["test_bits_per_byte"], rel=1e-6)
    loaded = load_run(run)
    tokens = tokens_of_split(str(run), "test", loaded.tokenizer, loaded.config)
    assert losses.tokens.sum() == len(tokens) - 1
    assert (losses.tokens[:-1] == 32).all()
    sums = sums_over(loaded.model, EvaluationWindows(tokens, 32), torch.from_numpy(token_bytes(loaded.tokenizer)), 8)
    assert losses.position_nats == pytest.approx(sums[0].numpy(), rel=1e-5)
    assert (losses.position_tokens == sums[1].numpy()).all()


def test_windows_know_their_document(run):
    """A window that begins with the end-of-text token predicts the document after it."""
    loaded = load_run(run)
    end = end_of_text_id(loaded.tokenizer)
    tokens = np.full(5 * 32 + 1, 7)
    tokens[[3, 64, 100]] = end
    assert measure(loaded, tokens, "cpu").documents.tolist() == [0, 1, 2, 2, 3]
    tokens[:] = 7
    assert measure(loaded, tokens, "cpu").documents.tolist() == [0] * 5


def test_they_are_kept(run):
    first = window_losses(RunFolder(run))
    kept = run / NAME
    before = kept.stat().st_mtime_ns
    again = window_losses(RunFolder(run))
    assert kept.stat().st_mtime_ns == before
    assert all((one == other).all() for one, other in zip(first, again, strict=True))


def test_another_checkpoint_is_measured_anew(run):
    first = window_losses(RunFolder(run))
    best = run / "checkpoints" / "best.ckpt"
    checkpoint = torch.load(best)
    checkpoint["state_dict"]["embedding.weight"] *= 1.1
    torch.save(checkpoint, best)
    assert window_losses(RunFolder(run)).loss != pytest.approx(first.loss, rel=1e-6)


def test_a_damaged_file_is_measured_anew(run):
    first = window_losses(RunFolder(run))
    content = (run / NAME).read_bytes()
    for damaged in (
        content[:-8],
        content[: len(content) // 2],
        b"",
        b"\xff" * 100,
        content.replace(b"tokens", b"tokenz"),
    ):
        (run / NAME).write_bytes(damaged)
        assert (window_losses(RunFolder(run)).nats == first.nats).all()
        assert (run / NAME).read_bytes() == content


def test_a_folder_that_cannot_be_written_is_measured_each_time(run, capsys):
    (run / NAME).mkdir()
    (run / NAME / "something").touch()
    losses = window_losses(RunFolder(run))
    assert losses.loss == pytest.approx(summary_of(run)["test_loss"], rel=1e-6)
    assert f"{NAME} cannot be written" in capsys.readouterr().err


def test_what_cannot_be_measured(run):
    (run / "origin").unlink()
    with pytest.raises(UserError, match="not made here by you"):
        window_losses(RunFolder(run))
    assert window_losses(RunFolder(run), trusted=True).tokens.sum() > 0
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="no checkpoint"):
        window_losses(RunFolder(run))
