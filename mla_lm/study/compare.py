"""Finished runs side by side, as a `Result`, and its table; runs that differ in their seed alone become one row."""

from collections.abc import Callable
from datetime import date
from statistics import fmean
from typing import Any

from mla_lm.config import differing
from mla_lm.errors import UserError
from mla_lm.study.collect import SIZE, Run, named_rows, same_but_for_seed, shown
from mla_lm.study.decoding import add_decoding
from mla_lm.study.result import Estimate, Result, Row
from mla_lm.study.row_figures import add_difference, add_position, corpora_of, curve_of, machine_of, row_of
from mla_lm.terminal.plain_text import joined
from mla_lm.terminal.tables import csv_of

# what `value_of` takes, heading, format
COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("kind", "attention", str),
    ("seeds", "seeds", str),
    ("parameters", "parameters", "{:,}".format),
    ("flops_per_token", "FLOPs/token", lambda flops: f"{flops / 1e6:,.1f}M"),
    ("tokens_seen", "tokens", "{:,}".format),
    ("val_perplexity", "val ppl", "{:.2f}".format),
    ("test_perplexity", "test ppl", "{:.2f}".format),
    ("val_bits_per_byte", "val bits/byte", "{:.4f}".format),
    ("test_bits_per_byte", "test bits/byte", "{:.4f}".format),
    ("difference", "difference", "{:.4f}".format),
    ("percent", "in %", "{:.2f}".format),
    ("cache_bytes_per_token", "cache B/token", "{:,.0f}".format),
    ("cache_vs_mha", "vs MHA", "{:.3f}".format),
    ("tokens_per_second", "tokens/s", "{:,.0f}".format),
)
OF_ONE_TOKENIZER = ("val_perplexity", "test_perplexity", "difference", "percent")
SIGNED = ("difference", "percent")


class Comparison:
    """Runs, the rows that they make, and what was found of these.

    Attributes:
        runs: all that were given, the unfinished too
        groups: the runs of each row, under its name
        result: without curves until `add_curves`

    Raises:
        UserError: no run has finished.
    """

    def __init__(self, runs: list[Run], command: str, trusted: bool = False):
        self.runs = runs
        groups = [group for group in same_but_for_seed(runs) if not all(run.unfinished for run in group)]
        if not groups:
            raise UserError(runs[0].unfinished if runs else "there are no runs to compare: name at least one")
        # the finished runs first, as the first one speaks for its row
        self.groups = named_rows([sorted(group, key=lambda run: run.unfinished is not None) for group in groups])
        rows = {name: row_of(name, group) for name, group in self.groups.items()}
        for name, base in baselines(self.groups).items():
            add_difference(rows[name], self.groups[name], rows[base], self.groups[base], trusted)
        self.result = Result(
            title="Comparison of runs",
            command=command,
            date=date.today().isoformat(),
            rows=list(rows.values()),
            corpus=corpora_of(runs),
            machine=machine_of(runs),
            configs={name: group[0].folder.config_file.read_text() for name, group in self.groups.items()},
            failed=[run.unfinished.splitlines()[0] for run in runs if run.unfinished],
        )

    def add_curves(self) -> None:
        """Raises UserError if a metrics.jsonl is damaged."""
        for row in self.result.rows:
            row.curve = curve_of(self.groups[row.name])

    def add_measurements(self, trusted: bool = False) -> None:
        """Add what takes a while: the loss by position, decoding speeds and greedy samples of each row."""
        for row in self.result.rows:
            add_position(row, self.groups[row.name], trusted)
            add_decoding(row, self.groups[row.name][0])


def baselines(groups: dict[str, list[Run]]) -> dict[str, str]:
    """For each row that is to be compared with another, the name of that one.

    Rows compare if they are of one size, and have read as many tokens of the same data in windows of one length. Where
    their kinds differ, the baseline is MHA, of several the row with the lowest validation loss; without MHA, the first.
    """
    alike: dict[tuple, list[str]] = {}
    for name, group in groups.items():
        first = group[0]
        keys = [first.keys[key] for key in (*SIZE, "model.seq_len")]
        alike.setdefault((*keys, first.figures["tokens_seen"], first.figures["data_fingerprint"]), []).append(name)
    found = {}
    for names in alike.values():
        if len({groups[name][0].kind for name in names}) == 1:
            continue
        mha = [name for name in names if groups[name][0].kind == "mha"]
        base = min(mha, key=lambda name: mean_val_loss(groups[name])) if mha else names[0]
        found |= {name: base for name in names if name != base}
    return found


def mean_val_loss(runs: list[Run]) -> float:
    """Of the finished ones."""
    return fmean(run.figures["val_loss"] for run in runs if not run.unfinished)


