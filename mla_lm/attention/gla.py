"""Grouped Latent Attention (Hardware-Efficient Attention for Fast Decoding, arXiv 2505.21487, section 3.3).

MLA's latent is split into latent heads, each of which serves its own group of query heads. With x_t the input, j a
latent head, and i a query head of its group:

    c_t,j = RMSNorm(W^DKV_j x_t)                        kv_compressed_dim / num_latent_heads wide       (1)
    r_t = RoPE(W^KR x_t)                                one rotated key for all heads, as in MLA        (2)
    k_t,i = [W^UK_i c_t,j ; r_t],  v_t,i = W^UV_i c_t,j                                                 (3)

So GLA is MLA whose up-projections are zero outside a head's own latent, and whose norms are per latent. The paper
gives each device its latent heads; on one device, decoding absorbs as MLA does, with these zeros written out. The
cache has MLA's bytes. The equations are numbered here.
"""

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mla_lm.attention.kind import DERIVED, AttentionKind, check_positive
from mla_lm.attention.linear import Linear
from mla_lm.attention.mla import MLA, LatentNorm
from mla_lm.attention.mla_config import MLAConfig, MLAOptions
from mla_lm.errors import UserError


@dataclass
class LatentHeadsOptions(MLAOptions):
    """The keys of `model.attention` that kinds with several latents per token read: those of MLA, and their number."""

    num_latent_heads: int | None = None


@dataclass
class GLAConfig(MLAConfig):
    """Sizes of one GLA layer; `kv_compressed_dim` is the width of all latent heads together.

    Raises:
        UserError (a ValueError): the sizes are invalid or do not fit together.
    """

    num_latent_heads: int = DERIVED  # 2, as in the paper's GLA-2, if it is not given

    def __post_init__(self):
        super().__post_init__()
        self.num_latent_heads = 2 if self.num_latent_heads is None else self.num_latent_heads
        check_positive(self, "num_latent_heads")
        for name in ("num_heads", "kv_compressed_dim"):
            if getattr(self, name) % self.num_latent_heads:
                raise UserError(
                    f"{name}={getattr(self, name)} is not divisible by num_latent_heads={self.num_latent_heads}"
                )

    @property
    def latent_dim(self) -> int:
        """Width of one latent head."""
        return self.kv_compressed_dim // self.num_latent_heads


class LatentHeadsLinear(nn.Module):
    """One linear layer for each latent head, without bias; their outputs lie side by side.

    Args:
        heads: number of latent heads
        in_features: width of all latent heads together
        out_features: width of all outputs together
    """

    def __init__(self, heads: int, in_features: int, out_features: int):
        super().__init__()
        self.parts = nn.ModuleList(
            Linear(in_features // heads, out_features // heads, bias=False) for _ in range(heads)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        pieces = x.chunk(len(self.parts), dim=-1)
        return torch.cat([part(piece) for part, piece in zip(self.parts, pieces, strict=True)], dim=-1)

    @property
    def weight(self) -> Tensor:
        """The block-diagonal matrix that all parts form together, (out_features, in_features)."""
        weights = [cast(Linear, part).weight for part in self.parts]
        width, count = weights[0].size(1), len(weights)
        return torch.cat([F.pad(w, (i * width, (count - 1 - i) * width)) for i, w in enumerate(weights)])


class LatentHeadsNorm(nn.Module):
    """`LatentNorm` of each latent head by itself.

    Args:
        heads: number of latent heads
        dim: width of all latent heads together
    """

    def __init__(self, heads: int, dim: int):
        super().__init__()
        self.parts = nn.ModuleList(LatentNorm(dim // heads, eps=1e-6) for _ in range(heads))

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) to the same."""
        pieces = x.chunk(len(self.parts), dim=-1)
        return torch.cat([part(piece) for part, piece in zip(self.parts, pieces, strict=True)], dim=-1)


class GLA(MLA):
    """MLA with several latents per token, each for a group of heads."""

    def __init__(self, config: GLAConfig):
        super().__init__(config)
        c = config
        if c.latent_norm:
            self.kv_norm = LatentHeadsNorm(c.num_latent_heads, c.kv_compressed_dim)
        rows = c.num_heads * (c.nope_dim + c.value_dim)
        self.kv_up = LatentHeadsLinear(c.num_latent_heads, c.kv_compressed_dim, rows)  # W^UK and W^UV, eq. 3

    def matched_dim(self) -> int:
        return 0


KIND = AttentionKind(title="Grouped Latent Attention", options=LatentHeadsOptions, layer_config=GLAConfig, layer=GLA)
