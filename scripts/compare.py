"""Runs side by side: `python -m scripts.compare RUN RUN ...`; runs that differ in their seed alone become one row."""

import argparse
import sys
from pathlib import Path

from mla_lm.errors import UserError
from mla_lm.files import write_atomically
from mla_lm.study.compare import (
    COLUMNS,
    OF_ONE_TOKENIZER,
    caption,
    cells_of,
    every_run,
    load,
    named_rows,
    runs_in,
    same_but_for_seed,
)
from mla_lm.terminal import cli
from mla_lm.terminal.plain_text import printable, say
from mla_lm.terminal.tables import markdown, table


def parse() -> argparse.Namespace:
    parser = cli.Parser(prog="python -m scripts.compare", description=__doc__)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folders, or folders of runs (of a multirun)")
    parser.add_argument(
        "--across-data",
        action="store_true",
        help="runs of different corpora or tokenizers too, by bits per byte alone, since perplexities do not compare",
    )
    parser.add_argument(
        "--out", metavar="DIR", help="also write comparison.md, comparison.csv (every run) and comparison.png there"
    )
    return parser.parse_args()


def main() -> None:
    args = parse()
    runs = [load(folder) for folder in dict.fromkeys(folder for path in args.runs for folder in runs_in(path))]
    different = len({run.figures["data_fingerprint"] for run in runs}) > 1
    if different and not args.across_data:
        raise UserError(
            "these runs have different corpora or tokenizers, so their perplexities do not compare: "
            "give runs of the same data, or --across-data for bits per byte alone"
        )
    rows = named_rows(same_but_for_seed(runs))
    columns = [column for column in COLUMNS if not (args.across_data and column[0] in OF_ONE_TOKENIZER)]
    cells = [["run", *(heading for _, heading, _ in columns)]]
    cells += [[name, *cells_of(row, columns)] for name, row in rows.items()]
    above, below = [], []
    if different:
        above = [caption(runs), ""]
    if len({run.figures["tokens_seen"] for run in runs}) > 1:
        below = ["", "These runs have seen different numbers of tokens, which may be all that sets them apart."]
    say(*above, table(cells, left=2), *below)
    if args.out:
        from mla_lm.study.plot import plot  # needs matplotlib, which the table does not

        lines = (*above, markdown(cells, left=2), *below, "")
        write(Path(args.out) / "comparison.md", printable("\n".join(lines)).encode())
        write(Path(args.out) / "comparison.csv", every_run(runs).encode())
        folders = {name: [run.folder for run in row] for name, row in rows.items()}
        write(Path(args.out) / "comparison.png", plot(folders, "bits_per_byte" if args.across_data else "loss"))


def write(path: Path, content: bytes) -> None:
    write_atomically(path, lambda file: file.write(content))
    say(f"written     {path}", file=sys.stderr)  # the table alone goes into a pipe


if __name__ == "__main__":
    cli.run(main)
