"""Texts that grow side by side on a terminal."""

import shutil
import sys
import unicodedata
from itertools import zip_longest
from typing import NamedTuple

from mla_lm.terminal.plain_text import printable

BETWEEN = " | "
READABLE = 24  # cells that a column needs


class Column(NamedTuple):
    heading: str
    text: str
    figures: list[str]  # below the text


class Screen:
    """Columns on standard output. On a terminal they are drawn again in place, elsewhere once they are final."""

    def __init__(self):
        self.rows = 0  # that were drawn last

    def draw(self, columns: list[Column]) -> None:
        """The texts so far, their last rows where the terminal has not room for all."""
        width, height = shutil.get_terminal_size()
        if sys.stdout.isatty() and is_readable(columns, width):
            self._replace(side_by_side(columns, width, height - 1))

    def finish(self, columns: list[Column]) -> None:
        width, _ = shutil.get_terminal_size()
        if is_readable(columns, width):
            self._replace(side_by_side(columns, width))
        else:
            self._replace([row for column in columns for row in [*side_by_side([column], width), ""]])

    def _replace(self, rows: list[str]) -> None:
        if sys.stdout.isatty():  # each row erases its old rest, the last what was below: nothing flickers
            back = f"\x1b[{self.rows}A" if self.rows else ""
            text = back + "".join(f"{row}\x1b[K\n" for row in rows) + "\x1b[J"
        else:
            text = "".join(f"{row}\n" for row in rows)
        print(text, end="", flush=True)
        self.rows = len(rows)


def is_readable(columns: list[Column], width: int) -> bool:
    """Whether there is room for them side by side."""
    return column_width(len(columns), width) >= READABLE


def column_width(columns: int, width: int) -> int:
    """Cells of each of so many columns side by side. A terminal's last cell stays free, as a full row may wrap."""
    return max(1, (width - 1 - len(BETWEEN) * (columns - 1)) // columns)


def side_by_side(columns: list[Column], width: int, height: int | None = None) -> list[str]:
    """Rows of at most `width` - 1 cells: headings, texts, figures.

    Args:
        height: rows at most; where the texts are longer, their last rows are given. Without it, all are.
    """
    cells = column_width(len(columns), width)
    above = beside([[*fold(column.heading, cells), "-" * cells] for column in columns], cells)
    texts = beside([fold(column.text, cells) for column in columns], cells)
    below = beside([pack(column.figures, cells) for column in columns], cells)
    if height is not None:
        room = max(1, height - len(above) - len(below))
        texts = texts[-room:]
    return above + texts + below


def beside(blocks: list[list[str]], width: int) -> list[str]:
    """Blocks of rows as one block, each padded to `width` cells."""
    padded = ([row + " " * (width - cells_of(row)) for row in rows] for rows in zip_longest(*blocks, fillvalue=""))
    return [BETWEEN.join(rows).rstrip() for rows in padded]


def fold(text: str, width: int) -> list[str]:
    """Rows of at most `width` cells: cut at spaces, a word that is longer than a row anywhere."""
    rows = []
    for line in text.expandtabs(4).split("\n"):
        line = printable(line)
        while (end := fitting(line, width)) < len(line):
            words, _, _ = line[: end + 1].rpartition(" ")
            if words.strip():
                end = len(words)
            rows.append(line[:end])
            line = line[end:].lstrip(" ")
        rows.append(line)
    return rows


def pack(parts: list[str], width: int) -> list[str]:
    """Parts in rows of at most `width` characters, as many in each as fit."""
    rows = parts[:1]
    for part in parts[1:]:
        if len(rows[-1]) + 2 + len(part) <= width:
            rows[-1] += "  " + part
        else:
            rows.append(part)
    return rows


def fitting(line: str, width: int) -> int:
    """How many characters of the line's beginning take at most `width` cells; 1 at least."""
    if line.isascii():
        return min(len(line), width)
    used = 0
    for n, character in enumerate(line):
        used += cells_of(character)
        if used > width:
            return max(n, 1)
    return len(line)


def cells_of(text: str) -> int:
    """Cells of a terminal that a printable text takes, as far as the Unicode database tells."""
    if text.isascii():
        return len(text)
    marks = sum(unicodedata.category(c) in ("Mn", "Me", "Cf") for c in text)  # written over the character before
    return len(text) - marks + sum(unicodedata.east_asian_width(c) in "WF" for c in text)
