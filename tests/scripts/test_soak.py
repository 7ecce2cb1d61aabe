"""The soak holds in small, and would see what it is there to see."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import torch

from mla_lm.interop.hf.folder import export_run
from scripts.soak import __main__ as soak
from scripts.soak.attacks import CANARY, MODELS, PAYLOADS, RUNS
from scripts.soak.mutations import mutate
from scripts.soak.programs import FORK, Broken
from scripts.soak.runs import check_same
from scripts.soak.trials import Row, failures, held, run_trials
from tests.conftest import ROOT, call_main, refused

ELSEWHERE = ("killing", "signals", "disk", "nonfinite")  # tests/e2e/test_survival.py and tests/runs/ have the same


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([row for row in soak.ROWS if row not in ELSEWHERE], id="others"),
        pytest.param(list(soak.ROWS), id="all", marks=pytest.mark.slow),
    ],
)
def test_quick(tmp_path, rows):
    """A small part of every row."""
    command = [sys.executable, "-m", "scripts.soak", "--quick", "--seed", "1", "--json", str(tmp_path / "out.json")]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run([*command, "--only", *rows], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert list(written) == rows
    for row in written.values():
        assert row["test"] in done.stdout
        assert row["figure"] in done.stdout
    assert list(tmp_path.iterdir()) == [tmp_path / "out.json"]


def broken_row(root: Path, folder: Path, quick: bool, random: Random) -> Row:
    outcomes = run_trials(odd_breaks, [(0,), (1,), (2,)], folder, seconds=60)
    return Row(held(outcomes), failures(outcomes))


def odd_breaks(folder: Path, number: int) -> None:
    (folder / "evidence").write_text(str(number))
    if number % 2:
        raise Broken("it is odd")


def test_what_did_not_hold_is_said_and_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(broken_row, "soak", broken_row, raising=False)
    monkeypatch.setattr(broken_row, "TEST", "numbers", raising=False)
    monkeypatch.setattr(soak, "ROWS", {"numbers": broken_row})
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in soak.FOLDERS:  # which the soak sets
        monkeypatch.setenv(name, "")
    result = call_main(lambda: soak.cli.run(soak.main), ["soak", "--seed", "7"], tmp_path)
    assert result.returncode == 1
    assert "numbers" in result.stderr
    assert "2 of 3" in result.stdout
    assert "1: it is odd" in result.stdout
    (root,) = tmp_path.iterdir()
    assert [path.relative_to(root / "numbers") for path in (root / "numbers").rglob("evidence")] == [
        Path("001/evidence")
    ]


def test_a_row_that_does_not_exist(tmp_path):
    refused(call_main(lambda: soak.cli.run(soak.main), ["soak", "--only", "nothing"], tmp_path), "nothing", "killing")


def test_no_trial_begins_when_the_time_is_over(tmp_path):
    (outcome,) = run_trials(odd_breaks, [(0,)], tmp_path / "row", seconds=-1)
    assert "not begun" in outcome.failure


def test_only_equal_runs_are_the_same(run, tmp_path):
    """One bit of one weight, one figure of one row."""
    check_same(run, run)
    for spoil in (lower_a_weight, change_a_loss):
        other = shutil.copytree(run, tmp_path / spoil.__name__)
        spoil(other)
        with pytest.raises(Broken, match="uninterrupted"):
            check_same(other, run)


def lower_a_weight(run: Path) -> None:
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    weight = checkpoint["state_dict"]["norm.weight"]
    weight[0] = torch.nextafter(weight[0], torch.tensor(0.0))
    torch.save(checkpoint, run / "checkpoints" / "last.ckpt")


def change_a_loss(run: Path) -> None:
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text.replace('"train/loss": ', '"train/loss": 1', 1))


@pytest.mark.parametrize("name", PAYLOADS)
def test_payloads_would_run(tmp_path, name):
    """Where a checkpoint is loaded without care, so that a canary that is not there says something."""
    torch.save(PAYLOADS[name](tmp_path), tmp_path / "a.ckpt")
    process = FORK.Process(target=torch.load, args=(tmp_path / "a.ckpt",), kwargs={"weights_only": False})
    process.start()
    process.join()
    assert (tmp_path / CANARY).exists()


def test_attacks_change_what_they_attack(run, tmp_path):
    """A run, or a model folder, so that none is harmless by a slip."""
    export_run(run, tmp_path / "model")
    for number, (name, attack) in enumerate((RUNS | MODELS).items()):
        folder = tmp_path / str(number)
        for part in ("run", "model"):
            shutil.copytree(tmp_path / part, folder / part)
        attack(folder)
        assert any(files(folder / part) != files(tmp_path / part) for part in ("run", "model")), name
        assert not (folder / CANARY).exists(), name


def files(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_mutations_change_the_file_and_repeat(tmp_path):
    content = b'{"a": 1, "b": [2, 3]}\nc: d\n'
    for number in range(300):
        mutated = mutate(content, "summary.json", Random(number))
        assert mutated != content
        assert mutated == mutate(content, "summary.json", Random(number))


def test_drawn_command_lines_repeat():
    pytest.importorskip("hypothesis")
    from scripts.soak.drawn import examples

    drawn = examples(30, 1)
    assert drawn == examples(30, 1)
    assert len({tuple(arguments) for arguments, _, _ in drawn}) > 5
