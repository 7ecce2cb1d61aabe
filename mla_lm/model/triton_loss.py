"""Cross-entropy over the logits on a GPU, by one Triton kernel that leaves their gradient in their place.

PyTorch's operations write the probabilities in fp32 and read them again several times. Here each row of logits is read
twice, the second time from the GPU's cache where it fits, and written once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST_BLOCK = 4096  # logits that a program holds at once
WARPS = 8


def cross_entropy_(logits: Tensor, targets: Tensor, vocab_size: int, gradient: bool = True) -> Tensor:
    """The loss of each row, in nats and fp32; 0 where there is nothing to predict.

    Args:
        logits: (N, V) of any float dtype, V >= vocab_size; overwritten with softmax - onehot if `gradient`, and with 0
            beyond vocab_size and in rows without a target
        targets: (N,) ids below vocab_size, or -100 where there is nothing to predict. Another id makes the loss NaN,
            which ends the run
        vocab_size: logits beyond it are no tokens'

    Returns:
        (N,) fp32
    """
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    block = min(triton.next_power_of_2(logits.size(1)), LARGEST_BLOCK)
    if len(logits) == 0:
        return losses
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        _cross_entropy[(len(logits),)](
            logits,
            targets,
            losses,
            logits.stride(0),
            logits.size(1),
            vocab_size,
            GRADIENT=gradient,
            BLOCK=block,
            num_warps=WARPS,  # pyright: ignore[reportCallIssue]
        )
    return losses


@triton.jit
def _cross_entropy(
    logits, targets, losses, stride, width, vocab_size, GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row)
    known = (target >= 0) & (target < vocab_size)
    own = tl.load(logits + tl.where(known, target, 0)).to(tl.float32)  # read before it is overwritten

    largest = -float("inf")
    total = 0.0  # of exp(logit - largest)
    for first in range(0, vocab_size, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        x = tl.load(logits + columns, mask=columns < vocab_size, other=-float("inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(x, 0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(x - larger), 0)
        largest = larger
    loss = tl.where(known, tl.log(total) + (largest - own), float("nan"))  # in an order that keeps large logits exact
    tl.store(losses + row, tl.where(target == -100, 0.0, loss))

    if GRADIENT:
        for first in range(0, width, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            x = tl.load(logits + columns, mask=columns < vocab_size, other=-float("inf")).to(tl.float32)
            probability = tl.exp(x - largest) * (1.0 / total)
            grad = tl.where(columns == target, probability - 1.0, probability)
            grad = tl.where(target == -100, 0.0, grad)
            tl.store(logits + columns, grad.to(logits.dtype.element_ty), mask=columns < width)
