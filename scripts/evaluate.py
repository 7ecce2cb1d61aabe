"""Loss, perplexity and bits per byte of a trained run: `python -m scripts.evaluate RUN`.

With --tasks, how it does in tasks of EleutherAI's lm-evaluation-harness instead.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mla_lm.attention.kv_cache import CACHE_DTYPES
from mla_lm.data.corpus import SPLITS
from mla_lm.data.tokenizer import token_bytes
from mla_lm.errors import UserError
from mla_lm.files import write_atomically
from mla_lm.hardware import choose_accelerator, inference_autocast
from mla_lm.inference.evaluate import SlidingWindows, evaluate, losses, metrics_of, position_table
from mla_lm.inference.texts import tokens_of_files, tokens_of_split
from mla_lm.runs.load import load_run
from mla_lm.terminal import cli
from mla_lm.terminal.plain_text import say
from mla_lm.terminal.tables import table


def parse() -> argparse.Namespace:
    parser = cli.Parser(prog="python -m scripts.evaluate", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="a run folder (its best checkpoint), or a checkpoint in one")
    parser.add_argument("--split", choices=SPLITS, help="of the run's corpus (default: test)")
    parser.add_argument("--files", metavar="GLOB", help="your own text files instead, with the run's tokenizer")
    parser.add_argument("--column", help="of .jsonl, .json and .parquet files (default: the run's data.column)")
    parser.add_argument(
        "--stride",
        type=int,
        metavar="N",
        help="a window begins every N tokens and predicts its last N, the first window all of its tokens; so each "
        "token is predicted once, after at least seq_len - N others, in seq_len / N times the time (default: seq_len)",
    )
    parser.add_argument(
        "--by-position",
        action="store_true",
        help="also the loss by position in the window: at position p a token has p + 1 others before it. With --stride "
        "N, positions below seq_len - N are of the first window alone, as their count of tokens tells",
    )
    parser.add_argument(
        "--cache",
        choices=CACHE_DTYPES,
        help="attention reads from a KV cache that keeps this, as in generation; its bytes are among the figures",
    )
    parser.add_argument("--json", metavar="OUT", help="also write the figures there")
    cli.add_trust(parser)
    tasks = parser.add_argument_group("tasks", "need lm-eval: pip install -r requirements-eval.txt")
    tasks.add_argument("--tasks", metavar="NAME[,NAME]", help="of lm-eval; `lm-eval ls tasks` lists them")
    tasks.add_argument(
        "--include-path",
        metavar="DIR",
        help="with tasks of your own, as YAML files: these "
        "can run Python code (`!function`), so give only files that you trust",
    )
    tasks.add_argument("--limit", type=int, metavar="N", help="the first N documents of each task only, for a try")
    return parser.parse_args()


def main() -> None:
    args = parse()
    check_tasks(args)
    device, _ = choose_accelerator("auto")
    if args.tasks is not None:
        evaluate_in_tasks(args, device)
        return
    model, tokenizer, config = load_run(args.run, device)
    seq_len = config.model.seq_len
    stride = seq_len if args.stride is None else args.stride
    if not 1 <= stride <= seq_len:
        raise UserError(f"--stride {stride} must be at least 1 and at most the run's model.seq_len={seq_len}")
    if args.cache and model.config.document_token is not None:
        raise UserError("--cache holds one document, but this run's data.document_mask=true sets several in a window")
    cache_dtype = CACHE_DTYPES.get(args.cache)
    if args.files:
        tokens = tokens_of_files(args.files, args.column or config.data.column, tokenizer, config)
    else:
        tokens = tokens_of_split(args.run, args.split or "test", tokenizer, config, args.trust)
    lengths = torch.from_numpy(token_bytes(tokenizer)).to(device)
    with inference_autocast(device, config.trainer.precision):
        windows = SlidingWindows(tokens, seq_len, stride)
        sums = evaluate(model, windows, lengths, config.evaluation_batch_size, cache_dtype)
    text, totals = args.files or args.split or "test", sums.sum(-1)
    if not totals[2]:
        raise UserError(f"{text} has no text to predict: give more")
    figures = {"run": args.run, "text": text, "stride": stride, "tokens": int(totals[1]), **metrics_of(totals)}
    if args.cache:
        figures |= {"kv_cache": args.cache, "kv_cache_bytes_per_token": model.new_cache(1, 1, cache_dtype).nbytes}
    shown = [f"{value:.4f}" if isinstance(value, float) else str(value) for value in figures.values()]
    say(table(zip(figures, shown, strict=True), left=2))
    if args.by_position:
        say(f"\n{position_table({'loss': sums})}")
        figures |= {"loss_by_position": losses(sums), "tokens_by_position": sums[1].int().tolist()}
    if args.json:
        write_json(Path(args.json), figures)


def write_json(path: Path, figures: dict[str, Any]) -> None:
    content = json.dumps(figures, indent=2, default=float) + "\n"  # float: numbers of numpy
    write_atomically(path, lambda file: file.write(content.encode()))


def check_tasks(args: argparse.Namespace) -> None:
    """Raises UserError for options that do not go with --tasks, or not without."""
    own, others = ("include_path", "limit"), ("split", "files", "column", "stride", "by_position", "cache")
    for name in own if args.tasks is None else others:
        if getattr(args, name) not in (None, False):
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option} needs --tasks" if args.tasks is None else f"{option} does not go with --tasks")
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit {args.limit} must be at least 1")


def evaluate_in_tasks(args: argparse.Namespace, device: str) -> None:
    try:  # lm-eval is an extra, and slow to import
        from mla_lm.inference.lm_eval_tasks import evaluate_tasks, results_table, task_manager
    except ImportError as error:
        raise UserError(f"--tasks needs lm-eval ({error}):\n  pip install -r requirements-eval.txt") from error

    run = load_run(args.run, device)
    results = evaluate_tasks(run, args.tasks.split(","), task_manager(args.include_path), args.limit)
    say(results_table(results))
    if args.json:
        kept = ("results", "groups", "versions", "n-shot", "n-samples", "cut_requests", "lm_eval_version")
        figures = {"run": args.run, "limit": args.limit} | {name: results[name] for name in kept if name in results}
        # Of the configuration the model alone: figures are passed on, and the rest has paths of this machine.
        write_json(Path(args.json), figures | {"config": {"model": asdict(run.config.model)}})


if __name__ == "__main__":
    cli.run(main)
