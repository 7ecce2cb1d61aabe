"""The head and the loss, forward and backward, beside PyTorch's."""

import argparse
from collections.abc import Callable
from statistics import median
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from mla_lm.hardware import choose_precision, inference_autocast, matmul_flops_per_second, runs_triton
from mla_lm.model import loss
from scripts.bench import measure

DESCRIPTION = """Milliseconds and memory of the head's product, the cross-entropy, and both gradients.

"plain" has the logits of all tokens at once, in fp32 for the loss, as nanoGPT has. "torch" is PyTorch's own
linear_cross_entropy, where there is one. On a GPU, "ours" takes a Triton kernel, and "ours without" does not. "of the
products' time" is how long the three matrix products take at the rate of a large one, over all the time.
"""
SIZES = {"tokens": 32768, "d-model": 768, "vocab-size": 50257}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    measure.add_sizes(parser, SIZES)
    measure.add_repeats(parser)
    measure.add_device(parser)


def bench(args: argparse.Namespace) -> dict[str, Any]:
    args.device = measure.device_of(args)
    args.precision, _ = choose_precision(args.precision, args.device)
    contenders = contenders_on(args.device)
    torch.manual_seed(0)
    x = torch.randn(1, args.tokens, args.d_model, device=args.device, requires_grad=True)
    weight = (0.02 * torch.randn(args.vocab_size, args.d_model, device=args.device)).requires_grad_()
    targets = torch.randint(args.vocab_size, (1, args.tokens), device=args.device)

    def run(contender: Callable[[Tensor, Tensor, Tensor], Tensor]) -> float:
        x.grad = weight.grad = None
        with inference_autocast(args.device, args.precision):
            value = contender(x, weight, targets)
        value.backward()
        return value.item()

    turns = {
        who: lambda contender=contender: measure.seconds_of(lambda: run(contender), args.device)
        for who, contender in contenders.items()
    }
    seconds = measure.interleaved(turns, args.repeats)
    products = 3 * 2 * x.numel() * args.vocab_size / matmul_flops_per_second(args.device, args.precision)
    rows = [
        {
            "who": who,
            "ms": 1e3 * median(seconds[who]),
            "its time / ours": measure.median_ratio(seconds[who], seconds["ours"]),
            "of the products' time": products / median(seconds[who]),
            "peak MiB": peak_mib(lambda contender=contender: run(contender), args.device),
            "loss": run(contender),
        }
        for who, contender in contenders.items()
    ]
    ratios = {row["who"]: row["its time / ours"] for row in rows[1:]}
    speed = args.tokens / median(seconds["ours"])
    return {"tokens_per_second": speed, "model_flops_utilization": None, "ratios": ratios, "rows": rows}


def contenders_on(device: str) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Who computes the mean loss from x (B, T, D), the head's weight (V, D) and targets (B, T); ours first."""
    contenders = {"ours": loss.linear_cross_entropy}
    if runs_triton(torch.device(device)):
        contenders["ours without"] = without_triton
    contenders["plain"] = plain
    if hasattr(F, "linear_cross_entropy"):
        contenders["torch"] = lambda x, weight, targets: F.linear_cross_entropy(
            x.flatten(0, 1), weight, targets.flatten()
        )
    return contenders


def without_triton(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    with mock.patch.object(loss, "runs_triton", return_value=False):
        return loss.linear_cross_entropy(x, weight, targets)


def plain(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight).flatten(0, 1).float(), targets.flatten())


def peak_mib(run: Callable[[], Any], device: str) -> float | None:
    """The most that a GPU holds at any time beyond what is there before; None on other devices."""
    if device != "cuda":
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
