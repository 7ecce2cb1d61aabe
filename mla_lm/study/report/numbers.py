"""Numbers as the report writes them."""

from mla_lm.study.result import Estimate, Result, Row
from mla_lm.terminal import plain_text

MANY = 8  # items of a list in a sentence
MINUS = "\N{MINUS SIGN}"
MEASURES = {"loss": "loss (nats per token)", "bits_per_byte": "bits per byte"}


def measure_of(result: Result) -> str:
    """The measure that compares all rows: the loss, or bits per byte where they are of several corpora."""
    return "bits_per_byte" if len(result.corpus) > 1 else "loss"


def percent(share: float) -> str:
    """With its sign, and with as many decimals as tell it from zero: +0.8%."""
    decimals = 1 if abs(share) >= 0.001 or share == 0 else 2
    return f"{100 * share:+.{decimals}f}%".replace("-", MINUS)


def spread(estimate: Estimate, digits: str) -> str:
    """The interval of an estimate, as ±half or as its ends where these are not alike far; empty without one."""
    if estimate.low is None or estimate.high is None or estimate.half_width is None:
        return ""
    if abs(estimate.low + estimate.high - 2 * estimate.mean) <= 0.02 * estimate.half_width:
        return f"±{estimate.half_width:{digits}}"
    return f"{estimate.low:{digits}} to {estimate.high:{digits}}".replace("-", MINUS)


def tokens(count: float) -> str:
    """131,072 as 128K, in powers of 1,024 as lengths of contexts are."""
    for unit, size in (("G", 2**30), ("M", 2**20), ("K", 2**10)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:,.0f}"


def joined(items: list[str]) -> str:
    """a, b and c; of many only the first."""
    more = len(items) - MANY
    return plain_text.joined(items if more <= 0 else [*items[:MANY], f"{more} more"])


def spoken(row: Row, rows: list[Row]) -> str:
    """A row as a sentence names it: MLA, where its kind is an acronym and no other row is of that kind."""
    alone = sum(other.kind == row.kind for other in rows) == 1
    return row.kind.upper() if alone and row.kind.isalpha() else row.name
