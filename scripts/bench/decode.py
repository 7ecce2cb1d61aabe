"""Decoding through the cache, beside transformers and beside our own MHA."""

import argparse
import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from statistics import median
from typing import Any

import torch
from torch import Tensor

from mla_lm.hardware import check_compiler
from mla_lm.inference.generate import generate
from mla_lm.model.config import AttentionConfig, TransformerConfig
from mla_lm.model.transformer import Transformer
from scripts.bench import measure, peers
from scripts.plan import composed

DESCRIPTION = """Tokens per second of greedy decoding over a filled cache.

Ours is MLA, absorbed, through its latent cache. transformers is DeepseekV3 with the same weights and the same cached
latents. MHA is ours, with as many parameters. --model takes presets in place of 6 layers of 384. Each makes tokens by
its own `generate`, given the cache; transformers' model is also stepped through its cache without generate. Our steps
are timed after the first three, with which --compile captures a CUDA graph on a GPU. Weights and caches have the
precision named. With --cache int8, both of ours decode over a cache of int8 too: "int8 over ours" is how many times as
fast that is. "of the bytes' time" is how long the weights and the cache of our step take to be read, at the rate of a
large sum in the same round, over how long the step takes: 1 where memory is the limit, more where a CPU's own caches
hold some of them.
"""
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
MLA = TransformerConfig(
    num_layers=6,
    d_model=384,
    num_heads=6,
    ff_hidden=1024,
    vocab_size=4096,
    attention=AttentionConfig(kind="mla", kv_compressed_dim=128, rope_dim=32, nope_dim=32, value_dim=64),
)
MHA = replace(MLA, attention=AttentionConfig(), ff_hidden=880)  # as many parameters
PRESETS = {"medium": "mha_medium", "large": "mha_large", "serving": "mha_medium"}  # of MLA, and the MHA beside each
PEERS = ("transformers", "transformers' steps", "mha")
STARTING = 3  # steps of ours before those that are timed: one reads the prompt, one runs a step, one captures it
LARGE = 2**30  # bytes that no cache holds
PREFILLED = 512  # tokens that are really read; longer caches repeat what is stored of them


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=("6x384", *PRESETS), default="6x384", help="default: %(default)s")
    add_numbers(parser, "--context", [1024, 8192, 32768], "cached tokens")
    add_numbers(parser, "--batch", [1, 8], "sequences at once")
    parser.add_argument("--compile", action="store_true", help="compile the steps of our models")
    parser.add_argument("--cache", choices=("int8",), help="decode ours and MHA over such a cache too")
    add_precision(parser)
    measure.add_repeats(parser)
    measure.add_device(parser)


def add_numbers(parser: argparse.ArgumentParser, option: str, default: list[int], meaning: str) -> None:
    """An option that takes whole numbers with commas between them."""
    shown = f"{meaning}: {','.join(map(str, default))}"
    parser.add_argument(option, type=several(measure.at_least_one), metavar="N[,N]", default=default, help=shown)


def add_precision(parser: argparse.ArgumentParser) -> None:
    """The option --precision."""
    parser.add_argument("--precision", type=several(precision), default=list(PRECISIONS), help="fp32,bf16")


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

    def __init__(
        self,
        model: Transformer,
        batch: int,
        context: int,
        room: int,
        compiled: bool = False,
        dtype: torch.dtype | None = None,
    ):
        self.context, self.compiled = context, compiled
        self.model = copy.deepcopy(model).prepare_decoding(model.head.weight.dtype, compiled)
        self.cache = model.new_cache(batch, context + room, dtype)
        for layer, stored in zip(self.cache.layers, entries(model, context), strict=True):
            if not stored:  # a layer that reads the keys of the one before it
                continue
            layer.append(*(tensor.expand(batch, -1, -1, -1) for tensor in stored))

    @property
    def bytes_read(self) -> int:
        """Of the weights and the cache, in a step at the end of the context."""
        weights = sum(p.nbytes for name, p in self.model.named_parameters() if not name.startswith("embedding."))
        return weights + sum(t[:, :, : self.context].nbytes for layer in self.cache.layers for t in layer.tensors)

    def decode(self, prompts: Tensor, count: int) -> Tensor:
        """(B, count) ids that follow the prompts, (B, context + 1); the cache is then as it was."""
        tokens = torch.stack(list(self._steps(prompts, count)), dim=1)
        self._rewind()
        return tokens

    def seconds(self, prompts: Tensor, count: int, device: str) -> float:
        """How long `count` steps take after the first ones."""
        steps = self._steps(prompts, STARTING + count)
        for _ in range(STARTING):
            next(steps)
        seconds = measure.seconds_of(lambda: list(steps), device)
        self._rewind()
        return seconds

    def _steps(self, prompts: Tensor, count: int) -> Iterator[Tensor]:
        return generate(self.model, prompts, count, temperature=0, cache=self.cache, compiled=self.compiled)

    def _rewind(self) -> None:
        for layer in self.cache.layers:
            layer.length = self.context


