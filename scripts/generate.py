"""Continue prompts with a trained run, through its KV cache.

Several prompts are continued at once, in one batch. Without a prompt, standard input is one; on a terminal every line
is one, until Ctrl-D. With --versus two runs continue each prompt side by side, one token each in turns.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from mla_lm.attention.kv_cache import CACHE_DTYPES
from mla_lm.errors import UserError
from mla_lm.hardware import DTYPES, check_compiler, choose_accelerator, inference_autocast
from mla_lm.inference.generate import check_sampling, generate
from mla_lm.inference.streaming import Continuation, Decoding, in_turns
from mla_lm.runs.folder import find_run
from mla_lm.runs.load import load_run
from mla_lm.runs.report import human_bytes
from mla_lm.terminal import cli
from mla_lm.terminal.plain_text import printable, say
from mla_lm.terminal.side_by_side import Column, growing_columns

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
BETWEEN_TEXTS = "\n\n---\n\n"
EXAMPLES = r"""examples:
  python -m scripts.generate RUN --prompt "Once upon a time" --temperature 0 --max-tokens 64
  python -m scripts.generate RUN --prompt "def " --prompt "import " --top-p 0.9 --stop $'\n\n'
  python -m scripts.generate RUN < prompt.txt
  python -m scripts.generate RUN --versus RUN2 --prompt "class "
