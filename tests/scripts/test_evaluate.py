"""scripts.evaluate on a real run."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mla_lm import load_run
from mla_lm.data.tokenizer import encode
from mla_lm.terminal import cli
from scripts import evaluate
from tests.conftest import Result, call_main, refused, succeeded, summary_of

SEQ_LEN = 32  # of the run


@pytest.fixture(scope="module")
def folder(runs, tmp_path_factory) -> Path:
    """With a run, `run`."""
    folder = tmp_path_factory.mktemp("evaluate")
    shutil.copytree(runs / "mla", folder / "run")
    return folder


def run(folder: Path, *arguments: str) -> Result:
    return call_main(lambda: cli.run(evaluate.main), ["evaluate", "run", *arguments], folder)


def figures_of(folder: Path, *arguments: str) -> dict:
    succeeded(run(folder, *arguments, "--json", "out.json"))
    return json.loads((folder / "out.json").read_text())


def test_gives_the_figures_of_the_summary(folder):
    figures, summary = figures_of(folder), summary_of(folder / "run")
    for name in ("loss", "perplexity", "bits_per_byte"):
        assert figures[name] == pytest.approx(summary[f"test_{name}"], rel=1e-6)


def test_files(folder):
    """A text twice as long, as two files, costs twice the bits: about the same bits per byte."""
    text = "def main():\n    return None\n" * 40
    for name in ("one.txt", "two.txt"):
        (folder / name).write_text(text)
    once, both = figures_of(folder, "--files", "one.txt"), figures_of(folder, "--files", "???.txt")
    assert both["tokens"] == 2 * once["tokens"] + 1  # the first token of all is predicted by nothing
    assert both["bits_per_byte"] == pytest.approx(once["bits_per_byte"], rel=0.02)
    refused(run(folder, "--files", "missing-*.txt"), "--files=missing-*.txt")


def test_stride(folder):
    (folder / "text.txt").write_text("class Window:\n    def slide(self):\n" * 20)
    plain, same, narrow = (
        figures_of(folder, "--files", "text.txt", *stride) for stride in ([], ["--stride", "32"], ["--stride", "5"])
    )
    assert plain == same
    assert plain["stride"] == SEQ_LEN
    assert narrow["tokens"] == plain["tokens"]
    assert narrow["loss"] != plain["loss"]


def test_through_the_cache(folder):
    plain, fp32, int8 = (figures_of(folder, *cache) for cache in ([], ["--cache", "fp32"], ["--cache", "int8"]))
    assert fp32["loss"] == pytest.approx(plain["loss"], rel=1e-6)
    assert int8["loss"] != fp32["loss"]
    assert int8["loss"] == pytest.approx(plain["loss"], rel=1e-3)
    # 2 layers of 16 + 4 elements; in int8 with two scales of 2 bytes
    assert (fp32["kv_cache_bytes_per_token"], int8["kv_cache_bytes_per_token"]) == (2 * 20 * 4, 2 * (20 + 4))
    assert "kv_cache_bytes_per_token  48" in run(folder, "--cache", "int8").stdout
    refused(run(folder, "--cache", "int4"), "--cache", "int4", "int8")


@pytest.mark.parametrize("stride", ["0", "33", "-1"])
def test_stride_beyond_the_window(folder, stride):
    refused(run(folder, f"--stride={stride}"), f"--stride {stride} ", "seq_len=32")


def test_stride_that_is_no_number(folder):
    refused(run(folder, "--stride=half"), "--stride", "half")


def window_losses(folder: Path, text: str) -> Tensor:
    """Loss of each target of the first window."""
    model, tokenizer, _ = load_run(folder / "run")
    ids = torch.tensor(encode(tokenizer, text)[: SEQ_LEN + 1])
    return F.cross_entropy(model(ids[None, :-1])[0], ids[1:], reduction="none").detach()


def test_by_position(folder):
    text = "import os\nimport sys\n" * 40
    (folder / "imports.txt").write_text(text)
    figures = figures_of(folder, "--files", "imports.txt", "--by-position")
    losses, tokens = figures["loss_by_position"], figures["tokens_by_position"]
    assert len(losses) == len(tokens) == SEQ_LEN
    assert sum(tokens) == figures["tokens"]
    assert max(tokens) - min(tokens) <= 1  # of the last window, some positions
    total = sum(loss * count for loss, count in zip(losses, tokens, strict=True))
    assert total / figures["tokens"] == pytest.approx(figures["loss"])

    lines = run(folder, "--files", "imports.txt", "--by-position").stdout.splitlines()
    table = [line.split() for line in lines[lines.index("") + 2 :]]
    assert [row[0] for row in table] == ["0", "1", "2-3", "4-7", "8-15", "16-31"]
    assert sum(int(row[1].replace(",", "")) for row in table) == figures["tokens"]
    middle = sum(loss * count for loss, count in zip(losses[4:8], tokens[4:8], strict=True)) / sum(tokens[4:8])
    assert table[3][2] == f"{middle:.4f}"


def test_by_position_with_stride(folder):
    """Only the first window has targets before its last ones; what has none has no loss."""
    text = "raise ValueError('no')\n" * 40
    (folder / "raise.txt").write_text(text)
    figures = figures_of(folder, "--files", "raise.txt", "--by-position", "--stride", "8")
    tokens, first = figures["tokens_by_position"], window_losses(folder, text)
    assert tokens[:24] == [1] * 24
    assert min(tokens[24:]) > 1
    assert sum(tokens) == figures["tokens"]
    assert figures["loss_by_position"][:24] == pytest.approx(first[:24].tolist(), rel=1e-4)

    (folder / "short.txt").write_text("raise")
    short = figures_of(folder, "--files", "short.txt", "--by-position")
    count = short["tokens"]
    assert 0 < count < 8
    assert short["tokens_by_position"] == [1] * count + [0] * (SEQ_LEN - count)
    assert short["loss_by_position"][count:] == [None] * (SEQ_LEN - count)


def test_a_missing_column_is_told_in_the_words_of_this_tool(folder):
    (folder / "rows.jsonl").write_text('{"body": "some text", "title": "t"}\n')
    result = run(folder, "--files", "rows.jsonl")
    refused(result, "rows.jsonl", "--column", "body, title")
    assert "data.column" not in result.stderr
    assert figures_of(folder, "--files", "rows.jsonl", "--column", "body")["tokens"] > 0


def test_a_format_that_is_not_read(folder):
    (folder / "table.csv").write_text("a,b\n")
    result = run(folder, "--files", "table.csv")
    refused(result, "table.csv", "--files takes")


def test_help_warns_of_code_in_tasks(folder):
    assert "can run Python code (`!function`)" in " ".join(succeeded(run(folder, "--help")).stdout.split())


def test_nothing_to_predict(folder):
    (folder / "end.jsonl").write_text('{"text": null}\n{"text": null}\n')
    refused(run(folder, "--files", "end.jsonl"), "end.jsonl", "no text to predict")
