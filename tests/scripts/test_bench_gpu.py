"""scripts.bench gpu, loss and attention at tiny sizes: contenders do the same work, every step leaves its figures."""

import json

import pytest

from mla_lm.terminal import cli
from scripts.bench import __main__ as bench
from scripts.bench import gpu
from tests.conftest import Result, call_main, refused, succeeded


def call(folder, *arguments: str) -> Result:
    return call_main(lambda: cli.run(bench.main), ["bench", *arguments], folder)


def test_the_loss_of_every_contender_is_the_same(tmp_path):
    sizes = ("--tokens=100", "--d-model=16", "--vocab-size=70", "--repeats=1", "--precision=32-true")
    succeeded(call(tmp_path, "loss", *sizes, "--json=out.json"))
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["who"] for row in rows][:2] == ["ours", "plain"]
    assert all(row["loss"] == pytest.approx(rows[0]["loss"], rel=1e-6) for row in rows)
    assert all(row["ms"] > 0 for row in rows)


def test_attention_by_every_kernel_is_the_same(tmp_path):
    sizes = ("--sequences=2", "--seq-len=40", "--repeats=1", "--precision=32-true")
    succeeded(call(tmp_path, "attention", *sizes, "--json=out.json"))
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert {row["model"] for row in rows} == {"small", "medium", "serving"}
    assert {"ours", "math", "math, narrow"} <= {row["kernel"] for row in rows if row["model"] == "serving"}
    assert all(row["largest difference"] < 1e-5 and row["ms"] > 0 for row in rows)


def test_every_step_leaves_its_figures_and_the_report_has_their_tables(tmp_path):
    result = succeeded(call(tmp_path, "gpu", "--tiny", "--only=checks,loss", "--out=out", "--json=all.json"))
    written = json.loads((tmp_path / "all.json").read_text())
    assert [(row["step"], row["ended"]) for row in written["rows"]] == [("checks", "well"), ("loss", "well")]
    assert written["steps"]["checks"] is None
    assert written["steps"]["loss"]["rows"][0]["who"] == "ours"
    report = (tmp_path / "out" / "report.md").read_text()
    assert "needs a CUDA device" in report  # the end of the output of the checks
    assert "| who " in report
    assert "loss: -m scripts.bench loss" in result.stdout


def test_a_step_that_fails_stops_no_other(tmp_path, monkeypatch):
    fails = gpu.Step("fails", ["python", "-c", "raise SystemExit(3)"])
    works = gpu.Step("works", ["python", "-c", "print('it works')"])
    monkeypatch.setattr(gpu, "steps_of", lambda args: [fails, works])
    succeeded(call(tmp_path, "gpu", "--out=out", "--json=all.json"))
    rows = json.loads((tmp_path / "all.json").read_text())["rows"]
    assert [row["ended"] for row in rows] == ["with status 3", "well"]
    assert "it works" in (tmp_path / "out" / "report.md").read_text()


def test_time_runs_out(tmp_path):
    endless = gpu.Step("endless", ["python", "-c", "import time; time.sleep(60)"])
    assert gpu.run_step(endless, tmp_path, seconds=1.0)["ended"] == "stopped"
    assert gpu.run_step(endless, tmp_path, seconds=0.0)["ended"] == "no time left"


def test_an_unknown_step(tmp_path):
    refused(call(tmp_path, "gpu", "--only=chekcs"), "no step chekcs", "checks, default_run")
    assert not (tmp_path / "bench_gpu").exists()
