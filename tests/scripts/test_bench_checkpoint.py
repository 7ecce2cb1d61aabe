"""scripts.bench checkpoint: its figures are of a file that holds the state."""

import argparse
import json

import torch

from mla_lm.runs.checkpoint import load_checkpoint
from mla_lm.terminal import cli
from scripts.bench import __main__ as bench
from scripts.bench.checkpoint import Training
from scripts.plan import composed
from tests.conftest import call_main, succeeded


def test_table(tmp_path):
    arguments = ["checkpoint", "--repeats", "1", "--models", "mla_tiny", "--tokens", "8", "--json", "out.json"]
    result = call_main(lambda: cli.run(bench.main), ["scripts.bench", *arguments], tmp_path)
    assert "mla_tiny" in succeeded(result).stdout
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert row["file MiB"] * 2**20 > 2 * 4 * row["parameters"]  # fp32 weights, one moment of Muon or two of AdamW
    assert row["held up, synchronous s"] > 0 < row["ours is on disk after s"]
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_both_save_the_state_before_the_steps(tmp_path):
    args = argparse.Namespace(device="cpu", tokens=8)
    training = Training(composed(["model=mla_tiny", "model.vocab_size=50"]), args, tmp_path / "a.ckpt")
    for how in ("synchronous", "ours"):
        before = {name: tensor.clone() for name, tensor in training.net.state_dict().items()}
        training.round(2, how)
        saved = load_checkpoint(training.path)["state_dict"]
        torch.testing.assert_close(dict(saved), before, rtol=0, atol=0)
        assert not torch.equal(saved["norm.weight"], training.net.norm.weight)