"""


def parse() -> argparse.Namespace:
    parser = cli.Parser(
        prog="python -m scripts.generate",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="a run folder, or a checkpoint in one")
    parser.add_argument("--versus", metavar="RUN2", help="another run, whose continuation is shown beside the first's")
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
    parser.add_argument("--cache", choices=CACHE_DTYPES, help="what the KV cache keeps (default: the run's precision)")
    parser.add_argument(
        "--compile", action="store_true", help="compile the steps first: pays from some thousand tokens on"
    )
    return parser.parse_args()


def main() -> None:
    args = parse()
    device, _ = choose_accelerator("auto")
    check(args, device)
    given = args.prompt is not None or args.prompt_file is not None or not sys.stdin.isatty()
    prompts = read_prompts(args) if given else []
    runs = [SampledRun(path, device, args) for path in (args.run, args.versus) if path is not None]
    continue_prompts = show_text if args.versus is None else show_columns
    if args.versus is not None or args.compile:
        for run in runs:
            run.warm_up(1 if args.versus is not None else max(1, len(prompts)))
    if given:
        continue_prompts(prompts, *runs)
        return
    for line in typed_lines():
        try:
            continue_prompts([line], *runs)
        except UserError as error:  # a line that is too long, or empty, need not end the conversation
            cli.report(error)


def check(args: argparse.Namespace, device: str) -> None:
    """Raises UserError for an option that cannot be, before anything is loaded."""
    check_sampling(**sampling_of(args))
    if args.max_tokens < 1:
        raise UserError(f"--max-tokens {args.max_tokens} must be at least 1")
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed {args.seed} must be at least 0 and below 2**32")
    if "" in args.stop:
        raise UserError("--stop needs a text that is not empty")
    if args.compile:
        check_compiler(device, "--compile")


def sampling_of(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in SAMPLING}


class SampledRun:
    """A run, its name, and how it is sampled."""

    def __init__(self, path: str, device: str, args: argparse.Namespace):
        model, tokenizer, config = load_run(path, device)
        self.run = model.prepare_decoding(DTYPES[config.trainer.precision], compiled=args.compile), tokenizer, config
        folder, checkpoint = find_run(path)
        name = f"{folder.path.name}/{checkpoint.name}" if checkpoint else folder.path.name
        self.name = f"{name} ({self.run[0].config.attention.kind})"
        self.options = {"max_tokens": args.max_tokens, "stops": args.stop, **sampling_of(args)}
        self.options["compiled"] = args.compile
        self.options["cache_dtype"] = CACHE_DTYPES.get(args.cache)
        self.generator = torch.Generator(device).manual_seed(args.seed)

    def begin(self, prompts: list[str]) -> Decoding:
        return Decoding(self.run, prompts, generator=self.generator, **self.options)

    def warm_up(self, batch: int) -> None:
        """Load and compile what so many prompts at once need at first, so that no text is timed with it."""
        model, _, config = self.run
        precision = config.trainer.precision
        prompts = torch.zeros(batch, 2, dtype=torch.long, device=self.generator.device)
        dtype = self.options["cache_dtype"] or DTYPES[precision]
        with inference_autocast(self.generator.device.type, precision):
            list(generate(model, prompts, max_tokens=3, dtype=dtype, compiled=self.options["compiled"]))


def show_text(prompts: list[str], run: SampledRun) -> None:
    """Print each prompt with its continuation as it grows, then the speed and the cache's size on stderr.

    A text comes after those before it are done, as they all grow at once.
    """
    decoding, shown = run.begin(prompts), 0
    for _ in chain([None], in_turns(decoding)):  # the prompt at once
        settled = settled_text(decoding.texts)
        print(for_screen(settled[shown:]), end="", flush=True)
        shown = max(shown, len(settled))
    print("\n", flush=True)
    print(speed_and_cache(decoding), file=sys.stderr)


def for_screen(text: str) -> str:
    """As it is, but on a terminal without what would move the cursor or colour the screen."""
    return printable(text.expandtabs(4)) if sys.stdout.isatty() else text


def settled_text(texts: list[Continuation]) -> str:
    """Of the texts that are done, and the first that is not."""
    growing = next((i for i, text in enumerate(texts) if not text.done), len(texts))
    return BETWEEN_TEXTS.join(text.settled for text in texts[: growing + 1])


def speed_and_cache(decoding: Decoding) -> str:
    full = f" (a text fills the model's seq_len={decoding.seq_len})" if decoding.full else ""
    return (
        f"{decoding.new} tokens{full}, {decoding.tokens_per_second:.0f} tokens/s; "
        f"KV cache of {decoding.stored} tokens: {human_bytes(decoding.cache_bytes)}"
    )


def show_columns(prompts: list[str], *runs: SampledRun) -> None:
    """Show each prompt as two runs continue it, in turns; then, on stderr, the speed and the cache of each."""
    for decodings in [begin_both(prompt, runs) for prompt in prompts]:  # all are checked before the first is shown
        with growing_columns() as draw:
            for _ in in_turns(*decodings):
                draw(columns_of(runs, decodings))
        print(flush=True)
        per_token = [decoding.cache_bytes_per_token for decoding in decodings]
        for run, decoding, own, other in zip(runs, decodings, per_token, reversed(per_token), strict=True):
            cache = f"{own:,} B/token, {own / other:.3f} of the other's"
            say(f"{run.name}: {speed_and_cache(decoding)}, {cache}", file=sys.stderr)


def begin_both(prompt: str, runs: tuple[SampledRun, ...]) -> list[Decoding]:
    """UserError where a run cannot continue the prompt, naming it: they may differ in seq_len and tokenizer."""
    decodings = []
    for run in runs:
        try:
            decodings.append(run.begin([prompt]))
        except UserError as error:
            raise UserError(f"{run.name}: {error}") from error
    return decodings


def columns_of(runs: tuple[SampledRun, ...], decodings: list[Decoding]) -> list[Column]:
    columns = []
    for run, decoding in zip(runs, decodings, strict=True):
        (text,) = decoding.texts
        figures = [
            f"{decoding.stored} tokens",
            f"{human_bytes(decoding.cache_bytes)} of cache",
            f"({decoding.cache_bytes_per_token:,} B/token)",
            f"{decoding.tokens_per_second:.0f} tokens/s",
        ]
        columns.append(Column(run.name, text.settled, figures))
    return columns


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
