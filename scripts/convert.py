"""Turn a trained MHA, GQA or MQA run into one of MLA with a smaller cache: `python -m scripts.convert RUN OUT ...`.

The new run does what RUN does, as nearly as its latent allows; `train.py init_from=OUT` then heals what was lost. The
latent's directions are chosen on text: RUN's own, or that of --files.
"""

import argparse
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from mla_lm.config import TrainConfig
from mla_lm.data.tokenizer import token_bytes
from mla_lm.data.windows import EvaluationWindows
from mla_lm.errors import UserError
from mla_lm.files import check_free
from mla_lm.hardware import DTYPES
from mla_lm.inference.evaluate import metrics_of, sums_over
from mla_lm.inference.texts import tokens_of_files, tokens_of_split
from mla_lm.interop.from_mha import convert, converted_config
from mla_lm.model.size import model_size
from mla_lm.model.transformer import Transformer
from mla_lm.runs.checkpoint import load_checkpoint
from mla_lm.runs.folder import RunFolder, find_best, find_run, write_model
from mla_lm.runs.load import load_run
from mla_lm.runs.trust import is_signed, sign
from mla_lm.terminal import cli
from mla_lm.terminal.plain_text import say

CALIBRATION_TOKENS = 2**16  # second moments of a few hundred dimensions have settled by then


def parse() -> argparse.Namespace:
    parser = cli.Parser(
        prog="python -m scripts.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", help="a run folder, or a checkpoint in one")
    parser.add_argument("out", metavar="OUT", help="the new run: a folder that is new or empty")
    parser.add_argument("--kv-compressed-dim", type=int, required=True, metavar="N", help="elements of the latent")
    parser.add_argument(
        "--rope-dim", type=int, required=True, metavar="M", help="elements of the shared key that stay rotated"
    )
    parser.add_argument(
        "--plain-rope",
        action="store_true",
        help="keep the rotated part such that scripts.export takes the new run, at the cost of more to be healed",
    )
    parser.add_argument("--files", metavar="GLOB", help="text to convert and measure on (default: RUN's own)")
    cli.add_trust(parser)
    return parser.parse_args()


def main() -> None:
    args = parse()
    out = Path(args.out).expanduser()
    check_free(out)
    model, tokenizer, config = load_run(args.run)
    sizes = (args.kv_compressed_dim, args.rope_dim, args.plain_rope)
    converted_config(model.config, *sizes)  # refuses before anything is read
    calibration, measured = texts(args, tokenizer, config)
    converted = convert(model, calibration, *sizes)
    checkpoint = load_checkpoint(find_best(args.run)[1])
    kept = {key: checkpoint[key] for key in ("data_fingerprint",) if key in checkpoint}  # an imported model has none
    made = replace(config, model=converted.config)
    write_model(out, made, tokenizer, {"state_dict": converted.state_dict(), **kept})
    if args.trust or is_signed(find_run(args.run)[0]):
        sign(RunFolder(out), made)

    for name, net in ((args.run, model), (args.out, converted)):
        say(f"{name}: {figures(net, measured, tokenizer, config)}")
    path = shlex.quote(args.out)
    options = "optimizer=adamw optimizer.lr=5e-4 trainer.max_steps=200"
    say(f"heal        python train.py init_from={path} data=... {options}")
    say(f'sample      python -m scripts.generate {path} --prompt "..."')


def texts(
    args: argparse.Namespace, tokenizer: Tokenizer, config: TrainConfig
) -> tuple[torch.Tensor, EvaluationWindows]:
    """Windows (N, seq_len) to convert on, and others to measure on."""
    seq_len = config.model.seq_len
    if args.files:
        tokens = tokens_of_files(args.files, config.data.column, tokenizer, config)
        cut = len(tokens) * 9 // 10
        train, rest, name = tokens[:cut], tokens[cut:], args.files
    else:
        train, rest = (
            tokens_of_split(args.run, split, tokenizer, config, args.trust) for split in ("train", "validation")
        )
        name = "validation"
    if len(train) < config.model.d_model:
        raise UserError(f"{name} has {len(train)} tokens to convert on: give at least {config.model.d_model}")
    windows = min(CALIBRATION_TOKENS, len(train)) // seq_len or 1
    starts = np.linspace(0, max(0, len(train) - seq_len), windows, dtype=np.int64)  # spread over all of it
    calibration = np.stack([train[start : start + seq_len] for start in starts]).astype(np.int64)
    return torch.from_numpy(calibration), EvaluationWindows(rest, seq_len, config.data.val_tokens, name)


def figures(net: Transformer, windows: EvaluationWindows, tokenizer: Tokenizer, config: TrainConfig) -> str:
    """Quality of a model, in fp32, and the size of its cache."""
    sums = sums_over(net, windows, torch.from_numpy(token_bytes(tokenizer)), config.evaluation_batch_size)
    metrics, size = metrics_of(sums.sum(-1)), model_size(net.config)
    cache = size.cache_bytes_per_token(net.config.num_layers, DTYPES[config.trainer.precision])
    return (
        f"{size.attention}, {metrics['loss']:.4f} nats per token, {metrics['bits_per_byte']:.4f} bits per byte, "
        f"{cache:,} bytes of cache per token"
    )


if __name__ == "__main__":
    cli.run(main)
