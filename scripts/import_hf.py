"""Make a run of a model in `transformers`' format: an MLA model of DeepSeek's kind with dense layers, or a Llama.

`train.py init_from=RUN` fine-tunes it; generate, evaluate --files and export take it like any other run. Rows of the
embedding that belong to no token of tokenizer.json are left out: every token keeps its logit, and none but the
tokenizer's are sampled or count in the loss.
"""

import argparse
import shlex
from pathlib import Path

from mla_lm.interop.hf.folder import import_folder
from mla_lm.model.size import model_size
from mla_lm.terminal import cli
from mla_lm.terminal.plain_text import say


def parse() -> argparse.Namespace:
    parser = cli.Parser(prog="python -m scripts.import_hf", description=__doc__)
    parser.add_argument("folder", metavar="DIR", help="with config.json, tokenizer.json and model.safetensors")
    parser.add_argument("run", metavar="RUN", help="a folder that is new or empty")
    return parser.parse_args()


def main() -> None:
    args = parse()
    run = Path(args.run).expanduser()
    config = import_folder(Path(args.folder).expanduser(), run)
    size, path = model_size(config.model), shlex.quote(str(run))
    say(f"imported    {size.attention}, {size.parameters:,} parameters, a context of {config.model.seq_len:,} tokens")
    say(f'sample      python -m scripts.generate {path} --prompt "..."')
    say(f"fine-tune   python train.py init_from={path} data=text data.files=... optimizer=adamw optimizer.lr=3e-4")


if __name__ == "__main__":
    cli.run(main)
