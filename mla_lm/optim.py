"""The optimiser and its parameter groups."""

import math
from dataclasses import dataclass, field

import torch
from torch import nn

from mla_lm.errors import UserError


@dataclass
class OptimizerConfig:
    """AdamW (arXiv 1711.05101); `lr` is the peak that the schedule scales."""

    lr: float = 1.5e-3
    weight_decay: float = 0.1  # of matrices only
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    gradient_clip: float = 1.0  # largest norm of all gradients together; 0 for none

    def check(self) -> None:
        """Raises UserError for values that cannot be."""
        if not 0 < self.lr < math.inf:
            raise UserError(f"optimizer.lr={self.lr} must be a number above 0")
        if self.weight_decay < 0 or self.gradient_clip < 0:
            raise UserError("optimizer.weight_decay and optimizer.gradient_clip must be at least 0")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optimizer.betas={list(self.betas)} must be two numbers in [0, 1)")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices, which decay, and the rest (norms, biases), which do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, config: OptimizerConfig, fused: bool = True) -> torch.optim.Optimizer:
    """AdamW over `parameter_groups`."""
    groups = parameter_groups(model, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=tuple(config.betas), fused=fused)
