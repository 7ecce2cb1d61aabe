"""What a run shows while it trains: lines that stay, and on a terminal a bar below them."""

import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import train as train_script
from mla_lm.config import TrainConfig
from mla_lm.terminal import cli
from tests.conftest import SMALL, rows_of, summary_of
from tests.terminal.screen import Seen, on_terminal

PROMPTS = 'data.prompts=["def f(","[red]import[/red]"]'


def training_in(folder: Path, on_corpus: tuple[str, ...]) -> Callable[[], None]:
    """Trains in folder/run; for a process of its own."""

    def program():
        os.chdir(folder)
        sys.argv = ["train.py", *SMALL, *on_corpus, PROMPTS, "hydra.run.dir=run"]
        cli.run(train_script.main, TrainConfig)

    return program


@pytest.fixture
def program(on_corpus, tmp_path) -> Callable[[], None]:
    return training_in(tmp_path, on_corpus)


@pytest.fixture(scope="module")
def seen(on_corpus, tmp_path_factory) -> Seen:
    """A whole run on a terminal."""
    return on_terminal(training_in(tmp_path_factory.mktemp("seen"), on_corpus), width=100)


def steps_in(rows: list[str]) -> list[str]:
    return [match[1] for row in rows if (match := re.match(r"step (\d/6)  loss \d", row))]


def test_on_a_terminal_lines_stay_above_one_bar(seen):
    assert seen.status == 0
    assert steps_in(seen.rows) == [f"{step}/6" for step in range(1, 7)]
    assert [row.split()[1] for row in seen.rows if "val/loss" in row] == ["3", "6"]
    bars = [row for row in seen.rows if "━" in row]
    assert [bar.split()[0] for bar in bars] == ["training", "test"]
    assert bars[0].split()[2] == "6/6"
    assert seen.rows.index(bars[0]) > max(n for n, row in enumerate(seen.rows) if row.startswith("step "))
    assert re.search("validation (\x1b\\[[\\d;]*m)*━", seen.written.decode())  # it had the bar's place meanwhile
    assert seen.written.rindex(b"\x1b[?25h") > seen.written.rindex(b"\x1b[?25l")  # the cursor is back


def test_samples_stand_apart(seen):
    start = seen.rows.index("samples at step 3:") + 1
    first, second = "\n".join(seen.rows[start:]).split("\n\n")[:2]
    assert first.startswith("  | def f(")
    assert second.startswith("  | [red]import[/red]")
    assert all(row.startswith("  |") for row in (first + "\n" + second).split("\n"))


def test_lines_go_into_the_file_that_standard_output_is(program, tmp_path):
    def into_file():
        sys.stdout = open(tmp_path / "out.txt", "w")  # noqa: SIM115
        program()

    seen = on_terminal(into_file)
    assert seen.status == 0
    lines = (tmp_path / "out.txt").read_text().splitlines()
    assert steps_in(lines) == [f"{step}/6" for step in range(1, 7)]
    assert not [line for line in lines if "━" in line or "\x1b" in line]
    assert [row.split()[0] for row in seen.rows if row] == ["training", "test"]


def test_a_terminal_that_is_closed_ends_nothing(program, tmp_path):
    def without_hangup():  # as nohup starts a program
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        program()

    seen = on_terminal(without_hangup, close_at=b"step 2/6")
    assert seen.status == 0
    assert summary_of(tmp_path / "run")["finished"]
    assert [row["step"] for row in rows_of(tmp_path / "run") if "train/loss" in row] == [1, 2, 3, 4, 5, 6]


def test_an_interrupted_run_leaves_the_bar_where_it_was(program):
    def interrupted():
        from scripts.soak.programs import before

        before("training_step", lambda module: module.global_step == 4 and os.kill(os.getpid(), signal.SIGINT))
        program()

    seen = on_terminal(interrupted, width=100)
    assert seen.status == 128 + signal.SIGINT
    assert steps_in(seen.rows) == [f"{step}/6" for step in range(1, 6)]
    assert [row.split()[2] for row in seen.rows if row.startswith("training ━")][-1] == "5/6"
    assert any("SIGINT: stopping after this step" in row for row in seen.rows)
    assert "stopped at step 5" in seen.rows
