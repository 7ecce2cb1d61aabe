"""Output projection and cross-entropy in one function, so that the logits of all tokens never exist at once."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mla_lm.hardware import runs_triton

IGNORE = -100  # a target that does not count
CHUNK_LOGITS = {"cpu": 2**18, "cuda": 2**27}  # logits at once: what a CPU's caches hold; in bf16 0.25 GiB
MULTIPLE = 64  # on a GPU, products are fastest where the logits of a row are a multiple of this
LEAST_ROWS = 512  # in smaller chunks, accumulating the weight's gradient takes longer than the products


@torch.compiler.disable()  # the compiler would unroll the loop over chunks, which costs more than it gains
def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy of softmax(x weight^T) against targets, accumulated in fp32 whatever the inputs' dtype.

    Args:
        x: (B, T, D)
        weight: (V, D)
        targets: (B, T) ids, -100 where there is nothing to predict
        reduction: "mean" over the targets other than -100, or "none"

    Returns:
        the loss in nats, fp32: a scalar (0 if no target counts), or (B, T) with 0 where the target is -100

    Raises:
        ValueError: the reduction is neither of the two.
    """
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction={reduction!r} is unknown: 'mean' or 'none'")
    flat, flat_targets = x.flatten(0, 1), targets.flatten()
    if reduction == "mean" and torch.is_grad_enabled():
        return _MeanLoss.apply(flat, weight, flat_targets)
    rows = _rows_per_chunk(x, weight)
    losses = torch.cat(
        [
            _losses(F.linear(part, weight), target)
            for part, target in zip(flat.split(rows), flat_targets.split(rows), strict=True)
        ]
    )
    return losses.view_as(targets) if reduction == "none" else losses.sum() / _count(targets)


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """The loss of each row of logits, (N, V): (N,) fp32."""
    if runs_triton(logits.device) and not logits.requires_grad:
        from mla_lm.model.triton_loss import cross_entropy_

        return cross_entropy_(logits, targets, logits.size(1), gradient=False)
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORE, reduction="none")


class _MeanLoss(torch.autograd.Function):
    """The mean loss. Its forward pass computes the gradients too, while each chunk's logits exist.

    The gradient of the logits is softmax - onehot. Computing it in the backward pass would need the same logits again.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        # Cast the weight once. Without a graph, autocast keeps no copies and would cast it again for every product.
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else weight.dtype
        in_place = runs_triton(x.device)
        matrix = _padded(weight, dtype) if in_place else weight.to(dtype)
        rows = _rows_per_chunk(x, weight)
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        grad_x = torch.empty_like(x)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=x.device)
        for part, target, grad_part in zip(x.split(rows), targets.split(rows), grad_x.split(rows), strict=True):
            part = part.to(dtype)
            logits = F.linear(part, matrix)
            total, grad = _in_place(logits, target, len(weight)) if in_place else _by_torch(logits, target)
            loss += total
            grad_part.copy_(grad @ matrix)
            grad_weight += (grad.T @ part)[: len(weight)]
            del logits, grad  # before the next chunk's exist
        count = _count(targets)
        ctx.save_for_backward(grad_x, grad_weight.to(weight.dtype), count)
        return loss / count

    @staticmethod
    def backward(ctx, grad_loss: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_x, grad_weight, count = ctx.saved_tensors
        # Divide by the count only here, where the loss scaler's factor is known: else gradients underflow in fp16.
        factor = grad_loss / count
        return grad_x * factor.to(grad_x.dtype), grad_weight * factor.to(grad_weight.dtype), None


def _by_torch(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the losses of all rows, and its gradient by the logits, (N, V), in their dtype."""
    targets = targets.unsqueeze(1)
    valid = targets != IGNORE
    targets = targets.masked_fill(~valid, 0)
    probs = F.log_softmax(logits, dim=-1, dtype=torch.float32)
    total = -(probs.gather(1, targets) * valid).sum()
    grad = probs.exp_().scatter_add_(1, targets, -torch.ones_like(targets, dtype=torch.float32)).mul_(valid)
    return total, grad.to(logits.dtype)


def _in_place(logits: Tensor, targets: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """The same by one kernel, which writes the gradient over the logits; those beyond vocab_size are no tokens'."""
    from mla_lm.model.triton_loss import cross_entropy_

    return cross_entropy_(logits, targets, vocab_size).sum(), logits


def _padded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of the head's weight in `dtype`, with rows of zeros up to a multiple of MULTIPLE."""
    rows = -(-len(weight) // MULTIPLE) * MULTIPLE
    matrix = weight.new_zeros(rows, weight.size(1), dtype=dtype)
    matrix[: len(weight)] = weight
    return matrix


def _count(targets: Tensor) -> Tensor:
    return (targets != IGNORE).sum().clamp(min=1)


def _rows_per_chunk(x: Tensor, weight: Tensor) -> int:
    return max(LEAST_ROWS, CHUNK_LOGITS.get(x.device.type, CHUNK_LOGITS["cuda"]) // len(weight))
