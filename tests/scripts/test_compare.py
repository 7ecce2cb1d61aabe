"""scripts.compare on real runs: its table, its files, and what it refuses."""

import csv
import io
import itertools
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mla_lm.charts import LIGHT
from mla_lm.model.size import model_size
from mla_lm.runs.folder import RunFolder
from mla_lm.study.collect import load
from mla_lm.study.compare import Comparison
from mla_lm.study.statistics import estimate
from mla_lm.study.window_losses import window_losses
from mla_lm.terminal import cli
from scripts import compare
from tests.conftest import SHORT, SMALL, Result, TrainCommand, call_main, refused, succeeded, summary_of


@pytest.fixture(scope="module")
def runs(runs, tmp_path_factory, on_corpus) -> Path:
    """Runs of one corpus: `mla`, `mha`, and with two seeds each, `sweep` of two learning rates, `kinds` of two kinds.

    `bytes` has other tokens.
    """
    folder = tmp_path_factory.mktemp("runs")
    train = TrainCommand(folder, on_corpus)
    for kind in ("mla", "mha"):
        shutil.copytree(runs / kind, folder / kind)
    succeeded(train("data.tokenizer.kind=bytes", "hydra.run.dir=bytes"))
    grid = ("seed=1,2", "optimizer.lr=1e-3,2e-3", "trainer.max_steps=2", "hydra.sweep.dir=sweep")
    succeeded(train.bare("-m", *SMALL, *train.data, *grid))
    models = ("model=mla_tiny,mha_tiny", "model.num_layers=1", "model.seq_len=32", *SHORT, "trainer.max_steps=2")
    succeeded(train.bare("-m", *models, *train.data, "seed=1,2", "hydra.sweep.dir=kinds"))
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

    image = np.asarray(Image.open(runs / "files" / "comparison.png").convert("RGB")).astype(int)
    assert image.shape[1] > 1600
    assert (image[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all()  # white, where a page may be dark
    for name in ("series-0", "series-1"):
        rgb = [int(LIGHT[name][i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(image - rgb).max(-1) < 3).sum() > 100  # both runs are drawn


def test_report(runs):
    succeeded(run(runs, "mla", "mha", "--out", "report"))
    page = (runs / "report" / "report.html").read_text()
    assert "MLA&#39;s test loss is" in page
    assert "without a second seed there is no interval" in page
    assert (runs / "report" / "figures" / "frontier.svg").is_file()


def interval(summaries: list[dict], key: str, digits: int = 4) -> str:
    """The mean of a figure over runs and half of its interval, as the table shows it."""
    found = estimate([summary[key] for summary in summaries])
    return f"{found.mean:.{digits}f} ± {found.half_width:.{digits}f}"


def test_seeds_become_one_row_named_by_what_sets_it_apart(runs):
    result = succeeded(run(runs, "sweep", "--out", "seeds"))
    heading, *rows = cells(result.stdout)
    assert [row[0] for row in rows] == ["mla, optimizer.lr=0.001", "mla, optimizer.lr=0.002"]
    assert [row[heading.index("seeds")] for row in rows] == ["2", "2"]
    for first, row in enumerate(rows):
        jobs = [summary_of(runs / "sweep" / str(job)) for job in (first, first + 2)]  # the last key varies fastest
        assert row[heading.index("test bits/byte")] == interval(jobs, "test_bits_per_byte")
    assert "95% interval" in result.stdout
    assert "difference" not in heading  # of one kind of attention
    table = list(csv.DictReader(io.StringIO((runs / "seeds" / "comparison.csv").read_text())))
    assert [(row["seed"], row["optimizer.lr"]) for row in table] == [
        (seed, lr) for seed in ("1", "2") for lr in ("0.001", "0.002")
    ]
    losses = estimate([summary_of(runs / "sweep" / job)["test_loss"] for job in "02"])
    assert (table[0]["row"], float(table[0]["row_test_loss_low"])) == ("mla, optimizer.lr=0.001", losses.low)
    said = succeeded(run(runs, "sweep/0", "sweep/1")).stdout
    assert "each row: one seed: no interval." in said
    assert "±" not in said
    once = cells(succeeded(run(runs, "sweep/0", "sweep/0")).stdout)
    assert once[1][once[0].index("seeds")] == "1"  # named twice, there once


def test_two_kinds_have_a_paired_difference(runs):
    """Its interval covers seeds and windows, and the second comparison reads what the first has measured."""
    result = succeeded(run(runs, "kinds", "--out", "paired"))
    heading, *rows = cells(result.stdout)
    assert [row[0] for row in rows] == ["mla", "mha"]
    jobs = {kind: [RunFolder(runs / "kinds" / job) for job in names] for kind, names in (("mla", "01"), ("mha", "23"))}
    losses = {kind: [window_losses(folder).loss for folder in folders] for kind, folders in jobs.items()}
    means = {kind: sum(own) / 2 for kind, own in losses.items()}
    shown = rows[0][heading.index("difference")]
    assert re.fullmatch(r"[+-]\d\.\d{4} ± \d\.\d{4}", shown)
    assert float(shown.split()[0]) == pytest.approx(means["mla"] - means["mha"], abs=1e-4)
    tested = [summary_of(folder.path)["test_loss"] for folder in jobs["mha"]]
    percent = 100 * (means["mla"] - means["mha"]) / (sum(tested) / 2)
    assert float(rows[0][heading.index("in %")].split()[0]) == pytest.approx(percent, abs=0.02)
    assert rows[1][heading.index("difference")] == "-"
    assert "The difference of mla is in test loss to mha" in result.stdout
    with open(runs / "paired" / "comparison.csv", newline="") as file:
        table = list(csv.DictReader(file))
    low, mean, high = (float(table[0][f"row_difference{end}"]) for end in ("_low", "", "_high"))
    assert low < mean < high
    over_seeds = estimate([a - b for a, b in zip(losses["mla"], losses["mha"], strict=True)])
    assert high - low > over_seeds.high - over_seeds.low
    assert {row["row_baseline"] for row in table} == {"mha", ""}
    for folders in jobs.values():
        for folder in folders:
            (folder.path / "checkpoints" / "best.ckpt").touch()
            assert (folder.path / "test_windows.safetensors").is_file()
    assert succeeded(run(runs, "kinds")).stdout == result.stdout


def test_what_takes_a_while_is_measured_when_asked(runs, tmp_path):
    """A row whose data may not be opened says so, and has what needs no data."""
    for kind in ("mla", "mha"):
        shutil.copytree(runs / kind, tmp_path / kind)
    (tmp_path / "mha" / "origin").unlink()
    comparison = Comparison([load(RunFolder(tmp_path / kind)) for kind in ("mla", "mha")], "command")
    comparison.add_measurements()
    mla, mha = comparison.result.rows
    assert (len(mla.position), len(mha.position)) == (32, 0)
    assert len(mla.samples) == 1
    assert "not made here by you" in mha.notes[-1]
    for row in (mla, mha):
        contexts = [at.context for at in row.decoding]
        assert contexts == sorted(contexts)
        assert row.decoding[-1].cache_bytes == contexts[-1] * row.figures["cache_bytes_per_token"]


def test_measure_fills_the_report(runs, tmp_path):
    shutil.copytree(runs / "mla", tmp_path / "mla")
    refused(run(tmp_path, "mla", "--measure"), "--out DIR")
    for folder, more in (("plain", ()), ("measured", ("--measure",))):
        succeeded(run(tmp_path, "mla", "--out", folder, *more))
        assert (tmp_path / folder / "figures" / "decoding.svg").exists() == bool(more)
    (row,) = csv.DictReader(io.StringIO((tmp_path / "measured" / "report.csv").read_text()))
    assert float(row["decoding"]) > 0


def test_one_seed_of_each_kind_has_a_difference_without_an_interval(runs):
    result = succeeded(run(runs, "mla", "mha"))
    heading, *rows = cells(result.stdout)
    difference = summary_of(runs / "mla")["test_loss"] - summary_of(runs / "mha")["test_loss"]
    assert rows[0][heading.index("difference")] == f"{difference:+.4f}"
    assert "each row: one seed: no interval." in result.stdout
    assert "Its 95% interval" not in result.stdout
    assert not (runs / "mla" / "test_windows.safetensors").exists()  # which takes its time


def test_unfinished_runs_are_marked_and_left_out(runs, tmp_path):
    """Of a sweep: one is stopped, one was killed before it wrote a summary, one is of a row that has no other."""
    sweep = Path(shutil.copytree(runs / "sweep", tmp_path / "sweep"))
    (sweep / "2" / "summary.json").write_text(json.dumps({**summary_of(sweep / "2"), "finished": False}))
    for job in "13":
        (sweep / job / "summary.json").unlink()
    result = succeeded(run(tmp_path, "sweep", "--out", "out"))
    heading, *rows = cells(result.stdout)
    assert [row[heading.index("seeds")] for row in rows] == ["1"]
    assert rows[0][heading.index("val bits/byte")] == f"{summary_of(sweep / '0')['val_bits_per_byte']:.4f}"
    lines = result.stdout.splitlines()
    assert "mla: 1 of 2 runs is unfinished and left out." in lines
    left_out = [line for line in lines if line.startswith("left out: ")]
    assert (
        f"left out: {sweep / '2'} has not finished: python train.py ckpt_path={sweep / '2'} goes on with it" in left_out
    )
    assert len(left_out) == 3
    assert all(line in (tmp_path / "out" / "comparison.md").read_text() for line in left_out)
    with open(tmp_path / "out" / "comparison.csv", newline="") as file:
        assert [row["finished"] for row in csv.DictReader(file)] == ["True", "False", "False", "False"]
    (sweep / "0" / "summary.json").unlink()
    refused(run(tmp_path, "sweep"), str(sweep / "0"), "no summary.json")  # none has finished


def test_an_unknown_kind(runs, tmp_path):
    """As of a run that a later version of this repository made."""
    later = Path(shutil.copytree(runs / "mla", tmp_path / "later"))
    (later / "config.yaml").write_text((later / "config.yaml").read_text().replace("kind: mla", "kind: mlb"))
    (later / "summary.json").write_text(json.dumps({**summary_of(later), "attention": "mlb"}))
    refused(run(tmp_path, str(runs / "mha"), "later"), "mlb", "mla", str(later))


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
    refused(run(runs), "RUN", "required")
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


def test_without_the_plotting_library(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vl_convert", None)  # as Python itself marks what cannot be imported
    succeeded(run(runs, "mla"))
    refused(run(runs, "mla", "--out", str(tmp_path / "out")), "vl-convert-python", "pip install")
    assert not (tmp_path / "out").exists()
