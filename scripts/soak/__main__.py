"""What the README promises, put to the test: `python -m scripts.soak`.

It takes about half an hour on two cores, and stops by itself. The status is 0 only where every row held; what did not
hold is said, and its files are kept.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from random import Random, SystemRandom
from types import ModuleType

from mla_lm.errors import UserError
from mla_lm.files import write_atomically
from mla_lm.terminal import cli
from mla_lm.terminal.tables import table
from scripts.bench.measure import setup
from scripts.soak import damage, disk, fuzz, hostile, killing, leaks, nonfinite, signals
from scripts.soak.programs import Broken
from scripts.soak.runs import prepare_root
from scripts.soak.trials import Row

MOST_SHOWN = 20  # failures of a row; all are in --json's file and in the folders that are kept
FOLDERS = ("XDG_CONFIG_HOME", "HYPOTHESIS_STORAGE_DIRECTORY")  # so that nothing is left among the user's files
ROWS: dict[str, ModuleType] = {
    "killing": killing,
    "damage": damage,
    "signals": signals,
    "disk": disk,
    "nonfinite": nonfinite,
    "hostile": hostile,
    "fuzz": fuzz,
    "leaks": leaks,
}


def parse() -> argparse.Namespace:
    parser = cli.Parser(prog="python -m scripts.soak", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small part of every row, in about a minute")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=ROWS, help=f"of {', '.join(ROWS)}")
    parser.add_argument("--seed", type=int, help="of all that is drawn (default: another one every time, printed)")
    parser.add_argument("--json", metavar="OUT", help="also write the figures there")
    return parser.parse_args()


def main() -> None:
    args = parse()
    names = args.only or list(ROWS)
    if "fuzz" in names and not find_spec("hypothesis"):
        raise UserError("the row fuzz needs hypothesis: pip install -r requirements-dev.txt")
    seed = SystemRandom().getrandbits(32) if args.seed is None else args.seed
    root = Path(tempfile.mkdtemp(prefix="soak-"))
    print(f"seed {seed}, files in {root}", flush=True)
    os.environ |= {name: str(root / name.lower()) for name in FOLDERS}
    prepare_root(root)
    rows, seconds = {}, {}
    for name in names:
        began = time.monotonic()
        try:
            rows[name] = ROWS[name].soak(root, root / name, args.quick, Random(f"{seed} {name}"))
        except Broken as seen:  # before its trials
            rows[name] = Row("", [str(seen)])
        seconds[name] = time.monotonic() - began
        report(name, rows[name], seconds[name])
    lines = [[ROWS[name].TEST, "yes" if not row.failures else "no", row.figure] for name, row in rows.items()]
    print(f"\n{table([('test', 'held', 'figure'), *lines], left=3)}")
    if args.json:
        write_json(Path(args.json), seed, args.quick, rows, seconds)
    if broken := [name for name, row in rows.items() if row.failures]:
        print(f"did not hold: {', '.join(broken)}; their files are in {root}", file=sys.stderr)
        sys.exit(1)
    shutil.rmtree(root)


def report(name: str, row: Row, seconds: float) -> None:
    print(f"{name:10} {'held' if not row.failures else 'DID NOT HOLD'} in {seconds:.0f} s: {row.figure}", flush=True)
    for failure in row.failures[:MOST_SHOWN]:
        print(f"  {failure}", flush=True)
    if (more := len(row.failures) - MOST_SHOWN) > 0:
        print(f"  and {more} more", flush=True)


def write_json(path: Path, seed: int, quick: bool, rows: dict[str, Row], seconds: dict[str, float]) -> None:
    figures = {
        name: {"test": ROWS[name].TEST, "figure": row.figure, "failures": row.failures, "seconds": seconds[name]}
        for name, row in rows.items()
    }
    text = json.dumps({"setup": setup(), "seed": seed, "quick": quick, "rows": figures}, indent=1)
    write_atomically(path, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    cli.run(main)
