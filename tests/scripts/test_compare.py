"""scripts.compare on real runs: its table, its files, and what it refuses."""

import csv
import io
import itertools
import re
import shutil
import sys
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import pytest
from matplotlib.image import imread

from mla_lm.model.size import model_size
from mla_lm.runs.folder import RunFolder
from mla_lm.terminal import cli
from scripts import compare
from tests.conftest import SMALL, Result, TrainCommand, call_main, refused, succeeded, summary_of


@pytest.fixture(scope="module")
def runs(runs, tmp_path_factory, on_corpus) -> Path:
    """Runs of one corpus, `mla`, `mha` and, of two learning rates and two seeds, `sweep`; `bytes` has other tokens."""
    folder = tmp_path_factory.mktemp("runs")
    train = TrainCommand(folder, on_corpus)
    for kind in ("mla", "mha"):
        shutil.copytree(runs / kind, folder / kind)
    succeeded(train("data.tokenizer.kind=bytes", "hydra.run.dir=bytes"))
    grid = ("seed=1,2", "optimizer.lr=1e-3,2e-3", "trainer.max_steps=2", "hydra.sweep.dir=sweep")
    succeeded(train.bare("-m", *SMALL, *train.data, *grid))
    return folder


def run(folder: Path, *arguments: str) -> Result:
    return call_main(lambda: cli.run(compare.main), ["compare", *arguments], folder)


def cells(output: str) -> list[list[str]]:
    """Of the rows of the table in what is printed."""
    lines = output.splitlines()
    table = itertools.takewhile(bool, lines[next(n for n, line in enumerate(lines) if line.startswith("run ")) :])
    return [re.split("  +", line) for line in table]


def markdown_cells(text: str) -> list[list[str]]:
    """Of the rows of a table in Markdown, without the rule."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return [rows[0], *rows[2:]]


def test_table(runs):
    result = succeeded(run(runs, "mla", "mha", "--out", "out"))
    heading, *rows = cells(result.stdout)
    assert [row[0] for row in rows] == ["mla", "mha"]
    for row in rows:
        summary, shown = summary_of(runs / row[0]), dict(zip(heading, row, strict=True))
        flops = model_size(RunFolder(runs / row[0]).config().model).flops_per_token
        assert shown["attention"] == row[0]
        assert shown["FLOPs/token"] == f"{flops / 1e6:.1f}M"
        for stage in ("val", "test"):
            assert shown[f"{stage} ppl"] == f"{summary[f'{stage}_perplexity']:.2f}"
            assert shown[f"{stage} bits/byte"] == f"{summary[f'{stage}_bits_per_byte']:.4f}"
        assert shown["vs MHA"] == f"{summary['kv_cache_vs_mha']:.3f}"
    assert markdown_cells((runs / "out" / "comparison.md").read_text()) == [heading, *rows]
    assert "seen different numbers of tokens" not in result.stdout


def test_runs_of_other_lengths_are_called_so(runs):
    assert "seen different numbers of tokens" in succeeded(run(runs, "mla", "sweep/0")).stdout


def test_csv_and_plot_of_every_run(runs):
    succeeded(run(runs, "mla", "mha", "--out", "files"))
    with open(runs / "files" / "comparison.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [Path(row["run"]).name for row in rows] == ["mla", "mha"]
    for row in rows:
        config = RunFolder(Path(row["run"])).config()
        assert float(row["test_loss"]) == summary_of(Path(row["run"]))["test_loss"]
        assert float(row["flops_per_token"]) == model_size(config.model).flops_per_token
    assert [row["model.attention.kv_compressed_dim"] for row in rows] == ["16", "null"]

    image = imread(runs / "files" / "comparison.png")
    assert image.shape[1] == 1650
    assert (image[[0, 0, -1, -1], [0, -1, 0, -1]] == 1).all()  # white, where a page may be dark
    for colour in ("#0072B2", "#D55E00"):
        rgb = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert (np.abs(image[..., :3] - rgb).max(-1) < 0.01).sum() > 100  # both runs are drawn


def test_seeds_become_one_row_named_by_what_sets_it_apart(runs):
    heading, *rows = cells(succeeded(run(runs, "sweep", "--out", "seeds")).stdout)
    assert [row[0] for row in rows] == ["0 (2 seeds), optimizer.lr=0.001", "1 (2 seeds), optimizer.lr=0.002"]
    for first, row in enumerate(rows):
        jobs = [summary_of(runs / "sweep" / str(job)) for job in (first, first + 2)]  # the last key varies fastest
        values = [job["test_bits_per_byte"] for job in jobs]
        assert row[heading.index("test bits/byte")] == f"{mean(values):.4f} ± {stdev(values):.4f}"
    table = csv.DictReader(io.StringIO((runs / "seeds" / "comparison.csv").read_text()))
    assert [(row["seed"], row["optimizer.lr"]) for row in table] == [
        (seed, lr) for seed in ("1", "2") for lr in ("0.001", "0.002")
    ]
    assert "seed" not in succeeded(run(runs, "sweep/0", "sweep/1")).stdout
    assert "run" not in "".join(cells(succeeded(run(runs, "sweep/0", "sweep/0")).stdout)[1])  # named twice, there once


def test_across_data(runs):
    refused(run(runs, "mla", "bytes"), "different corpora or tokenizers", "--across-data")
    result = succeeded(run(runs, "mla", "bytes", "--across-data", "--out", "across"))
    heading, *rows = cells(result.stdout)
    assert [row[0] for row in rows] == ["mla, data.tokenizer.kind=bpe", "bytes, data.tokenizer.kind=bytes"]
    assert "differ in data.tokenizer.kind." in result.stdout.splitlines()[0]
    assert not [name for name in heading if "ppl" in name]
    for name, row in zip(("mla", "bytes"), rows, strict=True):
        for stage in ("val", "test"):
            assert (
                row[heading.index(f"{stage} bits/byte")] == f"{summary_of(runs / name)[f'{stage}_bits_per_byte']:.4f}"
            )
    written = (runs / "across" / "comparison.md").read_text()
    assert markdown_cells(written) == [heading, *rows]
    assert written.splitlines()[0] == result.stdout.splitlines()[0]
    assert (runs / "across" / "comparison.png").stat().st_size > 10_000


def test_refuses(runs):
    refused(run(runs, "mla", "missing"), "missing")
    (runs / "empty").mkdir()
    refused(run(runs, "empty"), "no run folder")
    (runs / "file").touch()
    refused(run(runs, "mla", "--out", "file"), "file")


def test_an_unfinished_run(runs, tmp_path):
    shutil.copy(runs / "mla" / "config.yaml", tmp_path)
    refused(run(tmp_path, "."), "no summary.json", "converted", "scripts.evaluate", "ckpt_path=")
    (tmp_path / "summary.json").write_text('{"finished": false}')
    refused(run(tmp_path, "."), "not finished", f"ckpt_path={tmp_path}")


def test_damaged_metrics(runs, tmp_path):
    shutil.copytree(runs / "mla", tmp_path / "run")
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": ')
    succeeded(run(tmp_path, "run"))
    refused(run(tmp_path, "run", "--out", "out"), "metrics.jsonl", "damaged")


def test_without_matplotlib(runs, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "mla_lm.study.plot")
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as Python itself marks what cannot be imported
    succeeded(run(runs, "mla"))
    refused(run(runs, "mla", "--out", str(tmp_path / "out")), "matplotlib", "pip install")
    assert not (tmp_path / "out").exists()
