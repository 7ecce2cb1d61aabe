"""Tables as text, for a terminal, a log file, Markdown or CSV."""

import csv
import io
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from mla_lm.terminal.plain_text import printable

UNLIMITED = 100_000  # cells, wider than any table


def table(rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Draw a table. Names, paths and prompts in it are shown literally, with control characters escaped.

    Where a terminal is too narrow, cells are folded between words. If that is not enough, rows become columns. A word
    is never split. In a file or pipe, nothing is folded.

    Args:
        rows: of equal length; the first may be headings
        left: number of columns aligned left; those after them, of figures, are aligned right
    """
    from rich.cells import cell_len

    cells = [[_one_line(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns
        for text in (_draw(cells, left, width), _draw(list(zip(*cells, strict=True)), 1, width)):
            if max(map(cell_len, text.split("\n"))) <= width:
                return text
    return _draw(cells, left, UNLIMITED)


def markdown(rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """The same table in Markdown, where the first row must be headings."""
    return _draw([[_one_line(cell).replace("|", r"\|") for cell in row] for row in rows], left)


def csv_of(records: Sequence[dict[str, Any]]) -> str:
    """Records as CSV, under the names that any of them has, in the order in which these come up."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names_of(records))
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def names_of(records: Sequence[dict[str, Any]]) -> list[str]:
    """Every name that any of the records has."""
    return list(dict.fromkeys(name for record in records for name in record))


def _one_line(cell: str) -> str:
    return printable(cell).replace("\n", r"\n")


def _draw(cells: Sequence[Sequence[str]], left: int, width: int | None = None) -> str:
    """Draw in `width` cells, or more if the longest words need them; without a width, draw Markdown."""
    from rich import box
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if width is None:
        drawn, first = Table(box=box.MARKDOWN), 1
    else:
        drawn, first = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False), 0
    columns = list(zip(*cells, strict=True))
    needed = [max((cell_len(word) for cell in column for word in cell.split()), default=0) for column in columns]
    for number, column in enumerate(columns):
        justify = "left" if number < left else "right"
        drawn.add_column(Text(column[0]), justify=justify, min_width=needed[number], overflow="fold")
    for row in cells[first:]:
        drawn.add_row(*map(Text, row))
    console = Console()
    width = UNLIMITED if width is None else max(width, sum(needed) + 2 * len(needed))
    text = "".join(part.text for part in console.render(drawn, console.options.update(width=width)))
    return "\n".join(line.rstrip() for line in text.split("\n")).strip("\n")
