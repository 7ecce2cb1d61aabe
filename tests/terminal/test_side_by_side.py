"""Columns: every row fits, nothing but spaces is lost, and what is drawn last is what stands there."""

import io
import re
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla_lm.terminal.plain_text import printable
from mla_lm.terminal.side_by_side import Column, Screen, cells_of, fold, pack, side_by_side

CODE = "def f(value):\n    return [item for item in value.items() if item]\n"


BIDIRECTIONAL = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


def without_spaces(text: str) -> str:
    return "".join(text.split())


@given(
    st.text(st.characters(exclude_categories=("C", "Z"), include_characters=" \n\t日é👩"), max_size=200),
    st.integers(2, 30),
)
def test_fold(text, width):
    rows = fold(text, width)
    assert all(cells_of(row) <= width for row in rows)
    assert without_spaces("".join(rows)) == without_spaces(text)


def test_fold_cuts_at_spaces_and_keeps_lines_and_indentation():
    assert fold(CODE, 24) == ["def f(value):", "    return [item for", "item in value.items() if", "item]", ""]
    assert fold("a verylongword", 6) == ["a", "verylo", "ngword"]
    assert fold("日本語の文", 5) == ["日本", "語の", "文"]
    assert fold("\tx", 10) == ["    x"]


def test_nothing_controls_the_terminal():
    (row,) = fold("a\x1b[2Jb\rc\x07\u202e\N{NO-BREAK SPACE}d", 40)
    assert row == r"a\x1b[2Jb\rc\x07\u202e" + "\N{NO-BREAK SPACE}d"


@given(st.text(st.characters()))
def test_printable_changes_control_characters_only(text):
    shown = printable(text)
    assert not [c for c in shown if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") and c != "\n"]
    assert not [c for c in shown if unicodedata.bidirectional(c) in BIDIRECTIONAL]
    shown.encode()  # it can be written anywhere
    if all(unicodedata.category(c)[0] != "C" and c not in "\u2028\u2029" for c in text):
        assert shown == text


def test_cells():
    assert cells_of("abc") == 3
    assert cells_of("日本") == 4
    assert cells_of("e\N{COMBINING ACUTE ACCENT}") == 1


def test_pack():
    assert pack(["12 tokens", "1.0 KiB", "5 tokens/s"], 18) == ["12 tokens  1.0 KiB", "5 tokens/s"]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_side_by_side(width):
    columns = [Column("mla", CODE * 9, ["1 token"]), Column("mha", "日本語" * 40, ["2 tokens"])]
    rows = side_by_side(columns, width)
    assert all(cells_of(row) < width for row in rows)
    assert len({cells_of(row.rpartition(" | ")[0]) for row in rows if " | " in row}) == 1
    tail = side_by_side(columns, width, 20)
    assert len(tail) == 20
    assert (tail[:2], tail[2:]) == (rows[:2], rows[-18:])


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def screen(self, height: int) -> list[str]:
        """The rows that stand there; all that may come are rows, the cursor going up, and the rest being erased."""
        rows, at = [], 0
        for event in re.finditer(
            r"\x1b\[(?P<up>\d+)A|(?P<row>[^\x1b\n]*)\x1b\[K\n|(?P<rest>\x1b\[J)|.", self.getvalue()
        ):
            if event["up"]:
                at -= int(event["up"])
                assert at > len(rows) - height  # what has left the screen cannot be drawn again
            elif event["rest"]:
                del rows[at:]
            else:
                rows[at : at + 1] = [event["row"]]
                at += 1
        return rows


def test_a_terminal_shows_what_was_drawn_last(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "12")
    screen = Screen()
    for length in (1, 200, 400, 30):  # the last is shorter than what it replaces
        columns = [Column("mla", (CODE * 9)[:length], ["1 token"]), Column("mha", "word " * length, ["2 tokens"])]
        screen.draw(columns)
        assert sys.stdout.screen(12) == side_by_side(columns, 80, 11)
    screen.finish(columns)
    assert sys.stdout.screen(12) == side_by_side(columns, 80)


@pytest.mark.parametrize("width", ["40", "80"])
def test_elsewhere_only_the_end_is_shown(capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", width)
    columns = [Column("mla", CODE, ["1 token"]), Column("mha", CODE, ["2 tokens"])]
    screen = Screen()
    screen.draw(columns)
    assert capsys.readouterr().out == ""
    screen.finish(columns)
    rows = capsys.readouterr().out.split("\n")
    if width == "80":
        assert rows == [*side_by_side(columns, 80), ""]
    else:  # too narrow for two
        rule = "-" * 39
        assert rows == [
            *("mla", rule, *fold(CODE, 39), "1 token", ""),
            *("mha", rule, *fold(CODE, 39), "2 tokens", "", ""),
        ]
