"""scripts.export on runs as train.py leaves them, and its mistakes."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mla_lm import AttentionConfig, load_run
from mla_lm.inference.texts import tokens_of_split
from mla_lm.interop.hf.check import compare_with_transformers
from mla_lm.terminal import cli
from scripts import export
from tests.conftest import Result, call_main, refused, succeeded, summary_of
from tests.interop.hf.models import make_run, tensors

MLA = AttentionConfig(kind="mla", kv_compressed_dim=16, rope_dim=4)


def call(folder, *arguments: str) -> Result:
    return call_main(lambda: cli.run(export.main), ["scripts.export", *arguments], folder)


def test_a_trained_run(run, tmp_path):
    """transformers finds the loss that the run measured on its test split."""
    result = succeeded(call(tmp_path, "run", "out"))
    for engine in ("transformers  yes", "vLLM          no", "SGLang        no", "llama.cpp     no"):
        assert engine in result.stdout
    summary = summary_of(run)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| bits per byte, test | {summary['test_bits_per_byte']:.4f} |" in card
    assert summary["data_fingerprint"] in card
    assert str(tmp_path) not in card

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    _, tokenizer, config = load_run(run)
    ids = torch.from_numpy(tokens_of_split(run, "test", tokenizer, config)[:].astype("int64"))
    nats = 0.0
    with torch.no_grad():
        for window in (ids[start : start + 33] for start in range(0, len(ids) - 1, 32)):
            logits = model(window[None, :-1]).logits[0]
            nats += F.cross_entropy(logits, window[1:], reduction="sum").item()
    assert nats / (len(ids) - 1) == pytest.approx(summary["test_loss"], abs=1e-4)

    succeeded(call(tmp_path, "run/checkpoints/last.ckpt", "last"))  # which is not the one that was tested
    assert "| bits per byte, test | not measured |" in (tmp_path / "last" / "README.md").read_text()


def test_dtype(tmp_path):
    make_run(tmp_path / "run", MLA)
    assert "bfloat16" in succeeded(call(tmp_path, "run", "out", "--dtype", "bfloat16")).stdout
    assert {tensor.dtype for tensor in tensors(tmp_path / "out").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    refused(call(tmp_path, "run", "other", "--dtype", "fp8"), "fp8", "bfloat16")


def test_not_a_run(tmp_path):
    refused(call(tmp_path, "nothing", "out"), "nothing", "does not exist")
    refused(call(tmp_path, ".", "out"), "no run folder")
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_a_checkpoint(tmp_path):
    make_run(tmp_path / "run", MLA)
    (tmp_path / "run" / "checkpoints" / "best.ckpt").unlink()
    refused(call(tmp_path, "run", "out"), "last.ckpt")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["file.txt", "folder", "run"])
def test_where_something_is_already(tmp_path, name):
    make_run(tmp_path / "run", MLA)
    (tmp_path / "file.txt").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    refused(call(tmp_path, "run", name), name, "not empty")
    assert sorted(tmp_path.rglob("*")) == before


def test_where_nothing_can_be_written(tmp_path):
    make_run(tmp_path / "run", MLA)
    (tmp_path / "file.txt").write_text("mine")
    refused(call(tmp_path, "run", "file.txt/out"), "file.txt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.txt", "run"]


def test_check(runs, tmp_path):
    """It says that another process agrees, and fails where one does not."""
    result = succeeded(call(tmp_path, str(runs / "mla"), "out", "--check"))
    assert "DeepseekV3ForCausalLM has loss " in result.stdout
    assert "the same 16 greedy tokens" in result.stdout
    weights = load_file(tmp_path / "out" / "model.safetensors")
    weights["model.norm.weight"] *= 1.1
    save_file(weights, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    windows = torch.randint(257, (2, 33), generator=torch.Generator().manual_seed(1))
    assert not compare_with_transformers(load_run(runs / "mla")[0], tmp_path / "out", windows)[0]
    refused(call(tmp_path, str(runs / "mla"), "short", "--check", "--dtype", "bfloat16"), "--check", "fp32")


def test_biases_that_deepseek_has_not(tmp_path):
    make_run(tmp_path / "run", MLA, use_bias=True)
    refused(call(tmp_path, "run", "out"), "model.use_bias=true", "DeepseekV3")
    assert not (tmp_path / "out").exists()


def test_a_converted_model(tmp_path):
    attention = AttentionConfig(
        kind="mla", kv_compressed_dim=16, rope_dim=4, latent_norm=False, rope_frequencies=[1.0, 0.1]
    )
    make_run(tmp_path / "run", attention)
    refused(call(tmp_path, "run", "out"), "RoPE frequencies of its own", "--plain-rope")
