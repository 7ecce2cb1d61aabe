"""Continue a prompt with a trained run: `python -m scripts.generate RUN --prompt "Once upon a time"`."""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from mla_lm import cli
from mla_lm.data.tokenizer import decode, encode, end_of_text_id
from mla_lm.errors import UserError
from mla_lm.generate import generate
from mla_lm.hardware import DTYPES, choose_accelerator, inference_autocast
from mla_lm.report import human_bytes
from mla_lm.run import load_run


def parse() -> argparse.Namespace:
    parser = cli.Parser(prog="python -m scripts.generate", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="a run folder, or a checkpoint in one")
    parser.add_argument("--prompt", help="text to continue; without it and --prompt-file, standard input")
    parser.add_argument("--prompt-file", metavar="FILE", help="a UTF-8 file with the text to continue")
    parser.add_argument("--max-tokens", type=int, default=128, help="new tokens at most (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest (default: %(default)s)")
    parser.add_argument("--top-k", type=int, help="sample among this many likeliest tokens only")
    parser.add_argument("--seed", type=int, default=1, help="of the sampling (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.max_tokens < 1 or not args.temperature >= 0 or (args.top_k is not None and args.top_k < 1):
        raise UserError("--max-tokens and --top-k must be at least 1, --temperature at least 0")
    device, _ = choose_accelerator("auto")
    model, tokenizer, config = load_run(args.run, device)
    end = end_of_text_id(tokenizer, config.data.tokenizer.end_of_text)
    prompt = [end, *encode(tokenizer, read_prompt(args))]  # a document begins after the end of another
    if len(prompt) >= model.config.seq_len:
        raise UserError(f"the prompt has {len(prompt)} tokens, the model reads {model.config.seq_len}: shorten it")
    precision = config.trainer.precision
    tokens = generate(
        model,
        torch.tensor([prompt], device=device),
        args.max_tokens,
        args.temperature,
        args.top_k,
        torch.Generator(device).manual_seed(args.seed),
        DTYPES[precision],
    )
    start = time.perf_counter()
    with inference_autocast(device, precision):
        count = stream(tokens, prompt[1:], end, tokenizer)
    seconds = time.perf_counter() - start
    cache_bytes = model.new_cache(1, len(prompt) + count, DTYPES[precision]).nbytes
    print(
        f"\n\n{count} tokens, {count / seconds:.0f} tokens/s; "
        f"KV cache of {len(prompt) + count} tokens: {human_bytes(cache_bytes)}",
        file=sys.stderr,
    )


def stream(tokens: Iterator[Tensor], prompt: list[int], end: int, tokenizer: Tokenizer) -> int:
    """Print the prompt and what follows as it comes, up to the end of the document; return how many tokens came."""
    ids, shown = list(prompt), decode(tokenizer, prompt)
    print(shown, end="", flush=True)
    for token in tokens:
        if token.item() == end:
            break
        ids.append(token.item())
        text = decode(tokenizer, ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character of several tokens is shown when whole
            print(text[len(shown) :], end="", flush=True)
            shown = text
    return len(ids) - len(prompt)


def read_prompt(args: argparse.Namespace) -> str:
    """The text to continue, wherever it is given; UserError where it is not UTF-8 or cannot be read."""
    try:
        if args.prompt is not None:
            return os.fsencode(args.prompt).decode()
        if args.prompt_file is not None:
            return Path(args.prompt_file).read_text(encoding="utf-8")
        return sys.stdin.buffer.read().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the prompt cannot be read: {error}") from error


if __name__ == "__main__":
    cli.run(main)