class Theirs:
    """transformers' DeepseekV3 with the weights of ours and the same latents in its cache."""

    def __init__(self, model: Transformer, batch: int, context: int):
        self.model = peers.deepseek_v3(model).to(model.head.weight).eval()  # refuses without transformers
        from transformers import DynamicCache

        self.context, self.cache = context, DynamicCache()
        split = (model.config.attention.kv_compressed_dim, model.config.attention.rope_dim)
        for i, (stored,) in enumerate(entries(model, context)):
            self.cache.update(*stored.expand(batch, -1, -1, -1).split(split, dim=-1), i)

    def decode(self, prompts: Tensor, count: int) -> Tensor:
        """As `Ours.decode`."""
        tokens = self.model.generate(
            prompts[:, -1:],  # it would read the whole prompt again, after what the cache holds
            attention_mask=torch.ones_like(prompts),
            past_key_values=self.cache,
            do_sample=False,
            max_new_tokens=count,
            eos_token_id=None,
            pad_token_id=self.model.config.vocab_size,  # no token's: transformers warns where a prompt ends with it
        )
        self.cache.crop(-count)
        return tokens[:, -count:]

    def step(self, prompts: Tensor, count: int) -> Tensor:
        """As `decode`, without what transformers' generate adds to the steps of the model."""
        tokens = [prompts[:, -1:]]
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
    if args.compile:
        check_compiler(device, "--compile")
    models = models_of(args.model)
    rows = [
        decoded(models, name, batch, context, args.repeats, device, args.compile, args.cache == "int8")
        for name, batch, context in product(args.precision, args.batch, args.context)
    ]
    first = [row for row in rows if (row["precision"], row["batch"]) == (args.precision[0], args.batch[0])]
    return {
        "tokens_per_second": [row["tokens/s"] for row in first],
        "model_flops_utilization": None,
        "ratios": {peer: [row[f"over {peer}"] for row in first] for peer in ("transformers", "mha")},
        "rows": rows,
    }


def models_of(name: str) -> tuple[TransformerConfig, TransformerConfig]:
    """The MLA that --model names, and the MHA beside it."""
    if name not in PRESETS:
        return MLA, MHA
    mla, mha = (composed([f"model={preset}", "model.vocab_size=50257"]) for preset in (f"mla_{name}", PRESETS[name]))
    return mla.model, mha.model


def decoded(
    models: tuple[TransformerConfig, TransformerConfig],
    precision: str,
    batch: int,
    context: int,
    repeats: int,
    device: str,
    compiled: bool,
    int8: bool,
) -> dict[str, Any]:
    """A row of the table."""
    count = max(8, min(32, 2**17 // context))  # the long caches take long
    dtype = PRECISIONS[precision]
    torch.manual_seed(0)
    room = STARTING + count
    mla, mha = (Transformer(replace(model, seq_len=context + room + 1)).to(device, dtype).eval() for model in models)
    ours, theirs, of_mha = (
        Ours(mla, batch, context, room, compiled),
        Theirs(mla, batch, context),
        Ours(mha, batch, context, room, compiled),
    )
    over_int8 = {
        name: Ours(model, batch, context, room, compiled, torch.int8)
        for name, model in (("ours", mla), ("mha", mha))
        if int8
    }
    torch.compiler.reset()  # or sizes that differ between rows would be compiled as ones that change
    prompts = torch.arange(batch, device=device).unsqueeze(1).expand(-1, context + 1)  # of which the last id is read
    tokens = ours.decode(prompts, count)
    same = all(torch.equal(tokens, other(prompts, count)) for other in (theirs.decode, theirs.step))
    large = torch.ones(LARGE // 4, device=device)
    turns = {
        "ours": lambda: ours.seconds(prompts, count, device),
        "transformers": lambda: measure.seconds_of(lambda: theirs.decode(prompts, count), device),
        "transformers' steps": lambda: measure.seconds_of(lambda: theirs.step(prompts, count), device),
        "mha": lambda: of_mha.seconds(prompts, count, device),
        "memory": lambda: measure.seconds_of(large.sum, device),
    }
    turns |= {f"{name}, int8": partial(model.seconds, prompts, count, device) for name, model in over_int8.items()}
    seconds = measure.interleaved(turns, repeats)
    share = count * ours.bytes_read / LARGE * measure.median_ratio(seconds["memory"], seconds["ours"])
    return {
        "precision": precision,
        "batch": batch,
        "context": context,
        "tokens/s": batch * count / median(seconds["ours"]),
        **{f"over {peer}": measure.median_ratio(seconds[peer], seconds["ours"]) for peer in PEERS},
        "of the bytes' time": share,
        "same tokens": same,
        "cache MiB": ours.cache.nbytes / 2**20,
        "mha MiB": of_mha.cache.nbytes / 2**20,
        **{f"int8 over {name}": measure.median_ratio(seconds[name], seconds[f"{name}, int8"]) for name in over_int8},
        **{f"{name}, int8 MiB": model.cache.nbytes / 2**20 for name, model in over_int8.items()},
    }
