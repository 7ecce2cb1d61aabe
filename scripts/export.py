"""Write a run as a folder that `transformers` loads without further code, and say which engines take it.

MLA becomes a DeepseekV3ForCausalLM, MHA, GQA and MQA a LlamaForCausalLM.
"""

import argparse
import shlex
import sys
from pathlib import Path

import torch

from mla_lm.data.windows import EvaluationWindows
from mla_lm.errors import UserError
from mla_lm.inference.texts import tokens_of_split
from mla_lm.interop.hf.check import compare_with_transformers
from mla_lm.interop.hf.engines import engines_for
from mla_lm.interop.hf.folder import export_run
from mla_lm.runs.load import load_run
from mla_lm.terminal import cli
from mla_lm.terminal.plain_text import say
from mla_lm.terminal.tables import table


def parse() -> argparse.Namespace:
    parser = cli.Parser(prog="python -m scripts.export", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="a run folder (its best checkpoint), or a checkpoint in one")
    parser.add_argument("out", metavar="OUT", help="a folder that is new or empty")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights (default: %(default)s)"
    )
    parser.add_argument(
        "--check", action="store_true",
        help="have transformers load it in a process of its own, and compare the loss on the run's test split and a "
        "greedy continuation",
    )  # fmt: skip
    cli.add_trust(parser)
    return parser.parse_args()


def main() -> None:
    args = parse()
    out = Path(args.out).expanduser()
    if args.check and args.dtype != "float32":
        raise UserError(f"--check compares in fp32: leave out --dtype {args.dtype}")
    config = export_run(args.run, out, getattr(torch, args.dtype))
    say(f"written     {shlex.quote(str(out))}: model.safetensors in {args.dtype}, tokenizer, README.md")
    say(f'load        AutoModelForCausalLM.from_pretrained("{out}")')
    verdicts = [(verdict.engine, verdict.word, "; ".join(verdict.notes)) for verdict in engines_for(config.model)]
    say("", table([("engine", "takes it", "note"), *verdicts], left=3), "")
    if args.check:
        model, tokenizer, config = load_run(args.run)
        tokens = tokens_of_split(args.run, "test", tokenizer, config, args.trust)
        windows = torch.stack(list(EvaluationWindows(tokens, config.model.seq_len, split="test")))
        agrees, figures = compare_with_transformers(model, out, windows)
        say(f"check       {figures}")
        if not agrees:
            sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
