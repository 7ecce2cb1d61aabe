"""Training steps of ours and of the peers, on the same tokens."""

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mla_lm.attention.fp8 import check_fp8, fp8_failure
from mla_lm.hardware import choose_compile, choose_precision, matmul_flops_per_second
from mla_lm.model.config import AttentionConfig, TransformerConfig
from mla_lm.model.size import model_size
from mla_lm.model.transformer import Transformer
from scripts.bench import measure, peers
from scripts.bench.ours import OurTraining

DESCRIPTION = """Tokens per second of whole training steps: forward, backward, clipping, optimizer.

Ours go through Lightning and the LanguageModel, as train.py's do. MHA has as many parameters as MLA. nanoGPT has its
own model, optimizer and defaults (on CUDA bf16 and compiled, elsewhere fp32 and eager), and rows in other ones.
transformers' DeepseekV3 is dense and begins with the weights of our MLA. No side has dropout.
"""
SIZES = {"layers": 6, "d-model": 384, "heads": 6, "seq-len": 256, "sequences": 16}
TINY = {"layers": 1, "sequences": 1, "vocab_size": 16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nanogpt", metavar="DIR", help="a clone of nanoGPT, to compare with")
    add_work(parser)
    parser.add_argument(
        "--fp8", action=argparse.BooleanOptionalAction, help="also MLA in fp8 (default: on a GPU that has it)"
    )
    parser.add_argument("--memory", action="store_true", help="also the peak memory of each, in a process of its own")


def add_work(parser: argparse.ArgumentParser, vocab_size: int = 65) -> None:
    """What is trained, and how ours is."""
    measure.add_sizes(parser, {**SIZES, "vocab-size": vocab_size})
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="the network (default: where it can be)"
    )
    parser.add_argument(
        "--optimizer", choices=("adamw", "muon"), default="adamw", help="ours (default: %(default)s, as the peers have)"
    )
    measure.add_repeats(parser)
    measure.add_device(parser)


class Contender(NamedTuple):
    """Who trains, and how."""

    kind: str  # mla | mha | nanogpt | transformers
    precision: str
    compiled: bool
    fp8: bool = False  # of ours: what trainer.fp8 does

    def __str__(self) -> str:
        return f"{self.kind} {self.precision}{' fp8' * self.fp8}{' compiled' * self.compiled}"


def bench(args: argparse.Namespace) -> dict[str, Any]:
    settle(args)
    if args.fp8:
        check_fp8(args.device, args.precision)
    elif args.fp8 is None:
        args.fp8 = args.device == "cuda" and args.precision == "bf16-mixed" and not fp8_failure(args.device)
    if args.nanogpt:
        args.nanogpt = peers.nanogpt_folder(args.nanogpt)
    trainings = {contender: build(contender, args) for contender in contenders_of(args)}
    rounds = rounds_of(trainings, args)
    rows = {contender: row_of(contender, training, rounds) for contender, training in trainings.items()}
    if args.memory:
        for contender, row in rows.items():
            row["peak MiB"] = measure.in_own_process(peak_memory, contender, args) / 2**20
    ours = next(iter(rows.values()))
    first = {kind: next((rows[c] for c in rows if c.kind == kind), None) for kind in ("nanogpt", "transformers", "mha")}
    return {
        "tokens_per_second": ours["tokens/s"],
        "model_flops_utilization": ours["MFU"],
        "ratios": {kind: row and row["ours / it"] for kind, row in first.items()},
        "peak_memory_ratios": {
            kind: ours["peak MiB"] / row["peak MiB"] if row and args.memory else None for kind, row in first.items()
        },
        "rows": list(rows.values()),
        "rounds": {str(who): figures for who, figures in rounds.items()},
    }


def settle(args: argparse.Namespace) -> None:
    """Fill in what the arguments leave open, and refuse what cannot be before anything is measured."""
    args.device = measure.device_of(args)
    args.precision, _ = choose_precision(args.precision, args.device)
    args.compile, _ = choose_compile(args.compile, args.device, seconds_at_peak=math.inf)
    for kind in ("mha", "mla"):
        our_config(kind, args).layer_config()


def contenders_of(args: argparse.Namespace) -> list[Contender]:
    """Ours first; the first of every other kind is the one that ratios are of."""
    ours = (args.precision, args.compile)
    theirs = [("32-true", False), (args.precision, False), ours]
    if args.device == "cuda":
        theirs.reverse()
    listed = [Contender("mla", *ours), Contender("mha", *ours)]
    if args.fp8:
        listed.append(Contender("mla", *ours, fp8=True))
    if args.nanogpt:
        listed += [Contender("nanogpt", *how) for how in dict.fromkeys(theirs)]
    return listed + [Contender("transformers", args.precision, how) for how in sorted({False, args.compile})]


