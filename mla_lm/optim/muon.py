"""Muon (https://kellerjordan.github.io/posts/muon, arXiv 2502.16982) for matrices, with AdamW for the rest."""

# pyright: reportPrivateImportUsage=false
# It uses torch._foreach_*, as torch's own optimisers do.

from collections import defaultdict

import torch
from torch import Tensor
from torch.optim.adamw import adamw

# Coefficients a, b, c of the steps x <- a x + b (x x^T) x + c (x x^T)^2 x. Each step is the best one after those before
# it: it brings singular values that began between 1e-3 and 1 nearest to 1 (Polar Express, arXiv 2505.16932, algorithm
# 1, which has more steps). Three steps leave the singular values of a random matrix between 0.2 and 1.9, for three
# fifths of the work of five.
POLAR_STEPS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
)
SAFETY = 1.01  # rounding to bf16 can lift singular values above 1, from where the steps diverge
UPDATE_RMS = 0.2  # about AdamW's, so that one learning rate serves both (arXiv 2502.16982, section 2.2)


class MuonAdamW(torch.optim.Optimizer):
    """Updates the parameter groups that have `muon` set with Muon, and the others with AdamW.

    Muon (https://kellerjordan.github.io/posts/muon) replaces the momentum of a matrix by the nearest
    semi-orthogonal matrix. Matrices of equal shape, or of the transposed shape, are orthogonalized together.

    With DDP, every device holds all gradients and computes the same full update. Sharded parameters (FSDP, tensor
    parallel) are not supported: a shard of a matrix has other singular values than the matrix.

    Args:
        groups: parameter groups with `weight_decay`
        lr: learning rate of both; see UPDATE_RMS
        betas: AdamW's
        momentum: Muon's
        fused: as in torch.optim.AdamW
        dtype: precision in which Muon orthogonalizes
    """

    def __init__(
        self,
        groups: list[dict],
        lr: float,
        betas: tuple[float, float],
        momentum: float,
        fused: bool | None,
        dtype: torch.dtype,
    ):
        super().__init__(groups, {"lr": lr, "betas": betas, "fused": fused, "momentum": momentum, "muon": False})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            (self._muon if group["muon"] else self._adamw)(parameters, group)
        return loss

    def _muon(self, parameters: list[Tensor], group: dict) -> None:
        alike = defaultdict(list)
        for p in parameters:
            alike[min(p.shape), max(p.shape), p.device].append(p)
        for same in alike.values():
            for p in same:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            momenta = [self.state[p]["momentum"] for p in same]
            grads = [p.grad for p in same]
            torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
            ahead = torch._foreach_lerp(grads, momenta, group["momentum"])  # Nesterov momentum
            updates = orthogonalize(torch.stack([_wide(matrix) for matrix in ahead]).to(self.dtype)).float().unbind()
            updates = [u if u.shape == p.shape else u.mT for u, p in zip(updates, same, strict=True)]
            torch._foreach_mul_(same, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(same, updates, alpha=-group["lr"] * UPDATE_RMS * max(same[0].shape) ** 0.5)

    def _adamw(self, parameters: list[Tensor], group: dict) -> None:
        for p in parameters:
            if not self.state[p]:
                device = p.device if group["fused"] else "cpu"
                step = torch.zeros((), dtype=torch.float32, device=device)
                self.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        states = [self.state[p] for p in parameters]
        adamw(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=group["fused"],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=1e-8,
            maximize=False,
        )


def orthogonalize(matrices: Tensor) -> Tensor:
    """Approximate the nearest semi-orthogonal matrices: singular values near 1, singular vectors kept.

    Args:
        matrices: (N, m, n), m <= n

    Returns:
        (N, m, n)
    """
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) * SAFETY + 1e-7)
    for a, b, c in POLAR_STEPS:
        a, b, c = a / SAFETY, b / SAFETY**3, c / SAFETY**5
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _wide(matrix: Tensor) -> Tensor:
    return matrix.mT if matrix.size(0) > matrix.size(1) else matrix
