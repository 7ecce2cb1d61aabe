"""Runs side by side: `python -m scripts.compare RUN RUN ...`; runs that differ in their seed alone become one row.

Several seeds give a mean with its 95% interval, and rows of different attention a difference of the test loss, paired
by seed and by test window. The first time, that measures the test losses of their runs.
"""

import argparse
import shlex
import sys
from pathlib import Path

from mla_lm.errors import UserError
from mla_lm.files import write_atomically
from mla_lm.study.collect import load, runs_in
from mla_lm.study.compare import Comparison, caption, cells_of, every_run, remarks
from mla_lm.study.row_figures import corpora_of
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
        "--out",
        metavar="DIR",
        help="also write comparison.md, comparison.csv (every run), comparison.png and the report there: report.html, "
        "the same as .md and .csv, and figures/",
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="with --out: also measure each row's loss by position and its decoding over growing contexts, and sample "
        "texts, for the report: minutes",
    )
    cli.add_trust(parser)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.measure and not args.out:
        raise UserError("--measure is for the report: add --out DIR, where it is to be written")
    runs = [load(folder) for folder in dict.fromkeys(folder for path in args.runs for folder in runs_in(path))]
    different = len(corpora_of(runs)) > 1
    if different and not args.across_data:
        raise UserError(
            "these runs have different corpora or tokenizers, so their perplexities do not compare: "
            "give runs of the same data, or --across-data for bits per byte alone"
        )
    comparison = Comparison(runs, f"python -m scripts.compare {shlex.join(sys.argv[1:])}", args.trust)
    cells = cells_of(comparison.result, args.across_data)
    above = [caption(runs), ""] if different else []
    below = remarks(comparison.result, args.across_data)
    below = ["", *below] if below else []
    say(*above, table(cells, left=2), *below)
    if args.out:
        if args.measure:
            comparison.add_measurements(args.trust)
        write_files(Path(args.out), comparison, [*above, markdown(cells, left=2), *below, ""], args.across_data)


def write_files(folder: Path, comparison: Comparison, lines: list[str], across_data: bool) -> None:
    """Write the comparison as Markdown, CSV and a plot, and the report.

    Args:
        lines: of the Markdown
    """
    from mla_lm.study.plot import plot  # needs a library, which the table does not
    from mla_lm.study.report import write_report

    comparison.add_curves()
    picture = plot(comparison.result.rows, "bits_per_byte" if across_data else "loss")
    write(folder / "comparison.md", printable("\n".join(lines)).encode())
    write(folder / "comparison.csv", every_run(comparison).encode())
    write(folder / "comparison.png", picture)
    say(f"written     {write_report(comparison.result, folder)}", file=sys.stderr)


def write(path: Path, content: bytes) -> None:
    write_atomically(path, lambda file: file.write(content))
    say(f"written     {path}", file=sys.stderr)  # the table alone goes into a pipe


if __name__ == "__main__":
    cli.run(main)
