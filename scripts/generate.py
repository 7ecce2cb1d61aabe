"""Continue prompts with a trained run, through its KV cache.

Several prompts are continued at once, in one batch. Without a prompt, standard input is one; on a terminal every line
is one, until Ctrl-D. An empty prompt begins a new document.
"""

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
from mla_lm.config import TrainConfig
from mla_lm.data.tokenizer import decode, encode, end_of_text_id
from mla_lm.errors import UserError
from mla_lm.generate import NOTHING, check_sampling, generate
from mla_lm.hardware import DTYPES, choose_accelerator, inference_autocast
from mla_lm.report import human_bytes
from mla_lm.run import load_run
from mla_lm.transformer import Transformer

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
BETWEEN_TEXTS = "\n\n---\n\n"
EXAMPLES = r"""examples:
  python -m scripts.generate RUN --prompt "Once upon a time" --temperature 0 --max-tokens 64
  python -m scripts.generate RUN --prompt "def " --prompt "import " --top-p 0.9 --stop $'\n\n'
  python -m scripts.generate RUN < prompt.txt
"""


def parse() -> argparse.Namespace:
    parser = cli.Parser(
        prog="python -m scripts.generate",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="a run folder, or a checkpoint in one")
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--prompt", action="append", help="text to continue; may be given several times")
    given.add_argument("--prompt-file", metavar="FILE", help="a UTF-8 file with the text to continue")
    parser.add_argument(
        "--max-tokens", type=int, default=128, help="new tokens of each prompt at most (default: %(default)s)"
    )
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest (default: %(default)s)")
    parser.add_argument("--top-k", type=int, metavar="K", help="sample among the K likeliest tokens only")
    parser.add_argument("--top-p", type=float, metavar="P", help="among the fewest that have the share P together")
    parser.add_argument("--min-p", type=float, metavar="P", help="among those P times as likely as the likeliest")
    parser.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="X", help="above 1, fewer repetitions (default: 1)"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the sampling (default: %(default)s)")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times"
    )
    return parser.parse_args()


def main() -> None:
    args = parse()
    check(args)
    device, _ = choose_accelerator("auto")
    model, tokenizer, config = load_run(args.run, device)
    generator = torch.Generator(device).manual_seed(args.seed)
    if args.prompt is not None or args.prompt_file is not None or not sys.stdin.isatty():
        continue_prompts(read_prompts(args), model, tokenizer, config, args, generator)
        return
    for line in typed_lines():
        try:
            continue_prompts([line], model, tokenizer, config, args, generator)
        except UserError as error:  # one line too long need not end the conversation
            cli.report(error)


def check(args: argparse.Namespace) -> None:
    """Raises UserError for an option that cannot be, before anything is loaded."""
    check_sampling(**{name: getattr(args, name) for name in SAMPLING})
    if args.max_tokens < 1:
        raise UserError(f"--max-tokens {args.max_tokens} must be at least 1")
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed {args.seed} must be at least 0 and below 2**32")
    if "" in args.stop:
        raise UserError("--stop needs a text that is not empty")


def continue_prompts(
    prompts: list[str],
    model: Transformer,
    tokenizer: Tokenizer,
    config: TrainConfig,
    args: argparse.Namespace,
    generator: torch.Generator,
) -> None:
    """Print each prompt with its continuation, then the speed and the cache's size on stderr."""
    end, seq_len = end_of_text_id(tokenizer, config.data.tokenizer.end_of_text), model.config.seq_len
    texts = []
    for prompt in prompts:
        ids = encode(tokenizer, prompt)
        if len(ids) + 1 >= seq_len:
            raise UserError(f"the prompt has {len(ids) + 1} tokens, the model reads {seq_len}: shorten it")
        room = min(args.max_tokens, seq_len - len(ids) - 1)
        texts.append(Continuation(tokenizer, ids, end, room, args.stop, BETWEEN_TEXTS if texts else ""))
    precision, device = config.trainer.precision, generator.device
    steps = generate(
        model,
        [torch.tensor([end, *text.ids], device=device) for text in texts],  # a document begins after another's end
        args.max_tokens,
        **{name: getattr(args, name) for name in SAMPLING},
        generator=generator,
        dtype=DTYPES[precision],
    )
    start = time.perf_counter()
    with inference_autocast(device.type, precision):
        stream(steps, texts)
    seconds = time.perf_counter() - start
    new, stored = sum(text.new for text in texts), sum(len(text.ids) + 1 for text in texts)
    cache_bytes = model.new_cache(1, stored, DTYPES[precision]).nbytes
    print("\n", flush=True)
    print(
        f"{new} tokens, {new / seconds:.0f} tokens/s; KV cache of {stored} tokens: {human_bytes(cache_bytes)}",
        file=sys.stderr,
    )


