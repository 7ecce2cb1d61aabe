"""What a result says, in sentences that its figures alone decide."""

from mla_lm.study.report.numbers import MEASURES, joined, measure_of, percent, spoken, spread
from mla_lm.study.result import Result, Row

ENOUGH = 5  # seeds; with fewer, an interval of the mean is wide and rests on little


def answer(result: Result) -> str:
    """One sentence: MLA's difference to its baseline, or else what is known of the rows.

    Of several rows of MLA the largest is spoken of; without one, the largest row that has a baseline.
    """
    if not result.rows:
        return "No run has finished, so there is nothing to compare."
    paired = _paired(result)
    if paired:
        return _difference(*paired[0], result)
    return _lowest(result)


def further_answers(result: Result) -> list[str]:
    """The same of the other rows that have a baseline."""
    return [_difference(row, base, result) for row, base in _paired(result)[1:]]


def caveats(result: Result) -> list[str]:
    """What a reader must know before believing the answer."""
    said = []
    for note, names in result.notes().items():
        said.append(f"{'Every row' if len(names) == len(result.rows) > 1 else joined(names)}: {note}.")
    few = [row.name for row in result.rows if len(row.seeds) < ENOUGH]
    if few and len(result.rows) > 1:
        which = "Every row" if len(few) == len(result.rows) else joined(few)
        said.append(f"{which}: fewer than {ENOUGH} seeds. One seed has no interval, and that of two to four is wide.")
    if len({row.figures.get("tokens_seen") for row in result.rows}) > 1:
        said.append("The rows have seen different numbers of tokens, which may be all that sets them apart.")
    if len(result.corpus) > 1:
        said.append("The rows are of different corpora or tokenizers: only bits per byte compares.")
    return said


def _paired(result: Result) -> list[tuple[Row, Row]]:
    """Rows with a baseline, and it; MLA first, and large ones before small ones."""
    by_name = {row.name: row for row in result.rows}
    pairs = [(row, by_name[row.baseline]) for row in result.rows if row.difference and row.baseline in by_name]
    return sorted(pairs, key=lambda pair: (pair[0].kind != "mla", -pair[0].figures.get("parameters", 0)))


def _difference(row: Row, base: Row, result: Result) -> str:
    found = result.relative_difference(row)
    assert found  # by _paired
    name, other = spoken(row, result.rows), spoken(base, result.rows)
    seeds = len(set(row.seeds) & set(base.seeds))
    over = f"over {seeds} seeds" if seeds != 1 else "with one seed"
    cache = _cache(row, base)
    side = "below" if found.mean < 0 else "above"
    size = percent(abs(found.mean)).lstrip("+")
    if found.low is None or found.high is None:
        why = "its interval could not be measured" if seeds > 1 else "without a second seed there is no interval"
        return f"{name}'s test loss is {size} {side} {other}'s{cache}, {over}: {why}, so this may be chance."
    interval = f"95% interval {percent(found.low)} to {percent(found.high)}"
    if found.low <= 0 <= found.high:
        return (
            f"{name}'s test loss cannot be told apart from {other}'s{cache}: the difference is "
            f"{percent(found.mean)} ({interval}), {over}."
        )
    return f"{name}'s test loss is {size} {side} {other}'s ({interval}){cache}, {over}."


def _cache(row: Row, base: Row) -> str:
    mine, theirs = (each.figures.get("cache_bytes_per_token") for each in (row, base))
    if not mine or not theirs:
        return ""
    return " with the same cache" if mine == theirs else f" at {mine / theirs:.3g} of its cache"


def _lowest(result: Result) -> str:
    measure = measure_of(result)
    rows = [row for row in result.rows if f"test_{measure}" in row.estimates]
    if not rows:
        return "No row has been tested, so there is nothing to compare."
    best = min(rows, key=lambda row: row.estimates[f"test_{measure}"].mean)
    value = best.estimates[f"test_{measure}"]
    interval = spread(value, ".3f")
    figure = f"{value.mean:.3f}{interval and f' (95% interval {interval})'}"
    seeds = f"{len(best.seeds)} seeds" if len(best.seeds) != 1 else "one seed"
    if len(rows) == 1:
        return f"{spoken(best, result.rows)} has a test {MEASURES[measure]} of {figure}, over {seeds}."
    return (
        f"{spoken(best, result.rows)} has the lowest test {MEASURES[measure]} of {len(rows)} rows, {figure}, over "
        f"{seeds}; no paired difference was measured, so whether it is ahead is open."
    )
