"""Loss, perplexity and bits per byte of a trained run: `python -m scripts.evaluate RUN`."""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.utils.data import DataLoader

from mla_lm import cli
from mla_lm.checkpoint import load_checkpoint, write_atomically
from mla_lm.config import TrainConfig
from mla_lm.data.sources import SPLITS, find_files
from mla_lm.data.store import Tokens, open_store
from mla_lm.data.text_files import check_format, read_file
from mla_lm.data.tokenizer import encode, end_of_text_id, token_bytes
from mla_lm.data.windows import EvaluationWindows
from mla_lm.errors import UserError
from mla_lm.evaluate import metrics_of, totals_of
from mla_lm.hardware import choose_accelerator, inference_autocast
from mla_lm.run import find_best, load_run


def parse() -> argparse.Namespace:
    parser = cli.Parser(prog="python -m scripts.evaluate", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="a run folder (its best checkpoint), or a checkpoint in one")
    parser.add_argument("--split", choices=SPLITS, default="test", help="of the run's corpus (default: %(default)s)")
    parser.add_argument("--files", metavar="GLOB", help="your own text files instead, with the run's tokenizer")
    parser.add_argument("--column", help="of .jsonl, .json and .parquet files (default: the run's data.column)")
    parser.add_argument("--json", metavar="OUT", help="also write the figures there")
    return parser.parse_args()


def main() -> None:
    args = parse()
    device, _ = choose_accelerator("auto")
    model, tokenizer, config = load_run(args.run, device)
    if args.files:
        tokens = tokens_of_files(args.files, args.column or config.data.column, tokenizer, config)
    else:
        tokens = tokens_of_split(args.run, args.split, tokenizer, config)
    windows = EvaluationWindows(tokens, config.model.seq_len, split=args.files or args.split)
    lengths = torch.from_numpy(token_bytes(tokenizer)).to(device)
    totals = torch.zeros(3, dtype=torch.float64)
    with torch.no_grad(), inference_autocast(device, config.trainer.precision):
        for batch in DataLoader(windows, batch_size=config.micro_batch_size):
            totals += totals_of(model, batch.to(device), lengths)
    if not totals[2]:
        raise UserError(f"{args.files or args.split} has no text to predict: give more")
    figures = {"run": str(args.run), "text": args.files or args.split, "tokens": int(totals[1]), **metrics_of(totals)}
    for name, value in figures.items():
        print(f"{name:14}{value:.4f}" if isinstance(value, float) else f"{name:14}{value}")
    if args.json:
        text = json.dumps(figures, indent=2) + "\n"
        write_atomically(Path(args.json), lambda file: file.write(text.encode()))


def tokens_of_split(run: str, split: str, tokenizer: Tokenizer, config: TrainConfig) -> Tokens:
    """A split of the very data that the run was trained on; UserError where they have changed."""
    store = open_store(config.data, tokenizer if config.init_from else None)
    if store.fingerprint != load_checkpoint(find_best(run)[1])["data_fingerprint"]:
        raise UserError(f"the data of {run} have changed since ({store.description}): restore them, or give --files")
    return store.tokens(split)


def tokens_of_files(files: str, column: str, tokenizer: Tokenizer, config: TrainConfig) -> np.ndarray:
    """All documents of the files, each followed by the end-of-text token."""
    end = end_of_text_id(tokenizer, config.data.tokenizer.end_of_text)
    tokens: list[int] = []
    for path in find_files(files):
        check_format(path)
        for text, ends in read_file(path, column):
            tokens += encode(tokenizer, text) + [end] * ends
    return np.array(tokens)


if __name__ == "__main__":
    cli.run(main)