def rounds_of(trainings: dict[Contender, Any], args: argparse.Namespace) -> dict[Any, list[float]]:
    """By contender tokens per second, by precision the FLOPs per second of a large matrix product, of every round."""
    tokens = args.sequences * args.seq_len
    turns: dict[Any, Callable[[], float]] = {}
    for contender, training in trainings.items():
        steps = measure.steps_in_a_round(training.run)
        turns[contender] = lambda training=training, steps=steps: steps * tokens / training.run(steps)
    for precision in {contender.precision for contender in trainings}:
        turns[precision] = lambda precision=precision: matmul_flops_per_second(args.device, precision)
    return measure.interleaved(turns, args.repeats)


def row_of(contender: Contender, training: Any, rounds: dict[Any, list[float]]) -> dict[str, Any]:
    """A contender's row of the table, but for the memory."""
    ours, its = next(iter(rounds.values())), rounds[contender]
    return {
        "who": contender.kind,
        "precision": contender.precision + " fp8" * contender.fp8,
        "compiled": contender.compiled,
        "parameters": training.parameters,
        "first loss": training.first_loss,
        "tokens/s": median(its),
        "ours / it": measure.median_ratio(ours, its),
        "MFU": training.flops_per_token * measure.median_ratio(its, rounds[contender.precision]),
        "peak MiB": None,
    }


def peak_memory(contender: Contender, args: argparse.Namespace) -> int:
    """Bytes that training takes at most, in this process, which has done nothing before.

    On a CPU that is the growth of the resident size; a tiny model trains first, in the same way, so that libraries and
    the compiler are not counted.
    """
    build(contender, argparse.Namespace(**{**vars(args), **TINY})).run(1)
    torch.compiler.reset()  # or sizes that differ would be compiled as ones that change
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        build(contender, args).run(2)
        return torch.cuda.max_memory_allocated()
    before = measure.resident_bytes()
    build(contender, args).run(2)
    return measure.resident_bytes(peak=True) - before


def our_config(kind: str, args: argparse.Namespace) -> TransformerConfig:
    """MHA with a SwiGLU of 8/3 d_model, or MLA of a quarter of its cache, with what that saves spent in ff_hidden."""
    d_model, head_dim = args.d_model, args.d_model // args.heads
    mha = TransformerConfig(
        args.layers, d_model, args.heads, args.seq_len, _in_sixteens(d_model * 8 / 3), vocab_size=args.vocab_size
    )
    if kind == "mha":
        return mha
    rope_dim = head_dim // 4 * 2
    attention = AttentionConfig(
        kind="mla",
        kv_compressed_dim=_in_sixteens(d_model / 3),
        rope_dim=rope_dim,
        nope_dim=head_dim - rope_dim,
    )
    mla = replace(mha, attention=attention)
    saved = model_size(mha).parameters - model_size(mla).parameters
    return replace(mla, ff_hidden=_in_sixteens(mla.ff_hidden + saved / (3 * d_model * args.layers)))


def _in_sixteens(width: float) -> int:
    return max(1, round(width / 16)) * 16


def tokens_of(args: argparse.Namespace) -> Tensor:
    """The batch that all train on, (sequences, seq_len + 1)."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(args.vocab_size, (args.sequences, args.seq_len + 1), generator=generator)


def build(contender: Contender, args: argparse.Namespace) -> OurTraining | peers.PeerTraining:
    """A new model of a contender, ready to train."""
    torch.manual_seed(1)
    config = our_config("mha" if contender.kind == "mha" else "mla", args)
    tokens, how = tokens_of(args).to(args.device), (contender.precision, contender.compiled)
    if contender.kind == "nanogpt":
        sizes = {"n_layer": args.layers, "n_embd": args.d_model, "n_head": args.heads, "block_size": args.seq_len}
        return peers.nanogpt_training(args.nanogpt, {**sizes, "vocab_size": args.vocab_size}, tokens, *how)
    if contender.kind == "transformers":
        flops = model_size(config).flops_per_token
        return peers.transformers_training(Transformer(config), flops, tokens, *how)
    return OurTraining(config, tokens, *how, args.optimizer, contender.fp8)
