"""Runs with trainer.fp8=true: their loss beside bf16, and that they resume, evaluate and export like any other."""

import json
import shutil
import signal
from pathlib import Path

import pytest

from mla_lm.runs.checkpoint import load_checkpoint
from mla_lm.terminal import cli
from scripts import evaluate, export
from scripts.soak.runs import check_same
from tests.conftest import ACCUMULATING, SMALL, TrainCommand, call_main, rows_of, send_at, succeeded, summary_of

BF16 = ("trainer.precision=bf16-mixed", "model.activation_checkpointing=true")
FP8 = (*BF16, "trainer.fp8=true")


def losses_of(run: Path) -> list[float]:
    return [row["train/loss"] for row in rows_of(run) if "train/loss" in row]


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_the_loss_beside_bf16(train, tmp_path, optimizer):
    """Over 60 steps, in which it falls by more than a nat: at each step within 0.1 of that in bf16."""
    long = (f"optimizer={optimizer}", "schedule=cosine", "trainer.max_steps=60", "val_every_n_steps=60")
    succeeded(train(*BF16, *long, "hydra.run.dir=bf16"))
    said = succeeded(train(*FP8, *long, "hydra.run.dir=fp8")).stdout
    assert "fp8         products of the blocks' matrices in training, all but attention.kv_down, whose sizes" in said
    assert "a CPU only imitates it, which is slow" in said
    expected, found = losses_of(tmp_path / "bf16"), losses_of(tmp_path / "fp8")
    assert expected[-1] < expected[0] - 1
    assert found != expected
    assert found == pytest.approx(expected, abs=0.1)
    plain, in_fp8 = (load_checkpoint(tmp_path / run / "checkpoints/best.ckpt")["state_dict"] for run in ("bf16", "fp8"))
    kinds = [{name: (tensor.shape, tensor.dtype) for name, tensor in state.items()} for state in (plain, in_fp8)]
    assert kinds[0] == kinds[1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, on_corpus) -> Path:
    """A finished run in fp8, with micro-batches, dropout and short windows. Read only."""
    train = TrainCommand(tmp_path_factory.mktemp("whole"), on_corpus)
    succeeded(train(*ACCUMULATING, *FP8, "hydra.run.dir=run"))
    return train.folder / "run"


def test_resumed_it_ends_as_if_it_had_not_stopped(train, tmp_path, whole):
    command = (*SMALL, *train.data, *ACCUMULATING, *FP8, "hydra.run.dir=run")
    assert train.start(*command, prepare=send_at(8, signal.SIGKILL)).wait().returncode == -signal.SIGKILL
    succeeded(train.bare("ckpt_path=run"))
    check_same(tmp_path / "run", whole)


def test_it_goes_on_without_fp8(train, tmp_path, whole):
    shutil.copytree(whole, tmp_path / "run")
    assert "imitates" not in succeeded(train.bare("ckpt_path=run", "trainer.fp8=false", "trainer.max_steps=18")).stdout


def test_it_is_evaluated_and_exported_in_bf16(tmp_path, whole):
    arguments = ["scripts.evaluate", str(whole), "--json", "out.json"]
    succeeded(call_main(lambda: cli.run(evaluate.main), arguments, tmp_path))
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["loss"] == pytest.approx(summary_of(whole)["test_loss"], rel=1e-6)
    assert summary_of(whole)["precision"] == "bf16-mixed"
    pytest.importorskip("transformers")
    checked = call_main(lambda: cli.run(export.main), ["scripts.export", str(whole), "out", "--check"], tmp_path)
    assert "the same 16 greedy tokens" in succeeded(checked).stdout
