"""Loss by position, and a context that is extended by YaRN."""

import json

import torch
import yaml

from mla_lm import load_run
from mla_lm.inference.evaluate import losses, position_table, ranges
from tests.conftest import refused, succeeded, summary_of


def test_ranges_cover_every_position_once():
    for length in (1, 2, 3, 64, 100):
        assert [p for start, end in ranges(length) for p in range(start, end)] == list(range(length))


def test_table_weighs_by_tokens():
    sums = torch.tensor([[2.0, 9.0, 8.0, 0.0], [1.0, 3.0, 4.0, 0.0], [4.0, 12.0, 16.0, 0.0]])
    assert losses(sums) == [2.0, 3.0, 2.0, None]
    lines = [line.split() for line in position_table({"a": sums, "b": 2 * sums}).splitlines()]
    assert lines == [
        ["position", "tokens", "a", "b"],
        ["0", "1", "2.0000", "2.0000"],
        ["1", "3", "3.0000", "3.0000"],
        ["2-3", "4", "2.0000", "2.0000"],
    ]


def test_extend_context(train, tmp_path):
    """Four times the run's context, with the loss by position before and after."""
    succeeded(train("trainer.max_steps=30", "optimizer.lr=3e-3", "hydra.run.dir=short"))
    data = [override for override in train.data if not override.startswith("data.tokenizer")]
    common = (*data, "trainer.accelerator=cpu", "trainer.precision=32-true", "logger=none", "tokens_per_step=512")
    extend = ("experiment=extend_context", "init_from=short", "trainer.max_steps=4", "hydra.run.dir=long")
    result = succeeded(train.bare(*common, "compile=false", "samples.max_tokens=0", *extend))
    run = tmp_path / "long"
    config = yaml.safe_load((run / "config.yaml").read_text())["model"]
    assert (config["seq_len"], config["attention"]["yarn"]["factor"]) == (128, 4.0)
    measured = {
        name: torch.tensor(sums) for name, sums in json.loads((run / "loss_by_position.json").read_text()).items()
    }
    assert list(measured) == ["before, plain RoPE", "before", "after"]
    assert all(sums.shape == (3, 128) for sums in measured.values())
    nats, tokens, _ = measured["after"].sum(-1).tolist()
    assert abs(nats / tokens - summary_of(run)["val_loss"]) < 1e-5
    assert "before, plain RoPE" in result.stdout
    assert (run / "loss_by_position.png").read_bytes().startswith(b"\x89PNG")
    # the window's first token sees itself alone, wherever YaRN has moved the others
    torch.testing.assert_close(measured["before"][0, 0], measured["before, plain RoPE"][0, 0])
    assert not torch.equal(measured["before"][0], measured["before, plain RoPE"][0])
    with torch.no_grad():
        assert load_run(run)[0](torch.zeros(1, 128, dtype=torch.long)).shape == (1, 128, 300)

    again = ("experiment=extend_context", "init_from=long", "trainer.max_steps=1", "hydra.run.dir=longer")
    refused(train.bare(*common, *again), "yarn.factor=4.0", "16.0 is 4.0 times")
    refused(train.bare("ckpt_path=long", "experiment=extend_context"), "experiment", "ckpt_path")
