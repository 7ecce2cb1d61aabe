"""scripts.bench crossover: what it concludes from times, and that it times two paths that agree."""

import json
from dataclasses import replace

import pytest
import torch

from mla_lm import MLA
from mla_lm.terminal import cli
from scripts.bench import __main__ as bench
from scripts.bench import crossover, decode
from tests.conftest import call_main, succeeded


def layer_of(context: int) -> MLA:
    torch.manual_seed(0)
    return MLA(replace(decode.MLA, seq_len=context + crossover.MOST_QUERIES).layer_config()).eval()


def test_where_the_layer_goes_over_and_what_that_loses():
    layer = layer_of(1024)
    seconds = {2**i: (2.0**i, 512.0) for i in range(11)}  # absorbed and decompressed: equal at 512 new tokens
    first = next(count for count in seconds if not layer.absorbing_is_cheaper(count, 1024 + count))
    assert first < 512
    figures = crossover.crossing(layer, 1024, seconds)
    assert figures == {"decompresses from": first, "faster from": 1024, "time lost": 512 / first - 1, "at": first}


@torch.no_grad()
def test_it_leaves_the_choice_to_the_layer_again():
    layer = layer_of(64)
    assert min(crossover.both_paths(layer, 4, 64, 1, "cpu")) > 0
    assert layer.absorbing_is_cheaper.__func__ is MLA.absorbing_is_cheaper


def test_rows_and_seconds(tmp_path, monkeypatch):
    monkeypatch.setattr(crossover, "LAST", 2)
    arguments = ("--context", "5,70", "--precision", "fp32", "--repeats", "1", "--json", "out.json")
    succeeded(call_main(lambda: cli.run(bench.main), ["bench", "crossover", *arguments], tmp_path))
    figures = json.loads((tmp_path / "out.json").read_text())
    assert [row["context"] for row in figures["rows"]] == [5, 70]
    assert all(row["time lost"] >= 0 for row in figures["rows"])
    assert list(figures["seconds"][0]["absorbed and decompressed"]) == ["1", "2", "4"]


def test_figures_name_no_crossing_that_there_is_not():
    figures = crossover.crossing(layer_of(1024), 1024, {1: (1.0, 2.0), 2: (1.0, 2.0)})
    assert figures == {"decompresses from": None, "faster from": None, "time lost": 0.0, "at": 1}


@pytest.mark.parametrize("context", [64, 1024])
def test_one_new_token_is_absorbed(context):
    assert layer_of(context).absorbing_is_cheaper(1, context + 1)
