"""Decoding through the cache, beside transformers and beside our own MHA."""

import argparse
from dataclasses import replace
from itertools import product
from statistics import median
from typing import Any

import torch
from torch import Tensor

from mla_lm.transformer import AttentionConfig, Transformer, TransformerConfig
from scripts.bench import measure, peers

DESCRIPTION = """Tokens per second of greedy decoding over a filled cache.

Ours is MLA, absorbed, through its latent cache. transformers is DeepseekV3 with the same weights and the same cached
latents, stepped through its DynamicCache as its generate does, without what generate adds to a step. MHA is ours, with
as many parameters. Weights and caches have the precision named.
"""
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
MLA = TransformerConfig(
    num_layers=6,
    d_model=384,
    num_heads=6,
    ff_hidden=1024,
    vocab_size=4096,
    attention=AttentionConfig(kv_compressed_dim=128, rope_dim=32, nope_dim=32, value_dim=64),
)
MHA = replace(MLA, attention=AttentionConfig(), ff_hidden=880)  # as many parameters
PREFILLED = 512  # tokens that are really read; longer caches repeat what is stored of them


def add_arguments(parser: argparse.ArgumentParser) -> None:
    numbers = {"type": several(measure.at_least_one), "metavar": "N[,N]"}
    parser.add_argument("--context", **numbers, default=[1024, 8192, 32768], help="cached tokens: 1024,8192,32768")
    parser.add_argument("--batch", **numbers, default=[1, 8], help="sequences at once: 1,8")
    parser.add_argument("--precision", type=several(precision), default=list(PRECISIONS), help="fp32,bf16")
    measure.add_repeats(parser)
    measure.add_device(parser)


def several(kind):
    """Type of an argument: values with commas between them."""
    return lambda text: [kind(part) for part in text.split(",")]


def precision(text: str) -> str:
    """Type of an argument: fp32 or bf16."""
    if text not in PRECISIONS:
        raise argparse.ArgumentTypeError(f"{text} must be one of {', '.join(PRECISIONS)}")
    return text


class Ours:
    """One of our models with a filled cache."""

    def __init__(self, model: Transformer, batch: int, context: int, room: int):
        self.model, self.context = model, context
        self.cache = model.new_cache(batch, context + room)
        for layer, stored in zip(self.cache.layers, entries(model, context), strict=True):
            layer.append(*(tensor.expand(batch, -1, -1, -1) for tensor in stored))

    def decode(self, first: Tensor, count: int) -> Tensor:
        """(B, count) ids that follow the ids `first`, (B, 1); the cache is then as it was."""
        tokens = [first]
        for _ in range(count):
            last = self.model.hidden_states(tokens[-1], self.cache)[:, -1:]
            tokens.append(self.model.head(last).argmax(-1))
        for layer in self.cache.layers:
            layer.length = self.context
        return torch.cat(tokens[1:], dim=1)


class Theirs:
    """transformers' DeepseekV3 with the weights of ours and the same latents in its cache."""

    def __init__(self, model: Transformer, batch: int, context: int):
        self.model = peers.deepseek_v3(model).to(model.head.weight).eval()  # refuses without transformers
        from transformers import DynamicCache

        self.context, self.cache = context, DynamicCache()
        split = (model.config.attention.kv_compressed_dim, model.config.attention.rope_dim)
        for i, (stored,) in enumerate(entries(model, context)):
            self.cache.update(*stored.expand(batch, -1, -1, -1).split(split, dim=-1), i)

    def decode(self, first: Tensor, count: int) -> Tensor:
        """As `Ours.decode`."""
        tokens = [first]
        for _ in range(count):
            out = self.model(tokens[-1], past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            tokens.append(out.logits.argmax(-1))
        self.cache.crop(-count)
        return torch.cat(tokens[1:], dim=1)


def entries(model: Transformer, context: int) -> list[list[Tensor]]:
    """What each layer's cache keeps of `context` tokens: (1, heads, context, dim) each."""
    read = min(context, PREFILLED)
    cache = model.new_cache(1, read)
    tokens = torch.arange(read, device=model.head.weight.device) % model.config.vocab_size
    model.hidden_states(tokens.unsqueeze(0), cache)
    times = -(-context // read)
    return [[t.repeat(1, 1, times, 1)[:, :, :context] for t in layer.tensors] for layer in cache.layers]


@torch.no_grad()
def bench(args: argparse.Namespace) -> dict[str, Any]:
    device = measure.device_of(args)
    rows = [
        decoded(name, batch, context, args.repeats, device)
        for name, batch, context in product(args.precision, args.batch, args.context)
    ]
    first = [row for row in rows if (row["precision"], row["batch"]) == (args.precision[0], args.batch[0])]
    return {
        "tokens_per_second": [row["tokens/s"] for row in first],
        "model_flops_utilization": None,
        "ratios": {peer: [row[f"over {peer}"] for row in first] for peer in ("transformers", "mha")},
        "rows": rows,
    }


def decoded(precision: str, batch: int, context: int, repeats: int, device: str) -> dict[str, Any]:
    """A row of the table."""
    count = max(2, min(32, 32768 // context))  # the long caches take long
    dtype = PRECISIONS[precision]
    torch.manual_seed(0)
    mla = Transformer(replace(MLA, seq_len=context + count)).to(device, dtype).eval()
    mha = Transformer(replace(MHA, seq_len=context + count)).to(device, dtype).eval()
    contenders = {
        "ours": Ours(mla, batch, context, count),
        "transformers": Theirs(mla, batch, context),
        "mha": Ours(mha, batch, context, count),
    }
    first = torch.arange(batch, device=device).unsqueeze(1)
    same = torch.equal(contenders["ours"].decode(first, count), contenders["transformers"].decode(first, count))
    turns = {
        name: lambda who=who: measure.seconds_of(lambda: who.decode(first, count), device)
        for name, who in contenders.items()
    }
    seconds = measure.interleaved(turns, repeats)
    return {
        "precision": precision,
        "batch": batch,
        "context": context,
        "tokens/s": batch * count / median(seconds["ours"]),
        "over transformers": measure.median_ratio(seconds["transformers"], seconds["ours"]),
        "over mha": measure.median_ratio(seconds["mha"], seconds["ours"]),
        "same tokens": same,
        "cache MiB": contenders["ours"].cache.nbytes / 2**20,
        "mha MiB": contenders["mha"].cache.nbytes / 2**20,
    }
