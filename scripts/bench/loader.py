"""The data loader alone, and how long a training step waits for it."""

import argparse
import time
from collections.abc import Iterator
from statistics import median
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from mla_lm.data.config import DataConfig, TokenizerConfig
from mla_lm.data.open_store import open_store
from mla_lm.data.sources import open_source
from mla_lm.data.tokenizer import encode_batch, vocabulary_size
from mla_lm.training.datamodule import TextDataModule
from scripts.bench import measure
from scripts.bench.ours import OurTraining
from scripts.bench.train import add_work, our_config, settle, tokens_of

DESCRIPTION = """The data loader alone, in tokens per second, over the rate of training on what it loads.

Stall is the share of the training time in which a step waits for its batch. The text is the Python standard library,
or your own; its tokens are made once and kept in train.py's cache.
"""
SECONDS = 0.5  # that the loader runs in each round


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--files", metavar="GLOB", help="text, as data.files of data=text (default: Python's library)")
    parser.add_argument("--cache-dir", metavar="DIR", default=DataConfig.cache_dir, help="default: %(default)s")
    add_work(parser, vocab_size=4096)


def bench(args: argparse.Namespace) -> dict[str, Any]:
    settle(args)
    data = DataConfig(
        source="text" if args.files else "python_stdlib",
        files=args.files,
        tokenizer=TokenizerConfig(vocab_size=args.vocab_size),
        cache_dir=args.cache_dir,
    )
    data.check()
    store = open_store(data)
    args.vocab_size = vocabulary_size(store.tokenizer)
    how = (args.precision, args.compile, args.optimizer)
    training = OurTraining(our_config("mla", args), tokens_of(args).to(args.device), *how)
    loader = TextDataModule(training.config, store).train_dataloader()
    texts = [row["text"] for row in open_source(data).documents("validation")]
    timed, stalls, steps = TimedLoader(loader), [], measure.steps_in_a_round(training.run)

    def train() -> float:
        seconds = training.run(steps, timed)
        stalls.append(sum(timed.waits[1:]) / seconds)  # the first step is not among the seconds
        return seconds / steps

    seconds = measure.interleaved(
        {
            "loader": lambda: seconds_per_batch(loader),
            "training": train,
            "tokenizing": lambda: measure.seconds_of(lambda: encode_batch(store.tokenizer, texts)),
        },
        args.repeats,
    )
    tokens = args.sequences * args.seq_len
    ratio, stall = measure.median_ratio(seconds["training"], seconds["loader"]), median(stalls[1:])
    loading, trained = (tokens / median(seconds[name]) for name in ("loader", "training"))
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    return {
        "tokens_per_second": loading,
        "model_flops_utilization": None,
        "ratios": {"training": ratio},
        "stall": stall,
        "tokenized_megabytes_per_second": megabytes / median(seconds["tokenizing"]),
        "rows": [
            {"what": "the loader alone", "tokens/s": loading, "over training": ratio, "stall": None},
            {"what": "training on what it loads", "tokens/s": trained, "over training": 1.0, "stall": stall},
        ],
    }


def seconds_per_batch(loader: DataLoader) -> float:
    """Of the loader alone, its start included."""
    began, batches = time.perf_counter(), 0
    for _ in loader:
        batches += 1
        if time.perf_counter() - began > SECONDS:
            break
    return (time.perf_counter() - began) / batches


class TimedLoader:
    """A loader that notes in `waits` how long each batch of the last pass took to come."""

    def __init__(self, loader: DataLoader):
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Tensor]:
        self.waits: list[float] = []
        batches = iter(self.loader)
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            self.waits.append(time.perf_counter() - began)
            if batch is None:
                return
            yield batch
