"""Speed and memory beside peers on this machine: `python -m scripts.bench train|decode|loader|...`; each has a --help.

Contenders take turns (A B C A B C), since other work on a machine slows whoever runs at the time, and figures are
medians. A ratio is ours over the peer's.
"""

import argparse
import json
from pathlib import Path

from mla_lm.files import write_atomically
from mla_lm.terminal import cli
from mla_lm.terminal.tables import table
from scripts.bench import attention, checkpoint, crossover, decode, gpu, loader, loss, shakespeare, start, train
from scripts.bench.measure import cell, cells, setup

COMMANDS = {
    "train": train,
    "decode": decode,
    "crossover": crossover,
    "loss": loss,
    "attention": attention,
    "loader": loader,
    "start": start,
    "checkpoint": checkpoint,
    "shakespeare": shakespeare,
    "gpu": gpu,
}


def parse() -> argparse.Namespace:
    parser = cli.Parser(prog="python -m scripts.bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.DESCRIPTION.strip().splitlines()[0],
            description=module.DESCRIPTION,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.add_argument("--json", metavar="OUT", help="also write all figures to this file")
        command.set_defaults(bench=module.bench)
    return parser.parse_args()


def main() -> None:
    args = vars(parse())
    bench, out = args.pop("bench"), args.pop("json")
    described = setup()
    for line in (described, args):
        print(" ".join(f"{name}={value}" for name, value in line.items()))
    result = bench(argparse.Namespace(**args))
    rows = result["rows"]
    print(table(cells(rows)))
    for name, value in result["ratios"].items():
        print(f"ratio to {name}: {', '.join(map(cell, value)) if isinstance(value, list) else cell(value)}")
    if out:
        text = json.dumps({"setup": described, "arguments": args, **result}, indent=1)
        write_atomically(Path(out), lambda file: file.write(text.encode()))


if __name__ == "__main__":
    cli.run(main)
