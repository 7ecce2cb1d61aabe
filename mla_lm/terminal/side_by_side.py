"""Texts that grow side by side on a terminal."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from mla_lm.terminal.plain_text import printable

if TYPE_CHECKING:
    from rich.console import RenderableType

READABLE = 24  # cells that a column needs
FRAME = 0.1  # seconds that a drawing stays at least: one for each token would slow the tokens down


class Column(NamedTuple):
    heading: str
    text: str
    figures: list[str]  # below the text


@contextmanager
def growing_columns() -> Iterator[Callable[[list[Column]], None]]:
    """Yields a function that draws columns in place, where standard output is a terminal.

    If they are higher than the terminal, it draws their last rows. When the block ends, or is interrupted, the last
    columns are printed whole; one after another where each would be too narrow to read.
    """
    from rich.console import Console
    from rich.live import Live
    from rich.segment import SegmentLines

    console, last, drawn_at = Console(), [], -FRAME

    def draw(columns: list[Column]) -> None:
        nonlocal last, drawn_at
        last = columns
        if console.is_terminal and is_readable(columns, console.width) and time.monotonic() - drawn_at >= FRAME:
            heading, rows = 2, console.render_lines(side_by_side(columns), pad=False)
            room = max(1, console.height - heading - 1)
            live.update(SegmentLines(rows[:heading] + rows[heading:][-room:], new_lines=True), refresh=True)
            drawn_at = time.monotonic()

    try:
        with Live(console=console, auto_refresh=False, transient=True) as live:
            yield draw
    finally:
        if last:
            console.print(side_by_side(last) if is_readable(last, console.width) else one_after_another(last))


def is_readable(columns: list[Column], width: int) -> bool:
    """Whether there is room for them side by side."""
    return width // len(columns) >= READABLE


def side_by_side(columns: list[Column]) -> "RenderableType":
    """Columns of equal width: a heading of one row, a rule, the text, a rule, the figures."""
    from rich import box
    from rich.columns import Columns
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.MINIMAL, show_edge=False, pad_edge=False, show_footer=True, expand=True)
    for column in columns:
        heading = Text(printable(column.heading), no_wrap=True, overflow="ellipsis")
        table.add_column(heading, Columns(map(Text, column.figures), padding=(0, 2)), ratio=1)
    table.add_row(*(Text(printable(column.text.expandtabs(4)), overflow="fold") for column in columns))
    return table


def one_after_another(columns: list[Column]) -> "RenderableType":
    from rich.console import Group
    from rich.padding import Padding

    return Group(*(Padding(side_by_side([column]), (0, 0, 1, 0)) for column in columns))
