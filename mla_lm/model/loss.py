"""Output projection and cross-entropy in one function, so that the logits of all tokens never exist at once."""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # a target that does not count
CHUNK_LOGITS = {"cpu": 2**18, "cuda": 2**27}  # logits at once: what a CPU's caches hold; 0.5 GiB on a GPU
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
            F.cross_entropy(F.linear(part, weight).float(), target, ignore_index=IGNORE, reduction="none")
            for part, target in zip(flat.split(rows), flat_targets.split(rows), strict=True)
        ]
    )
    return losses.view_as(targets) if reduction == "none" else losses.sum() / _count(targets)


class _MeanLoss(torch.autograd.Function):
    """The mean loss. Its forward pass computes the gradients too, while each chunk's logits exist.

    The gradient of the logits is softmax - onehot. Computing it in the backward pass would need the same logits again.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        # Cast the weight once. Without a graph, autocast keeps no copies and would cast it again for every product.
        autocast = torch.is_autocast_enabled(x.device.type)
        matrix = weight.to(torch.get_autocast_dtype(x.device.type)) if autocast else weight
        rows = _rows_per_chunk(x, weight)
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        grad_x = torch.empty_like(x)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=x.device)
        for part, target, grad_part in zip(x.split(rows), targets.split(rows), grad_x.split(rows), strict=True):
            target = target.unsqueeze(1)
            valid = target != IGNORE
            target = target.masked_fill(~valid, 0)
            part = part.to(matrix.dtype)
            logits = F.linear(part, matrix)
            probs = F.log_softmax(logits, dim=-1, dtype=torch.float32)
            loss -= (probs.gather(1, target) * valid).sum()
            grad = probs.exp_().scatter_add_(1, target, -torch.ones_like(target, dtype=torch.float32)).mul_(valid)
            grad = grad.to(logits.dtype)  # the forward product's dtype serves the backward ones
            grad_part.copy_(grad @ matrix)
            grad_weight += grad.T @ part
        count = _count(targets)
        ctx.save_for_backward(grad_x, grad_weight.to(weight.dtype), count)
        return loss / count

    @staticmethod
    def backward(ctx, grad_loss: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_x, grad_weight, count = ctx.saved_tensors
        # Divide by the count only here, where the loss scaler's factor is known: else gradients underflow in fp16.
        factor = grad_loss / count
        return grad_x * factor.to(grad_x.dtype), grad_weight * factor.to(grad_weight.dtype), None


def _count(targets: Tensor) -> Tensor:
    return (targets != IGNORE).sum().clamp(min=1)


def _rows_per_chunk(x: Tensor, weight: Tensor) -> int:
    return max(LEAST_ROWS, CHUNK_LOGITS.get(x.device.type, CHUNK_LOGITS["cuda"]) // len(weight))
