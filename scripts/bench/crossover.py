"""From how many new tokens on decompressing the cache takes less time than absorbing it."""

import argparse
from dataclasses import replace
from itertools import product
from statistics import median
from typing import Any

import torch
from torch import Tensor

from mla_lm.attention.mla import MLA
from scripts.bench import decode, measure

DESCRIPTION = """Where one layer of MLA goes from the absorbed path to the decompressed one, and where it should.

A layer of the model of `decode` reads 1, 2, 4, ... new tokens over a filled cache, each by both paths. "time lost" is
what the path that the layer takes needs beyond the faster of the two, at the number of new tokens where it is most.
"""
LAST = 10  # so many times the new tokens double
MOST_QUERIES = 2**LAST


def add_arguments(parser: argparse.ArgumentParser) -> None:
    decode.add_numbers(parser, "--context", [1024, 8192], "cached tokens")
    decode.add_precision(parser)
    measure.add_repeats(parser)
    measure.add_device(parser)


@torch.no_grad()
def bench(args: argparse.Namespace) -> dict[str, Any]:
    device, rows, times = measure.device_of(args), [], []
    for precision, context in product(args.precision, args.context):
        config = replace(decode.MLA, seq_len=context + MOST_QUERIES).layer_config()
        layer = MLA(config).to(device, decode.PRECISIONS[precision]).eval()
        seconds = {2**i: both_paths(layer, 2**i, context, args.repeats, device) for i in range(LAST + 1)}
        rows.append({"precision": precision, "context": context, **crossing(layer, context, seconds)})
        times.append({"precision": precision, "context": context, "absorbed and decompressed": seconds})
    return {"tokens_per_second": None, "model_flops_utilization": None, "ratios": {}, "rows": rows, "seconds": times}


def crossing(layer: MLA, context: int, seconds: dict[int, tuple[float, float]]) -> dict[str, Any]:
    """The figures of a row, from the seconds of both paths by the number of new tokens."""
    absorbs = {count: layer.absorbing_is_cheaper(count, context + count) for count in seconds}
    lost = {count: both[0 if absorbs[count] else 1] / min(both) - 1 for count, both in seconds.items()}
    worst = max(lost, key=lost.get)
    return {
        "decompresses from": next((count for count in seconds if not absorbs[count]), None),
        "faster from": next((count for count, both in seconds.items() if both[1] < both[0]), None),
        "time lost": lost[worst],
        "at": worst,
    }


def both_paths(layer: MLA, count: int, context: int, repeats: int, device: str) -> tuple[float, float]:
    """Seconds that the layer takes for so many new tokens, absorbing and decompressing."""
    cache = layer.new_cache(1, context + count)
    cache.append(torch.randn(1, 1, context, cache.tensors[0].size(-1)).to(cache.tensors[0]))
    x = torch.randn(1, count, layer.config.d_model).to(cache.tensors[0])

    def read(absorb: bool) -> Tensor:
        layer.absorbing_is_cheaper = lambda queries, keys: absorb
        cache.length = context
        return layer(x, cache)

    turns = {absorb: lambda absorb=absorb: measure.seconds_of(lambda: read(absorb), device) for absorb in (True, False)}
    seconds = measure.interleaved(turns, repeats)
    del layer.absorbing_is_cheaper  # the method is back
    return median(seconds[True]), median(seconds[False])