def cells_of(result: Result, across_data: bool) -> list[list[str]]:
    """The table: headings, then a row for each row, an estimate as its mean ± half of its 95% interval."""
    columns = [column for column in COLUMNS if not (across_data and column[0] in OF_ONE_TOKENIZER)]
    if not any(row.difference for row in result.rows):
        columns = [column for column in columns if column[0] not in SIGNED]
    heading = ["run", *(heading for _, heading, _ in columns)]
    return [heading, *([row.name, *(cell(key, row, result, form) for key, _, form in columns)] for row in result.rows)]


def cell(key: str, row: Row, result: Result, form: Callable[[Any], str]) -> str:
    value = value_of(key, row, result)
    if value is None or isinstance(value, Estimate):
        return shown_estimate(value, form, signed=key in SIGNED)
    return form(value)


def shown_estimate(value: Estimate | None, form: Callable[[Any], str], signed: bool = False) -> str:
    """A mean ± half of its 95% interval; the mean alone without one, and - for what was not measured."""
    if value is None:
        return "-"
    mean = "+" * (signed and value.mean > 0) + form(value.mean)
    return mean if value.half_width is None else f"{mean} ± {form(value.half_width)}"


def value_of(key: str, row: Row, result: Result) -> Any:
    if key == "kind":
        return row.kind
    if key == "seeds":
        return len(row.seeds)
    if key == "difference":
        return row.difference
    if key == "percent":
        return in_percent(row, result)
    return row.estimates.get(key, row.figures.get(key))


def in_percent(row: Row, result: Result) -> Estimate | None:
    """A row's difference in percent of its baseline's mean test loss."""
    share = result.relative_difference(row)
    return share and share.scaled(100)


def caption(runs: list[Run]) -> str:
    """What differs between the data of the runs, and what that means."""
    keys = [key for key in differing([run.config for run in runs]) if key.startswith(("data.", "init_from"))]
    return (
        f"Across data, only bits per byte compares; these differ in {', '.join(keys) or 'the text of their files'}.\n"
        "A validation sample is of data.val_tokens tokens, other text for other tokenizers; test is of a whole split."
    )


def remarks(result: Result, across_data: bool) -> list[str]:
    """Lines below the table: what its intervals mean, and what keeps the rows from comparing."""
    lines = []
    if any(len(row.seeds) > 1 for row in result.rows):
        lines.append("± is half the width of the 95% interval of the mean over seeds (Student's t).")
    if not across_data:
        lines += [about_difference(base, result) for base in dict.fromkeys(row.baseline for row in result.rows) if base]
    if len({row.figures["tokens_seen"] for row in result.rows}) > 1:
        lines.append("These runs have seen different numbers of tokens, which may be all that sets them apart.")
    for note, names in result.notes().items():
        lines.append(f"{'each row' if len(names) == len(result.rows) > 1 else joined(names)}: {note}.")
    return lines + [f"left out: {line}" for line in result.failed]


def about_difference(base: str, result: Result) -> str:
    rows = [row for row in result.rows if row.baseline == base]
    names = joined([row.name for row in rows])
    said = f"The difference of {names} is in test loss to {base} (nats per token), on the same seeds and windows."
    with_interval = any(row.difference and row.difference.half_width is not None for row in rows)
    return said + " Its 95% interval covers the choice of seeds and of windows." * with_interval


def every_run(comparison: Comparison) -> str:
    """All figures of each run, seeds apart, the settings by which the runs differ, and those of its row, as CSV."""
    keys = differing([run.config for run in comparison.runs])
    rows = {row.name: row for row in comparison.result.rows}
    row_of_run = {run.folder: rows[name] for name, group in comparison.groups.items() for run in group}
    lines = [
        {"run": run.folder.path}
        | {key: shown(run.keys[key]) for key in keys}
        | ({"finished": False} | run.figures)
        | (of_row(row_of_run[run.folder], comparison.result) if run.folder in row_of_run else {})
        for run in comparison.runs
    ]
    return csv_of(lines)


def of_row(row: Row, result: Result) -> dict[str, Any]:
    """The columns of `every_run` that are alike for all runs of a row."""
    estimates = {
        key: row.estimates.get(key) for key in ("val_loss", "test_loss", "val_bits_per_byte", "test_bits_per_byte")
    }
    estimates |= {"difference": row.difference, "difference_percent": in_percent(row, result)}
    cells = {"row": row.name, "row_seeds": len(row.seeds), "row_baseline": row.baseline}
    for key, value in estimates.items():
        ends = (None, None, None) if value is None else (value.mean, value.low, value.high)
        cells |= dict(zip((f"row_{key}", f"row_{key}_low", f"row_{key}_high"), ends, strict=True))
    return cells
