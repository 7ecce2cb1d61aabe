"""scripts.compare on real runs: its table, its files, and what it refuses."""

import csv
import io
import itertools
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

from mla_lm.config import TrainConfig, TrainerConfig
from mla_lm.model.config import AttentionConfig, TransformerConfig
from mla_lm.model.size import model_size
from mla_lm.optim.optimizer import OptimizerConfig
from mla_lm.runs.folder import RunFolder
from mla_lm.study import plot
from mla_lm.study.compare import Run, named_rows
from mla_lm.terminal import cli
from scripts import compare
from tests.conftest import SMALL, Result, TrainCommand, call_main, refused, rows_of, succeeded, summary_of


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


def names(*configs: TrainConfig) -> list[str]:
    """Of the rows of runs in folders a, b, c, ..."""
    folders = "abcdef"[: len(configs)]
    groups = [
        [Run(RunFolder(Path("/runs") / folder), config, {})] for folder, config in zip(folders, configs, strict=True)
    ]
    return list(named_rows(groups))


def mla(kv_compressed_dim: int, **sizes: int) -> TrainConfig:
    return TrainConfig(
        model=TransformerConfig(
            attention=AttentionConfig(kind="mla", kv_compressed_dim=kv_compressed_dim, rope_dim=16), **sizes
        )
    )


def test_names_leave_out_what_columns_tell():
    mha = TrainConfig(model=TransformerConfig(ff_hidden=688), trainer=TrainerConfig(max_steps=7), seed=3)
    assert names(mla(64), mha) == ["a", "b"]
    assert names(mla(64), mla(64, d_model=512, ff_hidden=900)) == ["a, model.d_model=256", "b, model.d_model=512"]
    key = "model.attention.kv_compressed_dim"
    assert names(mla(64), mla(80), mha) == [f"a, {key}=64", f"b, {key}=80", "c"]
    rates = [replace(config, optimizer=OptimizerConfig(lr=lr)) for config in (mla(64), mha) for lr in (1e-3, 3e-4)]
    assert names(*rates) == [f"{name}, optimizer.lr={lr}" for name, lr in zip("abcd", [0.001, 0.0003] * 2, strict=True)]


def test_names_of_long_values_keep_their_ends():
    paths = [f"/home/someone/projects/language/models/{name}" for name in ("first", "second")]
    for path, name in zip(paths, names(*(TrainConfig(init_from=path) for path in paths)), strict=True):
        value = name.partition("=")[2]
        assert len(value) == 40
        assert value.startswith("...")
        assert path.endswith(value[3:])


def test_folders_of_one_name_are_named_with_the_one_above():
    runs = [Run(RunFolder(Path(f"/runs/{sweep}/0")), TrainConfig(), {}) for sweep in ("first", "second")]
    assert list(named_rows([[run] for run in runs])) == ["first/0", "second/0"]
    assert list(named_rows([runs])) == ["0 (2 runs)"]  # of the same seed


def test_curve_and_point_are_mean_and_deviation_over_seeds(runs):
    folders = [RunFolder(runs / "sweep" / job) for job in ("0", "2")]
    axes = Figure().subplots()
    plot.draw_curve(axes, "label", folders, "bits_per_byte", "black")
    validated = [[row for row in rows_of(folder.path) if "val/loss" in row] for folder in folders]
    (tokens, values) = axes.lines[0].get_data()
    assert list(tokens) == [row["tokens"] for row in validated[0]]
    pairs = [[row["val/bits_per_byte"] for row in rows] for rows in zip(*validated, strict=True)]
    assert list(values) == pytest.approx([mean(pair) for pair in pairs])
    band = axes.collections[0].get_paths()[0].get_extents()
    assert band.y1 == pytest.approx(max(mean(pair) + stdev(pair) for pair in pairs))

    x, y, error = plot.point(folders, "loss")
    losses = [summary_of(folder.path)["test_loss"] for folder in folders]
    assert (x, y, error) == (summary_of(runs / "mla")["kv_cache_bytes_per_token"], mean(losses), stdev(losses))


def test_seeds_validated_at_other_steps_share_the_steps_they_have(runs, tmp_path):
    shutil.copytree(runs / "mla", tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines(keepends=True)
    validated = [line for line in lines if "val/loss" in line]
    assert len(validated) == 2
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(line for line in lines if line != validated[0]))
    axes = Figure().subplots()
    plot.draw_curve(axes, "label", [RunFolder(runs / "mla"), RunFolder(tmp_path / "run")], "loss", "black")
    assert list(axes.lines[0].get_xdata()) == [6 * 256]


@settings(max_examples=15)
@given(points=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 30)), min_size=2, max_size=9))
def test_labels_of_points_do_not_overlap(points):
    axes = Figure(figsize=(5, 4)).subplots()
    axes.scatter([x for x, _ in points], [y for _, y in points])
    plot.label_points(axes, [f"mla {i}" for i in range(len(points))], [(x, y, 0.0) for x, y in points])
    axes.figure.draw_without_rendering()  # puts the names where they are to be
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # without the lines to the points
    assert not [i for i, box in enumerate(boxes) if box.count_overlaps(boxes[:i])]


def test_a_legend_does_not_say_twice_what_attention_a_row_has(runs, monkeypatch):
    labels, draw = [], plot.draw_curve

    def watched(axes, label, *row) -> None:
        labels.append(label)
        draw(axes, label, *row)

    monkeypatch.setattr(plot, "draw_curve", watched)
    folders = [RunFolder(runs / "mla"), RunFolder(runs / "mla")]
    plot.plot({"mla (2 seeds)": folders, "0, optimizer.lr=0.001": [RunFolder(runs / "mha")]}, "loss")
    assert labels == ["mla (2 seeds)", "mha: 0, optimizer.lr=0.001"]


def test_as_many_colours_as_rows():
    for count in (1, 7, 8, 40):
        assert len(set(plot.colours(count))) == count
