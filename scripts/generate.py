"""Continue a prompt with a trained run: `python -m scripts.generate RUN --prompt "Once upon a time"`."""

import argparse
import sys
import time
from pathlib import Path

import torch

from mla_lm import cli
from mla_lm.data.tokenizer import decode, encode, end_of_text_id
from mla_lm.errors import UserError
from mla_lm.generate import generate
from mla_lm.report import human_bytes
from mla_lm.run import load_run


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.generate", description=__doc__)
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
    model, tokenizer, config = load_run(args.run, "cuda" if torch.cuda.is_available() else "cpu")
    end = end_of_text_id(tokenizer, config.data.tokenizer.end_of_text)
    prompt = [end, *encode(tokenizer, read_prompt(args))]  # a document begins after the end of another
    if len(prompt) >= model.config.seq_len:
        raise UserError(f"the prompt has {len(prompt)} tokens, the model reads {model.config.seq_len}: shorten it")
    if args.max_tokens < 1 or args.temperature < 0 or (args.top_k or 1) < 1:
        raise UserError("--max-tokens and --top-k must be at least 1, --temperature at least 0")
    device = model.embedding.weight.device
    generator = torch.Generator(device).manual_seed(args.seed)
    ids: list[int] = []
    text = decode(tokenizer, prompt[1:])
    print(text, end="", flush=True)
    start = time.perf_counter()
    for token in generate(
        model, torch.tensor([prompt], device=device), args.max_tokens, args.temperature, args.top_k, generator
    ):
        if token.item() == end:
            break
        ids.append(token.item())
        longer = decode(tokenizer, prompt[1:] + ids)
        if not longer.endswith("\N{REPLACEMENT CHARACTER}"):  # a character of several tokens is shown when whole
            print(longer[len(text) :], end="", flush=True)
            text = longer
    seconds = time.perf_counter() - start
    filled = len(prompt) + len(ids)
    per_token = model.new_cache(1, 1).nbytes
    print(
        f"\n\n{len(ids)} tokens, {len(ids) / seconds:.0f} tokens/s; KV cache of {filled} tokens: "
        f"{human_bytes(per_token * filled)}",
        file=sys.stderr,
    )


def read_prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None:
        return args.prompt
    if args.prompt_file is None:
        return sys.stdin.read()
    try:
        return Path(args.prompt_file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt-file {args.prompt_file} cannot be read: {error}") from error


if __name__ == "__main__":
    cli.run(main)