class Continuation:
    """One prompt's text as it grows: up to the end of the document, the first stop string, or `room` new tokens.

    Args:
        ids: of the prompt
        end: id that ends a document
        room: new tokens at most, at least 1
        stops: texts that end it; they are not shown, and one that begins in the prompt does not count
        heading: shown before it
    """

    def __init__(self, tokenizer: Tokenizer, ids: list[int], end: int, room: int, stops: list[str], heading: str = ""):
        self.tokenizer, self.end, self.room, self.stops, self.heading = tokenizer, end, room, stops, heading
        self.ids = list(ids)
        self.text = decode(tokenizer, ids)
        self.prompt_length = len(self.text)
        self.new = 0  # tokens that came
        self.shown = 0  # characters that `unshown` has given, the heading's among them
        self.done = False

    def add(self, token: int) -> None:
        if token == self.end:
            self.done = True
            return
        self.ids.append(token)
        self.new += 1
        self.text = decode(self.tokenizer, self.ids)
        found = [self.text.find(stop, self.prompt_length) for stop in self.stops]
        if stopped := [at for at in found if at >= 0]:
            self.text = self.text[: min(stopped)]
        self.done = bool(stopped) or self.new == self.room

    def unshown(self) -> str:
        """What has settled since the last call."""
        settled = self.heading + self._settled()
        new, self.shown = settled[self.shown :], max(self.shown, len(settled))
        return new

    def _settled(self) -> str:
        """All but what later tokens may change: a character that is not whole, and the beginning of a stop string."""
        text = self.text.rstrip("\N{REPLACEMENT CHARACTER}")
        if self.done:
            return text
        most = len(text) - self.prompt_length
        held = (n for stop in self.stops for n in range(1, len(stop)) if n <= most and text.endswith(stop[:n]))
        return text[: len(text) - max(held, default=0)]


def stream(steps: Iterator[Tensor], texts: list[Continuation]) -> None:
    """Print the texts as they grow; each after those before it are done, as they all grow at once."""
    print_settled(texts)
    for ids in steps:
        for text, token in zip(texts, ids.tolist(), strict=True):
            if token != NOTHING and not text.done:
                text.add(token)
        print_settled(texts)
        if all(text.done for text in texts):
            return


def print_settled(texts: list[Continuation]) -> None:
    for text in texts:
        print(text.unshown(), end="", flush=True)
        if not text.done:
            return


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The texts to continue, wherever they are given; UserError where one is not UTF-8 or cannot be read."""
    try:
        if args.prompt is not None:
            return [os.fsencode(prompt).decode() for prompt in args.prompt]
        if args.prompt_file is not None:
            return [Path(args.prompt_file).read_text(encoding="utf-8")]
        return [sys.stdin.buffer.read().decode()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the prompt cannot be read: {error}") from error


def typed_lines() -> Iterator[str]:
    """What is typed, line by line, up to Ctrl-D."""
    print("Each line is continued; Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            yield os.fsencode(input("> ")).decode()
        except EOFError:
            print()
            return
        except UnicodeDecodeError as error:
            cli.report(UserError(f"the prompt cannot be read: {error}"))


if __name__ == "__main__":
    cli.run(main)
