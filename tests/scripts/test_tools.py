"""scripts.evaluate and scripts.compare on real runs."""

import csv
import json
from pathlib import Path

import pytest

from mla_lm import cli
from scripts import compare, evaluate
from tests.conftest import Result, TrainCommand, call_main, refused, succeeded, summary_of


@pytest.fixture(scope="module")
def runs(tmp_path_factory, corpus) -> Path:
    """Two runs of one corpus, `mla` and `mha`, and one with another tokenizer, `bytes`."""
    folder = tmp_path_factory.mktemp("runs")
    data = ("data=text", f"data.files={corpus}", "data.val_tokens=512", f"data.cache_dir={corpus.parent / 'cache'}")
    train = TrainCommand(folder, data)
    plain = [f"model.attention.{name}=null" for name in ("kv_compressed_dim", "rope_dim", "nope_dim", "value_dim")]
    succeeded(train("data.tokenizer.vocab_size=300", "hydra.run.dir=mla"))
    succeeded(train("data.tokenizer.vocab_size=300", *plain, "hydra.run.dir=mha"))
    succeeded(train("data.tokenizer.kind=bytes", "hydra.run.dir=bytes"))
    return folder


def tool(module, runs: Path, *arguments: str) -> Result:
    return call_main(lambda: cli.run(module.main), [module.__name__, *arguments], runs)


def test_evaluate_gives_the_figures_of_the_summary(runs):
    succeeded(tool(evaluate, runs, "mla", "--json", "out.json"))
    figures, summary = json.loads((runs / "out.json").read_text()), summary_of(runs / "mla")
    for name in ("loss", "perplexity", "bits_per_byte"):
        assert figures[name] == pytest.approx(summary[f"test_{name}"], rel=1e-6)


def test_evaluate_files(runs):
    """A text twice as long, as two files, costs twice the bits: about the same bits per byte."""
    text = "def main():\n    return None\n" * 40
    for name in ("one.txt", "two.txt"):
        (runs / name).write_text(text)
    succeeded(tool(evaluate, runs, "mla", "--files", "one.txt", "--json", "once.json"))
    succeeded(tool(evaluate, runs, "mla", "--files", "???.txt", "--json", "both.json"))
    once, both = (json.loads((runs / f"{name}.json").read_text()) for name in ("once", "both"))
    assert both["tokens"] == 2 * once["tokens"] + 1  # the first token of all is predicted by nothing
    assert both["bits_per_byte"] == pytest.approx(once["bits_per_byte"], rel=0.02)
    refused(tool(evaluate, runs, "mla", "--files", "missing-*.txt"), "missing-*.txt")


def test_compare(runs):
    result = succeeded(tool(compare, runs, "mla", "mha", "--out", "table"))
    mla, mha = summary_of(runs / "mla"), summary_of(runs / "mha")
    for summary in (mla, mha):
        assert f"{summary['test_bits_per_byte']:.4f}" in result.stdout
    assert (runs / "table" / "comparison.md").read_text() == result.stdout
    with open(runs / "table" / "comparison.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [Path(row["run"]).name for row in rows] == ["mla", "mha"]
    assert float(rows[0]["test_loss"]) == mla["test_loss"]


def test_compare_refuses(runs):
    refused(tool(compare, runs, "mla", "bytes"), "different corpora or tokenizers")
    refused(tool(compare, runs, "mla", "missing"), "missing")
    unfinished = runs / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.yaml").write_text((runs / "mla" / "config.yaml").read_text())
    refused(tool(compare, runs, "unfinished"), "not finished", "ckpt_path=")
