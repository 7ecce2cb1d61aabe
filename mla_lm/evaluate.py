"""Loss, perplexity and bits per byte of a model on windows of tokens."""

import math

import torch
from torch import Tensor

from mla_lm.loss import IGNORE
from mla_lm.transformer import Transformer


def totals_of(net: Transformer, batch: Tensor, token_bytes: Tensor) -> Tensor:
    """What a batch adds to an evaluation.

    Args:
        batch: (B, T + 1) ids: inputs are all but the last, targets all but the first; -100 does not count
        token_bytes: (vocab_size,) UTF-8 bytes that each token stands for, 0 for special tokens

    Returns:
        (3,), fp64 on the CPU: nats, predicted tokens, UTF-8 bytes of their text
    """
    targets = batch[:, 1:]
    # .forward: never compiled, which for other shapes and without gradients would cost more than it gains
    losses = net.forward(batch[:, :-1].clamp(min=0), targets, reduction="none")
    text_bytes = torch.where(targets == IGNORE, 0, token_bytes[targets.clamp(min=0)])
    sums = (losses.sum(-1), (targets != IGNORE).sum(-1), text_bytes.sum(-1))  # by window: fp32 holds these well
    return torch.stack([s.cpu().double().sum() for s in sums])


def metrics_of(totals: Tensor) -> dict[str, float]:
    """loss (nats per token), perplexity and bits_per_byte of the sum of `totals_of` over all batches."""
    nats, tokens, text_bytes = totals.tolist()
    loss = nats / tokens
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),  # a float ends at exp(709)
        "bits_per_byte": nats / math.log(2) / text_bytes,
    }
