"""What a comparison compares with what, and how its table shows it."""

from pathlib import Path

import pytest

from mla_lm.config import TrainConfig
from mla_lm.model.config import AttentionConfig, TransformerConfig
from mla_lm.runs.folder import RunFolder
from mla_lm.study.collect import Run
from mla_lm.study.compare import baselines, cells_of, in_percent, remarks
from mla_lm.study.result import Estimate, Result, Row
from mla_lm.study.statistics import estimate
from mla_lm.terminal.plain_text import joined


def a_run(kind: str, val_loss: float = 3.0, tokens: int = 1000, text: str = "text", **sizes) -> list[Run]:
    """A row of one."""
    attention = AttentionConfig(kind=kind, kv_compressed_dim=64 if kind == "mla" else None, rope_dim=16)
    figures = {"val_loss": val_loss, "tokens_seen": tokens, "data_fingerprint": text}
    return [Run(RunFolder(Path("/runs")), TrainConfig(model=TransformerConfig(attention=attention, **sizes)), figures)]


def test_the_baseline_is_mha_of_the_same_size_tokens_and_data():
    assert baselines({"a": a_run("mla"), "b": a_run("mha"), "c": a_run("gqa")}) == {"a": "b", "c": "b"}
    for other in ({"tokens": 2000}, {"text": "another"}, {"d_model": 512}, {"num_layers": 8}, {"seq_len": 512}):
        assert baselines({"a": a_run("mla"), "b": a_run("mha", **other)}) == {}
    both = {"a": a_run("mla"), "b": a_run("mla", d_model=512), "c": a_run("mha"), "d": a_run("mha", d_model=512)}
    assert baselines(both) == {"a": "c", "b": "d"}


def test_of_several_mha_the_best_validation_is_the_baseline():
    rows = {"a": a_run("mha", 3.2), "b": a_run("mla"), "c": a_run("mha", 3.1)}
    assert baselines(rows) == {"a": "c", "b": "c"}


def test_without_mha_the_first_is_the_baseline_of_other_kinds():
    assert baselines({"a": a_run("gqa"), "b": a_run("mla")}) == {"b": "a"}
    assert baselines({"a": a_run("mla"), "b": a_run("mla", 3.1)}) == {}
    assert baselines({"a": a_run("mla")}) == {}


def a_row(name: str, losses: list[float], **more) -> Row:
    figures = {"parameters": 1000, "tokens_seen": 2000, "flops_per_token": 3e6}
    return Row(name, "mla", "4 x 192", [], list(range(len(losses))), figures, {"test_loss": estimate(losses)}, **more)


def test_an_estimate_is_shown_with_half_its_interval():
    base = a_row("mha", [4.0, 4.0])
    row = a_row("mla", [3.9, 3.8], difference=Estimate([-0.1, -0.2], -0.15, -0.25, -0.05), baseline="mha")
    one = a_row("gqa", [4.1], difference=Estimate([0.1], 0.1), baseline="mha", notes=["one seed: no interval"])
    result = Result("title", "command", "date", [base, row, one], failed=["/runs/3 has not finished"])
    heading, *rows = cells_of(result, across_data=False)
    shown = {cells[0]: dict(zip(heading, cells, strict=True)) for cells in rows}
    assert {name: cells["difference"] for name, cells in shown.items()} == {
        "mha": "-", "mla": "-0.1500 ± 0.1000", "gqa": "+0.1000",
    }  # fmt: skip
    assert {name: cells["in %"] for name, cells in shown.items()} == {"mha": "-", "mla": "-3.75 ± 2.50", "gqa": "+2.50"}
    assert [cells["seeds"] for cells in shown.values()] == ["2", "2", "1"]
    assert in_percent(row, result).low == pytest.approx(-6.25)
    said = remarks(result, across_data=False)
    assert said[0].startswith("± is half the width of the 95% interval")
    assert said[1].startswith("The difference of mla and gqa is in test loss to mha")
    assert said[2:] == ["gqa: one seed: no interval.", "left out: /runs/3 has not finished"]
    assert "difference" not in cells_of(result, across_data=True)[0]
    assert "difference" not in cells_of(Result("", "", "", [base]), across_data=False)[0]


def test_joined():
    assert [joined(list("abc"[:count])) for count in (1, 2, 3)] == ["a", "a and b", "a, b and c"]
