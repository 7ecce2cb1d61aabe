"""scripts.study with real runs: to its end, stopped and gone on with, with a job that fails, through a launcher."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from mla_lm.study.declaration import StudyConfig
from mla_lm.study.decoding import CONTEXTS
from mla_lm.terminal import cli
from scripts import study
from tests.conftest import ROOT, SHORT, SIZES, TWO_KINDS, Result, call_main, refused, rows_of, succeeded, summary_of

RATES = "tuning.learning_rates=[1e-3]"
TINY = (*SIZES, *(setting for setting in SHORT if not setting.startswith("trainer.max_steps=")), "tokens=1536")
TINY_STUDY = (*TWO_KINDS, RATES, *TINY)


def run(folder: Path, *arguments: str) -> Result:
    return call_main(lambda: cli.run(study.main, StudyConfig), ["scripts.study", *arguments], folder)


def lines_of(result: Result, word: str) -> list[str]:
    return [line for line in result.stdout.splitlines() if line.startswith(f"{word} ")]


def runs_in(folder: Path) -> set[str]:
    return {str(path.parent.relative_to(folder / "runs")) for path in folder.glob("runs/*/*/config.yaml")}


def statuses(folder: Path) -> dict[str, str]:
    rows = json.loads((folder / "manifest.json").read_text())["rows"]
    return {run["folder"].removeprefix("runs/"): run["status"] for row in rows for run in row["runs"]}


def test_it_says_what_it_would_run(tmp_path, on_corpus):
    command = (
        "smoke",
        *TINY_STUDY,
        *on_corpus,
        "tuning.learning_rates=[1e-3,2e-3,4e-3]",
        "tuning.most=5",
        "processes=2",
        "--plan",
    )
    result = succeeded(run(tmp_path, *command))
    assert lines_of(result, "runs")[0].startswith("runs        10 of 2 rows, 0 of them done; up to 4 more")
    assert lines_of(result, "tokens") == ["tokens      15,360"]
    assert "2 runs at once on cpu in 32-true, 1 thread each" in lines_of(result, "machine")[0]
    assert "matrix product measured now" in lines_of(result, "time")[0]
    assert not any(tmp_path.iterdir())


def test_a_study_stops_and_goes_on(tmp_path, on_corpus):
    """A signal stops all runs at a step, saved; the same command goes on, and what cannot run stops no other."""
    command = (*TINY_STUDY, *on_corpus, "tokens=51200", "log_every_n_steps=1", "processes=1", "--out", "out")
    words = [sys.executable, "-m", "scripts.study", "smoke", *command]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    first = tmp_path / "out" / "runs" / "mla_tiny" / "lr0.001-seed1"
    while not (first / "checkpoints" / "last.ckpt").is_file():
        with suppress(subprocess.TimeoutExpired):
            pytest.fail(f"ended with status {process.wait(timeout=0.1)}")
    refused(run(tmp_path, "smoke", *command), "another process is at work")
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert "go on       python -m scripts.study smoke" in printed
    assert runs_in(tmp_path / "out") == {"mla_tiny/lr0.001-seed1"}
    assert not summary_of(first)["finished"]
    assert set(statuses(tmp_path / "out").values()) == {"missing"}
    begun = rows_of(first)[0]

    spoiled = tmp_path / "out" / "runs" / "mha_tiny" / "lr0.001-seed2"
    spoiled.mkdir(parents=True)
    (spoiled / "tokenizer.json").write_text("of somebody else")
    result = run(tmp_path, "smoke", *command[:-3], "processes=2", "--out", "out")
    refused(result, "1 job failed", "lr0.001-seed2.log")
    (failed,) = lines_of(result, "FAILED")
    assert "mha_tiny lr 0.001 seed 2, with status 2" in failed
    assert any("which a run would write over" in line for line in lines_of(result, "  |"))
    assert len(lines_of(result, "finished")) == 3
    assert summary_of(first)["finished"]
    assert rows_of(first)[0] == begun  # its time too: not run again
    assert statuses(tmp_path / "out")["mha_tiny/lr0.001-seed2"] == "failed"

    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "runs").glob("*/*/summary.json")}
    (spoiled / "tokenizer.json").unlink()
    result = succeeded(run(tmp_path, "smoke", *command, "--measure"))
    assert len(lines_of(result, "begun")) == len(lines_of(result, "finished")) == 1
    assert times == {path: path.stat().st_mtime_ns for path in times}
    assert set(statuses(tmp_path / "out").values()) == {"finished"}
    runs = [tmp_path / "out" / "runs" / name for name in runs_in(tmp_path / "out")]
    assert len({summary_of(run)["data_fingerprint"] for run in runs}) == 1
    assert {summary_of(run)["threads"] for run in runs} == {1}
    config = yaml.safe_load((first / "config.yaml").read_text())
    assert (config["logger"]["group"], config["tags"]) == ("smoke", ["mla_tiny", "seed"])
    assert yaml.safe_load((tmp_path / "out" / "study.yaml").read_text())["tokens"] == 51200

    assert "± is half the width of the 95% interval" in result.stdout
    check_result(json.loads((tmp_path / "out" / "result.json").read_text()), tmp_path / "out")

    refused(run(tmp_path, "smoke", *command, "tokens=25600"), "trainer.max_steps", "--out")


def check_result(result: dict, folder: Path) -> None:
    """The figures of the rows are those of their runs, and MLA is compared with MHA."""
    mla, mha = result["rows"]
    assert result["views"] == {"parameters": ["mla_tiny", "mha_tiny"]}
    assert result["failed"] == []
    losses = {row["name"]: [summary_of(Path(run))["test_loss"] for run in row["runs"]] for row in (mla, mha)}
    for row in (mla, mha):
        assert row["seeds"] == [1, 2]
        assert row["estimates"]["test_loss"]["values"] == losses[row["name"]]
        assert row["estimates"]["test_loss"]["low"] < row["estimates"]["test_loss"]["mean"]
        assert row["figures"]["lr"] == 1e-3
        assert len(row["position"]) == 32
        assert row["samples"]
        assert [at["context"] for at in row["decoding"]] == list(CONTEXTS)
        assert row["curve"]["tokens"][-1] == 51200
    assert mla["baseline"] == "mha_tiny"
    pairs = [own - other for own, other in zip(losses["mla_tiny"], losses["mha_tiny"], strict=True)]
    assert mla["difference"]["mean"] == pytest.approx(sum(pairs) / 2, abs=1e-4)
    assert mla["difference"]["low"] < mla["difference"]["high"]
    assert mha["difference"] is None
    assert "<svg" in (folder / "report.html").read_text()
    assert {Path(run).parent.parent for row in (mla, mha) for run in row["runs"]} == {folder / "runs"}


def test_through_a_launcher_of_hydra(tmp_path, on_corpus):
    """Tuning and seeds are multiruns of one row; a failed job of one is told apart from those that finished."""
    one = ("kinds=[mha]", "cache_of=[]", "views=[parameters]", "tuning.kinds=[mha]", "seeds=[1,2]", "more_seeds=[]")
    launcher = ("hydra/launcher=submitit_local", "tuning.learning_rates=[1e-3,2e-3]", "tuning.most=2", "processes=1")
    spoiled = tmp_path / "out" / "runs" / "mha_tiny" / "lr0.002-seed1"
    spoiled.mkdir(parents=True)
    (spoiled / "tokenizer.json").write_text("of somebody else")
    result = run(tmp_path, "smoke", *one, *TINY, *on_corpus, *launcher, "--out", "out")
    assert "not known before a run is done" in lines_of(result, "time")[0]
    names = {name for name, status in statuses(tmp_path / "out").items() if status == "finished"}
    best = "0.002" if "mha_tiny/lr0.002-seed2" in names else "0.001"
    assert {"mha_tiny/lr0.001-seed1000", "mha_tiny/lr0.002-seed1000", f"mha_tiny/lr{best}-seed2"} <= names
    failed = {name for name, status in statuses(tmp_path / "out").items() if status == "failed"}
    assert failed == ({"mha_tiny/lr0.002-seed1"} if best == "0.002" else set())
    logs = {path.name for path in (tmp_path / "out" / "logs").glob("*/*.log")}
    assert logs == {"lr0.001-seed1000.log", f"lr{best}-seed1.log"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["attentoin"], ["unknown study attentoin", "did you mean attention"]),
        (["smoke", "kinds=[mla,mhq]"], ["unknown kind mhq"]),
        (["smoke", "kinds=[]"], ["kinds=[]", "empty"]),
        (["smoke", "token=5"], ["unknown key token", "tokens"]),
        (["smoke", "hydra/launcher=nonesuch"], ["hydra/launcher=nonesuch"]),
        (["smoke", "model.seq_len=48"], ["tokens_per_step", "model.seq_len"]),
    ],
)
def test_mistakes(tmp_path, arguments, words):
    refused(run(tmp_path, *arguments), *words)
    assert not any(tmp_path.iterdir())


def test_one_seed_is_said_to_give_no_interval(tmp_path, on_corpus):
    result = succeeded(run(tmp_path, "smoke", *TINY_STUDY, *on_corpus, "seeds=[1]", "more_seeds=[]", "--plan"))
    assert "warning: fewer than two seeds give no interval" in result.stdout


@pytest.mark.slow
def test_the_smoke_study(tmp_path):
    """All of it, as a user starts it."""
    files = f"data.files={ROOT}/mla_lm/**/*.py"
    result = succeeded(run(tmp_path, "smoke", files))
    done = statuses(tmp_path / "studies" / "smoke")
    assert set(done.values()) == {"finished"}
    assert 4 < len(done) <= 20
    assert "0 of them done" in lines_of(result, "runs")[0]
    again = succeeded(run(tmp_path, "smoke", files))
    assert not lines_of(again, "begun")
