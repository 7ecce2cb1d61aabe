"""Runs side by side: `python -m scripts.compare RUN RUN ...`; runs that differ in their seed alone become one row."""

import argparse
import csv
import io
import json
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from mla_lm import cli
from mla_lm.checkpoint import write_atomically
from mla_lm.config import flatten, is_incidental
from mla_lm.errors import UserError
from mla_lm.run import RunFolder, find_run

# key of summary.json, heading, format
COLUMNS = (
    ("attention", "attention", "{}"),
    ("parameters", "parameters", "{:,}"),
    ("tokens_seen", "tokens", "{:,}"),
    ("val_perplexity", "val ppl", "{:.2f}"),
    ("test_perplexity", "test ppl", "{:.2f}"),
    ("test_bits_per_byte", "test bits/byte", "{:.4f}"),
    ("kv_cache_bytes_per_token", "cache B/token", "{:,.0f}"),
    ("kv_cache_vs_mha", "vs MHA", "{:.3f}"),
    ("tokens_per_second", "tokens/s", "{:,.0f}"),
)


def parse() -> argparse.Namespace:
    parser = cli.Parser(prog="python -m scripts.compare", description=__doc__)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folders, or folders of runs (of a multirun)")
    parser.add_argument("--out", metavar="DIR", help="also write comparison.md and comparison.csv (every run) there")
    return parser.parse_args()


def main() -> None:
    args = parse()
    runs = [run for path in args.runs for run in runs_in(path)]
    summaries = {run: summary_of(run) for run in runs}
    if len({summary["data_fingerprint"] for summary in summaries.values()}) > 1:
        raise UserError(
            "these runs have different corpora or tokenizers, so their perplexities do not compare: "
            "give runs of the same data"
        )
    table = markdown([row_of(group, summaries) for group in same_but_for_seed(runs)])
    print(table)
    if args.out:
        write(Path(args.out) / "comparison.md", table + "\n")
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, ["run", *next(iter(summaries.values()))])
        writer.writeheader()
        writer.writerows({"run": run.path, **summary} for run, summary in summaries.items())
        write(Path(args.out) / "comparison.csv", text.getvalue())


def runs_in(path: str) -> list[RunFolder]:
    """The run that a path names, or the runs side by side in a folder."""
    parent = Path(path).expanduser().absolute()
    children = sorted(parent.glob("*/config.yaml"))
    if children and not (parent / "config.yaml").exists():
        return [RunFolder(child.parent) for child in children]
    return [find_run(path)[0]]


def summary_of(run: RunFolder) -> dict[str, Any]:
    """summary.json of a run that came to its end."""
    summary = run.summary()
    if not summary.get("finished"):
        raise UserError(f"{run.path} has not finished: python train.py ckpt_path={run.path} goes on with it")
    return summary


def same_but_for_seed(runs: list[RunFolder]) -> list[list[RunFolder]]:
    """Runs grouped by all of their configuration that means something, the seed apart; in the order of the first."""
    groups = defaultdict(list)
    for run in runs:
        config = flatten(asdict(run.config()))
        steps = config["trainer.max_steps"]
        kept = {key: value for key, value in config.items() if not is_incidental(key) and key != "seed"}
        groups[json.dumps([steps, kept], sort_keys=True)].append(run)
    return list(groups.values())


def row_of(group: list[RunFolder], summaries: dict[RunFolder, dict[str, Any]]) -> list[str]:
    """A row of the table: of one run, or the mean and the standard deviation over several seeds."""
    name = group[0].path.name if len(group) == 1 else f"{group[0].path.name} + {len(group) - 1} seeds"
    cells = [name]
    for key, _, form in COLUMNS:
        values = [summaries[run][key] for run in group]
        if None in values:
            cells.append("-")
        elif len(set(values)) == 1:
            cells.append(form.format(values[0]))
        else:
            cells.append(f"{form.format(mean(values))} ± {form.format(stdev(values))}")
    return cells


def markdown(rows: list[list[str]]) -> str:
    """A table in Markdown, its columns padded so that it reads as well on a terminal."""
    rows = [["run", *(heading for _, heading, _ in COLUMNS)], *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def write(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    cli.run(main)
