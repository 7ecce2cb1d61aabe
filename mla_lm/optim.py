"""The optimiser: AdamW, or Muon for the matrices with AdamW for the rest."""

import math
from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from mla_lm.errors import UserError

# a, b, c of the steps x <- a x + b (x x^T) x + c (x x^T)^2 x, which bring singular values between 1e-3 and 1 nearest
# to 1, each after those before it (Polar Express, arXiv 2505.16932, algorithm 1, where there are more of them). Three
# leave those of a random matrix between 0.2 and 1.9, for three fifths of the work of five.
POLAR_STEPS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
)
SAFETY = 1.01  # bf16 rounds singular values to above 1, from where the steps lead away
UPDATE_RMS = 0.2  # about that of AdamW's updates, so that both take one learning rate (arXiv 2502.16982, section 2.2)


@dataclass
class OptimizerConfig:
    """AdamW (arXiv 1711.05101), or Muon (arXiv 2502.16982) for the blocks' matrices and AdamW for the rest."""

    kind: str = "adamw"  # adamw | muon
    lr: float = 1.5e-3  # the peak that the schedule scales
    weight_decay: float = 0.1  # of matrices only
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])  # AdamW's
    momentum: float = 0.95  # Muon's
    gradient_clip: float = 1.0  # largest norm of all gradients together; 0 for none

    def check(self) -> None:
        """Raises UserError for values that cannot be."""
        if self.kind not in ("adamw", "muon"):
            raise UserError(f"optimizer.kind={self.kind} is unknown: adamw or muon")
        if not 0 < self.lr < math.inf:
            raise UserError(f"optimizer.lr={self.lr} must be a number above 0")
        if self.weight_decay < 0 or self.gradient_clip < 0:
            raise UserError("optimizer.weight_decay and optimizer.gradient_clip must be at least 0")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optimizer.betas={list(self.betas)} must be two numbers in [0, 1)")
        if not 0 <= self.momentum < 1:
            raise UserError(f"optimizer.momentum={self.momentum} must be in [0, 1)")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices, which decay, and the rest (norms, biases), which do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, fused: bool = True, dtype: torch.dtype = torch.float32
) -> torch.optim.Optimizer:
    """The optimiser of a `Transformer`.

    Args:
        fused: AdamW in one kernel; otherwise in a few for all parameters together, where the device has such
        dtype: that Muon orthogonalizes in; bf16 serves where the hardware is fast in it
    """
    groups = parameter_groups(model, config.weight_decay)
    fused = fused or None  # False would be a loop over the parameters on every device
    if config.kind == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=tuple(config.betas), fused=fused)
    else:
        tables = {id(model.embedding.weight), id(model.head.weight)}  # their rows are no directions that mix
        matrices, rest = groups
        blocks = {**matrices, "params": [p for p in matrices["params"] if id(p) not in tables], "muon": True}
        matrices["params"] = [p for p in matrices["params"] if id(p) in tables]
        optimizer = MuonAdamW([blocks, matrices, rest], config, fused, dtype)
    optimizer.register_load_state_dict_pre_hook(_keep_fused)
    return optimizer


def _keep_fused(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load state to where the optimiser's own kernel reads it: PyTorch goes by `fused` of the groups that are loaded.

    These may be of a run in another precision, or of one from before Muon's groups had it.
    """
    state["param_groups"] = [{**group, "fused": optimizer.defaults["fused"]} for group in state["param_groups"]]


class MuonAdamW(torch.optim.Optimizer):
    """One optimiser that updates the groups with `muon` set by Muon, and the others by AdamW.

    Muon (https://kellerjordan.github.io/posts/muon) replaces the momentum of a matrix by the nearest
    semi-orthogonal one. Matrices of one shape, or of its transpose, are orthogonalized together.

    With DDP every device holds all gradients and makes the same whole update. Sharded parameters (FSDP, tensor
    parallel) are not for it: a piece of a matrix has other singular values than the matrix.

    Args:
        groups: parameter groups with `weight_decay`
        fused: as of torch.optim.AdamW
    """

    def __init__(self, groups: list[dict], config: OptimizerConfig, fused: bool | None, dtype: torch.dtype):
        shared = {"lr": config.lr, "betas": tuple(config.betas), "fused": fused}
        super().__init__(groups, {**shared, "momentum": config.momentum, "muon": False})
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
            ahead = torch._foreach_lerp(grads, momenta, group["momentum"])  # Nesterov's
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
            [p.grad for p in parameters],
            *([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq")),
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
    """The nearest semi-orthogonal matrices, about: singular values near 1, singular vectors kept.

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
