"""Write a run as a folder that `transformers` loads without further code, and say which engines take it.

MLA becomes a DeepseekV3ForCausalLM, MHA, GQA and MQA a LlamaForCausalLM.
"""

import argparse
import shlex
from pathlib import Path

import torch

from mla_lm import cli
from mla_lm.hf.engines import engines_for
from mla_lm.hf.folder import export_run


def parse() -> argparse.Namespace:
    parser = cli.Parser(prog="python -m scripts.export", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="a run folder (its best checkpoint), or a checkpoint in one")
    parser.add_argument("out", metavar="OUT", help="a folder that is new or empty")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights (default: %(default)s)"
    )
    return parser.parse_args()


def main() -> None:
    args = parse()
    out = Path(args.out).expanduser()
    config = export_run(args.run, out, getattr(torch, args.dtype))
    print(f"written     {shlex.quote(str(out))}: model.safetensors in {args.dtype}, tokenizer, README.md")
    print(f'load        AutoModelForCausalLM.from_pretrained("{out}")')
    print("engines")
    for verdict in engines_for(config.model):
        print(f"  {verdict.engine:14}{verdict.word}")
        for note in verdict.notes:
            print(f"{'':16}{note}")


if __name__ == "__main__":
    cli.run(main)
