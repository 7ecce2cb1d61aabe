"""The optimiser: AdamW, or Muon for the matrices with AdamW for the rest."""

import math
from dataclasses import dataclass, field

import torch
from torch import nn

from mla_lm.errors import UserError
from mla_lm.model.transformer import Transformer
from mla_lm.optim.muon import MuonAdamW


@dataclass
class OptimizerConfig:
    """AdamW (arXiv 1711.05101), or Muon (arXiv 2502.16982) for the blocks' matrices and AdamW for the rest."""

    kind: str = "adamw"  # adamw | muon
    lr: float = 1.5e-3  # the peak that the schedule scales
    residual_lr: float = 1.0  # share of lr for the projections into the residual stream
    weight_decay: float = 0.1  # on matrices only
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])  # AdamW's
    momentum: float = 0.95  # Muon's
    gradient_clip: float = 1.0  # largest norm of all gradients together; 0: no clipping

    def check(self) -> None:
        """Raise UserError for invalid values."""
        if self.kind not in ("adamw", "muon"):
            raise UserError(f"optimizer.kind={self.kind} is unknown: adamw or muon")
        if not 0 < self.lr < math.inf:
            raise UserError(f"optimizer.lr={self.lr} must be a number above 0")
        if not 0 < self.residual_lr < math.inf:
            raise UserError(f"optimizer.residual_lr={self.residual_lr} must be a number above 0")
        if self.weight_decay < 0 or self.gradient_clip < 0:
            raise UserError("optimizer.weight_decay and optimizer.gradient_clip must be at least 0")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optimizer.betas={list(self.betas)} must be two numbers in [0, 1)")
        if not 0 <= self.momentum < 1:
            raise UserError(f"optimizer.momentum={self.momentum} must be in [0, 1)")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two parameter groups: matrices, with weight decay, and the rest (norms, biases), without."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def with_residual_lr(groups: list[dict], model: nn.Module, share: float) -> list[dict]:
    """Split the projections into the residual stream off the first group, to be trained at a share of the rate.

    What each block writes is normalised before it is read, so only its size beside that of the embeddings counts. Muon
    gives every matrix updates of one size, after which the outputs of the first feed-forward network are fifty times
    the embeddings and its attention's; a smaller rate keeps the sizes alike. The share is the group's `lr_share`.
    """
    if share == 1:
        return groups  # as in runs from before there was a share
    residual = {id(p) for name, p in model.named_parameters() if name.endswith(("out_proj.weight", "down_proj.weight"))}
    matrices, *others = groups
    slow = {**matrices, "params": [p for p in matrices["params"] if id(p) in residual], "lr_share": share}
    return [{**matrices, "params": [p for p in matrices["params"] if id(p) not in residual]}, *others, slow]


def build_optimizer(
    model: Transformer, config: OptimizerConfig, fused: bool = True, dtype: torch.dtype = torch.float32
) -> torch.optim.Optimizer:
    """Build the optimiser of a `Transformer`.

    Args:
        fused: run AdamW as one kernel; otherwise as a few kernels over all parameters, where the device has them
        dtype: precision in which Muon orthogonalizes; bf16 is enough where the hardware is fast in it
    """
    groups = parameter_groups(model, config.weight_decay)
    kernel = fused or None  # False would loop over the parameters on every device
    betas = (config.betas[0], config.betas[1])
    if config.kind == "adamw":
        groups = with_residual_lr(groups, model, config.residual_lr)
        optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=betas, fused=kernel)
    else:
        tables = {id(model.embedding.weight), id(model.head.weight)}  # Muon must not mix their rows, which are tokens
        matrices, rest = groups
        blocks = {**matrices, "params": [p for p in matrices["params"] if id(p) not in tables], "muon": True}
        matrices["params"] = [p for p in matrices["params"] if id(p) in tables]
        groups = with_residual_lr([blocks, matrices, rest], model, config.residual_lr)
        optimizer = MuonAdamW(groups, config.lr, betas, config.momentum, kernel, dtype)
    optimizer.register_load_state_dict_pre_hook(_keep_fused)
    return optimizer


def _keep_fused(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Make a loaded state keep this optimiser's `fused`, not that of the run that saved it.

    PyTorch places loaded state on the device that `fused` of the loaded groups needs. Those groups may come from a run
    in another precision, or from one before Muon's groups had the key.
    """
    state["param_groups"] = [{**group, "fused": optimizer.defaults["fused"]} for group in state["param_groups"]]
