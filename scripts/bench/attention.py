"""Causal attention of training, forward and backward, by each kernel of PyTorch that takes it."""

import argparse
import warnings
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mla_lm.attention.sdpa import causal_attention
from mla_lm.hardware import DTYPES, choose_precision
from scripts.bench import measure

DESCRIPTION = """Milliseconds of causal attention, forward and backward, by each kernel of PyTorch.

"ours" is what our models call, which leaves the choice to PyTorch on a GPU. The others are told to take one kernel:
with values as wide as the keys, or, where they are narrower, once filled up with zeros and once as they are. A kernel
that refuses has no row.
"""
HEADS = {"small": (4, 48, 48), "medium": (12, 64, 64), "serving": (6, 192, 128)}  # heads, widths of keys and of values
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    measure.add_sizes(parser, {"sequences": 16, "seq-len": 1024})
    measure.add_repeats(parser)
    measure.add_device(parser)


def bench(args: argparse.Namespace) -> dict[str, Any]:
    args.device = measure.device_of(args)
    args.precision, _ = choose_precision(args.precision, args.device)
    rows = [row for model in HEADS for row in rows_of(model, args)]
    ratios = {f"{row['model']} {row['kernel']}": row["its time / ours"] for row in rows if row["kernel"] != "ours"}
    return {"tokens_per_second": None, "model_flops_utilization": None, "ratios": ratios, "rows": rows}


def rows_of(model: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each kernel that takes the head sizes of a model; ours first."""
    heads, *widths = HEADS[model]
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(args.sequences, args.seq_len, heads, width, device=args.device, dtype=DTYPES[args.precision])
        .transpose(1, 2)
        .requires_grad_()
        for width in (widths[0], *widths)
    )
    expected = causal_attention(q, k, v, widths[0] ** -0.5).detach()
    takers = {"ours": partial(causal_attention, scale=widths[0] ** -0.5)}
    takers |= {name: attend for name, attend in kernels(widths).items() if takes(attend, (q, k, v))}
    turns = {
        name: lambda attend=attend: measure.seconds_of(lambda: attend(q, k, v).sum().backward(), args.device)
        for name, attend in takers.items()
    }
    seconds = measure.interleaved(turns, args.repeats)
    return [
        {
            "model": model,
            "heads": f"{heads} of {widths[0]} and {widths[1]}",
            "kernel": name,
            "ms": 1e3 * median(seconds[name]),
            "its time / ours": measure.median_ratio(seconds[name], seconds["ours"]),
            "largest difference": (attend(q, k, v) - expected).abs().max().item(),
        }
        for name, attend in takers.items()
    ]


def kernels(widths: list[int]) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Attention by each kernel, with values filled up to the width of the keys, and with narrower ones as they are."""
    found = {name: partial(by_kernel, kernel, widths[0]) for name, kernel in KERNELS.items()}
    if widths[1] < widths[0]:
        found |= {f"{name}, narrow": partial(by_kernel, kernel, widths[1]) for name, kernel in KERNELS.items()}
    return found


def by_kernel(kernel: SDPBackend, width: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention by one kernel, with values filled up to this width."""
    filled = F.pad(v, (0, width - v.size(3)))
    with sdpa_kernel(kernel):
        return F.scaled_dot_product_attention(q, k, filled, is_causal=True)[..., : v.size(3)]


def takes(attend: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> bool:
    """Whether the kernel takes these inputs, forward and backward."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, of what the kernel lacks
        try:
            attend(*inputs).sum().backward()
        except RuntimeError:  # there is no such kernel here, or not for these sizes
            return False
    return True
