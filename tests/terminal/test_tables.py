"""Tables: whole in a file, folded on a terminal, and nothing in them is anything but text."""

import io
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from mla_lm.terminal.tables import markdown, table
from tests.conftest import ROOT

WORDS = st.text("ab1,.=日é", min_size=1, max_size=12)
CELLS = st.lists(WORDS, min_size=1, max_size=4).map(" ".join)
TABLES = st.integers(1, 5).flatmap(lambda n: st.lists(st.lists(CELLS, min_size=n, max_size=n), min_size=1, max_size=5))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_width(width: int, rows: list[list[str]]) -> str:
    """The table that a terminal of this width gets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", Terminal())
        patch.setenv("COLUMNS", str(width))
        return table(rows)


def test_names_are_left_and_figures_right():
    assert table([["run", "status", "loss"], ["mla", "finished", "1.25"], ["x", "failed", "-"]], left=2) == (
        "run  status    loss\nmla  finished  1.25\nx    failed       -"
    )
    assert table([["", "a"], ["> mla", "1"], ["  mha", "22"]]) == "        a\n> mla   1\n  mha  22"
    assert table([["run", "loss"]]) == "run  loss"


def test_in_a_file_nothing_is_cut_or_folded():
    name = "a long name of a run " * 20 + "x" * 300
    heading, line = table([["run", "validation loss"], [name, "1 ± 2"]]).split("\n")
    assert heading == "run".ljust(len(name)) + "  validation loss"
    assert line == name + "1 ± 2".rjust(2 + len("validation loss"))


def test_others_text_is_only_text():
    name = "[red]x[/red] :smile: \x1b[31m\n\u202e[link=http://x]"
    shown = r"[red]x[/red] :smile: \x1b[31m\n\u202e[link=http://x]"
    assert table([["run", "loss"], [name, "1"]]).split("\n")[1] == f"{shown}     1"
    assert table([[name]]) == shown


def test_wide_characters_take_two_cells():
    lines = table([["", "loss"], ["日本語", "1.5"], ["mla", "2"]]).split("\n")
    assert {cell_len(line) for line in lines} == {len("日本語") * 2 + 2 + len("loss")}


@pytest.mark.e2e
def test_no_colours_even_where_they_are_forced():
    program = "from mla_lm.terminal.tables import table; print(table([['a', 'b'], ['x', '1']]))"
    environment = {**os.environ, "FORCE_COLOR": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout == "a  b\nx  1\n"


def test_markdown():
    text = markdown([["run", "loss"], ["a|b", "1.5"], ["mla", "12.5"]])
    assert text == "| run  | loss |\n|------|------|\n| a\\|b |  1.5 |\n| mla  | 12.5 |"


def test_a_terminal_that_is_too_narrow_folds_between_words():
    rows = [["run", "validation loss"], ["a first run", "1.25"]]
    assert on_width(28, rows) == table(rows)
    assert on_width(27, rows).split("\n") == [
        "run              validation",
        "                       loss",
        "a first run            1.25",
    ]


def test_rows_become_columns_where_that_is_not_enough():
    assert on_width(12, [["run", "loss", "tokens", "bytes"], ["mla", "1.25", "10", "9"]]).split("\n") == [
        "run      mla",
        "loss    1.25",
        "tokens    10",
        "bytes      9",
    ]


@given(TABLES, st.integers(1, 60))
def test_no_word_is_lost_or_split(rows, width):
    assert sorted(on_width(width, rows).split()) == sorted(
        word for row in rows for cell in row for word in cell.split()
    )
