"""Runs side by side: `python -m scripts.compare RUN RUN ...`."""

import argparse
import csv
from pathlib import Path
from typing import Any

from mla_lm import cli
from mla_lm.errors import UserError
from mla_lm.run import find_run

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
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folders")
    parser.add_argument("--out", metavar="DIR", help="also write comparison.md and comparison.csv there")
    return parser.parse_args()


def main() -> None:
    args = parse()
    summaries = [read_summary(path) for path in args.runs]
    if len({summary["data_fingerprint"] for summary in summaries}) > 1:
        raise UserError(
            "these runs have different corpora or tokenizers, so their perplexities do not compare: "
            "give runs of the same data"
        )
    names = [Path(path).resolve().name for path in args.runs]
    print(markdown(names, summaries))
    if args.out:
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        (out / "comparison.md").write_text(markdown(names, summaries) + "\n")
        with open(out / "comparison.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, ["run", *summaries[0]])
            writer.writeheader()
            writer.writerows({"run": name, **summary} for name, summary in zip(names, summaries, strict=True))


def read_summary(path: str) -> dict[str, Any]:
    """summary.json of a run that came to its end."""
    run, _ = find_run(path)
    summary = run.summary()
    if not summary.get("finished"):
        raise UserError(f"{run.path} has not finished: python train.py ckpt_path={run.path} goes on with it")
    return summary


def markdown(names: list[str], summaries: list[dict[str, Any]]) -> str:
    """A table in Markdown, its columns padded so that it reads as well on a terminal."""
    rows = [["run", *(heading for _, heading, _ in COLUMNS)]]
    for name, summary in zip(names, summaries, strict=True):
        cells = [("-" if summary[key] is None else form.format(summary[key])) for key, _, form in COLUMNS]
        rows.append([name, *cells])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
