"""The table of a report: every number of every row, for the page, Markdown, CSV and wandb."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mla_lm.study.report.numbers import MINUS, percent, spread
from mla_lm.study.result import Estimate, Result, Row
from mla_lm.terminal.tables import csv_of


@dataclass
class Column:
    """
    Attributes:
        name: of the column in CSV; of the figure or estimate in a row
        heading: for readers
        show: how a number is written
        digits: of a half-width, as a format; None: the column has no interval
        side: to which its cells are aligned; words to the left
    """

    name: str
    heading: str
    show: Callable[[Any], str] = str
    digits: str | None = None
    side: str = "right"


@dataclass
class Cell:
    """What is read, its interval in small print, and the value it sorts by; all empty where nothing was measured."""

    text: str
    value: str | float
    small: str = ""


COLUMNS = (
    Column("name", "row", side="left"),
    Column("kind", "attention", side="left"),
    Column("size", "size", side="left"),
    Column("views", "matched by", side="left"),
    Column("seeds", "seeds"),
    Column("parameters", "parameters", "{:,.0f}".format),
    Column("flops_per_token", "FLOPs/token", lambda flops: f"{flops / 1e6:,.1f}M"),
    Column("cache_bytes_per_token", "cache B/token", "{:,.0f}".format),
    Column("cache_vs_mha", "cache vs MHA", "{:.3f}".format),
    Column("tokens_seen", "tokens seen", "{:,.0f}".format),
    Column("lr", "learning rate", "{:g}".format),
    Column("val_loss", "val loss", "{:.4f}".format, ".4f"),
    Column("val_perplexity", "val ppl", "{:.2f}".format, ".2f"),
    Column("val_bits_per_byte", "val bits/byte", "{:.4f}".format, ".4f"),
    Column("test_loss", "test loss", "{:.4f}".format, ".4f"),
    Column("difference", "difference of test loss", lambda nats: f"{nats:+.4f}".replace("-", MINUS), "+.4f"),
    Column("test_perplexity", "test ppl", "{:.2f}".format, ".2f"),
    Column("test_bits_per_byte", "test bits/byte", "{:.4f}".format, ".4f"),
    Column("tokens_per_second", "training tokens/s", "{:,.0f}".format, ",.0f"),
    Column("decoding", "decoding tokens/s", "{:,.0f}".format),
    Column("peak_memory_bytes", "peak memory, MiB", lambda size: f"{size / 2**20:,.0f}"),
)
TEXTS = ("name", "kind", "size")


def table_of(result: Result) -> tuple[list[Column], list[list[Cell]]]:
    """The columns in which some row has a value, and the cells of each row."""
    rows = [[cell_of(column, row, result) for column in COLUMNS] for row in result.rows]
    filled = [place for place in range(len(COLUMNS)) if any(row[place].value != "" for row in rows)]
    return [COLUMNS[place] for place in filled], [[row[place] for place in filled] for row in rows]


def cell_of(column: Column, row: Row, result: Result) -> Cell:
    value = value_of(column.name, row, result)
    if value is None or value == "":
        return Cell("", "")
    if not isinstance(value, Estimate):
        return Cell(column.show(value), value)
    small = spread(value, column.digits) if column.digits else ""
    if column.name == "difference" and (share := result.relative_difference(row)):
        small = f"{interval_of(value)} {percent(share.mean)} of {row.baseline}".strip()
    return Cell(column.show(value.mean), value.mean, small)


def interval_of(value: Estimate) -> str:
    return "" if value.low is None else f"{value.low:+.4f} to {value.high:+.4f};".replace("-", MINUS)


def value_of(name: str, row: Row, result: Result) -> Estimate | float | str | None:
    if name in TEXTS:
        return getattr(row, name)
    if name == "views":
        return ", ".join(view for view, names in result.views.items() if row.name in names)
    if name == "seeds":
        return len(row.seeds)
    if name == "difference":
        return row.difference
    if name == "decoding":  # of the longest context
        return max(row.decoding, key=lambda at: at.context).tokens_per_second if row.decoding else None
    return row.estimates.get(name, row.figures.get(name))


def as_records(result: Result) -> list[dict[str, Any]]:
    """For each row its figures, unrounded; an estimate takes three, with its ends under NAME_low and NAME_high."""
    records = []
    for row in result.rows:
        record: dict[str, Any] = {}
        for column in COLUMNS:
            value = value_of(column.name, row, result)
            if isinstance(value, Estimate):
                record |= {column.name: value.mean, f"{column.name}_low": value.low, f"{column.name}_high": value.high}
            else:
                record[column.name] = value
        records.append(record | {"baseline": row.baseline, "runs": " ".join(row.runs)})
    return records


def as_csv(result: Result) -> str:
    """A line for each row, with the names of `as_records`."""
    return csv_of(as_records(result))
