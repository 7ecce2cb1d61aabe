"""Texts that grow side by side: in place on a terminal, once elsewhere, and all of them in the end."""

import io
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from mla_lm.terminal.side_by_side import Column, growing_columns
from tests.terminal.screen import on_terminal, sides

CODE = "def f(value):\n    return [item for item in value.items() if item]\n"
FIGURES = ["12 tokens", "1.0 KiB of cache", "5 tokens/s"]


def printed(columns: list[Column], width: int) -> list[str]:
    """Rows that go into a file."""
    file = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", file)
        patch.setenv("COLUMNS", str(width))
        with growing_columns() as draw:
            draw([column._replace(text="") for column in columns])
            draw(columns)
    return file.getvalue().split("\n")


def test_a_file_gets_the_last_columns_once():
    rows = printed([Column("mla", CODE, FIGURES), Column("mha", "x", FIGURES[:1])], 80)
    assert rows.pop() == ""
    left, right = sides(rows)
    assert left[:3] == ["mla", "-", "def f(value):"]
    assert left[3:6] == ["    return [item for item in", "value.items() if item]", ""]
    assert left[6:] == ["-", "12 tokens  1.0 KiB of cache  5 tokens/s"]
    assert right == ["mha", "-", "x", "", "", "", "-", "12 tokens"]


@given(
    st.text(st.characters(exclude_categories=("C", "Z"), include_characters=" \n\t日é"), min_size=1, max_size=200),
    st.integers(48, 120),
)
def test_no_row_is_too_wide_and_nothing_but_spaces_is_lost(text, width):
    rows = printed([Column("mla", text, []), Column("mha", "", [])], width)
    assert all(cell_len(row) <= width for row in rows)
    left, _ = sides(rows)
    assert "".join("".join(left[2:-2]).split()) == "".join(text.split())


def test_too_narrow_for_two_they_come_one_after_another():
    rows = printed([Column("mla", CODE, FIGURES), Column("mha", CODE, FIGURES)], 40)
    assert not any("│" in row for row in rows)
    first, second = (rows.index(name.ljust(40)) for name in ("mla", "mha"))
    assert [row.rstrip() for row in rows[first:second]][2:5] == [
        "def f(value):",
        "    return [item for item in",
        "value.items() if item]",
    ]


def test_nothing_in_the_text_controls_the_terminal_or_is_markup():
    (shown, _) = sides(
        printed([Column("[red]x[/red]", "a\x1b[2Jb\rc\x07\u202e [bold]d\n\te", []), Column("", "", [])], 80)
    )
    assert shown[0] == "[red]x[/red]"
    assert shown[2:4] == [r"a\x1b[2Jb\rc\x07\u202e [bold]d", "    e"]


@pytest.mark.e2e
def test_a_terminal_shows_the_last_rows_and_in_the_end_all():
    def program():
        with growing_columns() as draw:
            for length in range(1, 600, 20):
                draw([Column("mla", (CODE * 9)[:length], FIGURES), Column("mha", "word " * (length // 5), FIGURES)])
            print("seen")  # above what is drawn
        print("end")

    seen = on_terminal(program, width=90, height=12)
    assert seen.status == 0
    assert [row for row in seen.rows if row in ("seen", "end")] == ["seen", "end"]
    drawn = seen.rows[seen.rows.index("seen") + 1 : -1]
    assert sum(row.startswith("mla") for row in drawn) == 1  # nothing of what was drawn before is left
    left, right = sides(drawn)
    assert left[-1] == right[-1] == "  ".join(FIGURES)
    for side, text in ((left, (CODE * 9)[:581]), (right, "word " * 116)):
        assert "".join("".join(side[2:-2]).split()) == "".join(text.split())


@pytest.mark.e2e
def test_an_interruption_leaves_what_there_is_on_the_terminal():
    def program():
        with growing_columns() as draw:
            draw([Column("mla", "first", []), Column("mha", "second", [])])
            draw([Column("mla", "first word", []), Column("mha", "second word", [])])
            raise SystemExit(3)

    seen = on_terminal(program)
    assert seen.status == 3
    left, right = sides(seen.rows)
    assert (left[2], right[2]) == ("first word", "second word")
