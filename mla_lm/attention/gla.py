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
from typing import ClassVar, cast

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
class LatentHeadsConfig(MLAConfig):
    """Sizes of one layer with several latents per token; `kv_compressed_dim` is the width of all of them together.

    Raises:
        UserError (a ValueError): the sizes are invalid or do not fit together.
    """

    num_latent_heads: int = DERIVED  # if it is not given, as many as in the paper of the kind
    of_paper: ClassVar[int]

    def __post_init__(self):
        super().__post_init__()
        self.num_latent_heads = self.of_paper if self.num_latent_heads is None else self.num_latent_heads
        check_positive(self, "num_latent_heads")
        self.check_divisible("kv_compressed_dim")

    def check_divisible(self, name: str) -> None:
        """Raise UserError unless the latents can share this size equally."""
        if getattr(self, name) % self.num_latent_heads:
            raise UserError(
                f"{name}={getattr(self, name)} is not divisible by num_latent_heads={self.num_latent_heads}"
            )

    @property
    def latent_dim(self) -> int:
        """Width of one latent."""
        return self.kv_compressed_dim // self.num_latent_heads


@dataclass
class GLAConfig(LatentHeadsConfig):
    """Sizes of one GLA layer."""

    of_paper = 2  # GLA-2

    def __post_init__(self):
        super().__post_init__()
        self.check_divisible("num_heads")


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


class LatentHeadsMLA(MLA):
    """MLA whose keys and values are made of several latents.

    Args:
        heads: of keys and values, the first of them made of the first latent
    """

    def __init__(self, config: LatentHeadsConfig, heads: int):
        super().__init__(config)
        c = config
        if c.latent_norm:
            self.kv_norm = LatentHeadsNorm(c.num_latent_heads, c.kv_compressed_dim)
        rows = heads * (c.nope_dim + c.value_dim)
        self.kv_up = LatentHeadsLinear(c.num_latent_heads, c.kv_compressed_dim, rows)  # W^UK and W^UV

    def first_ups(self) -> list[Tensor]:
        rows = self.config.nope_dim + self.config.value_dim
        return [cast(Linear, part).weight[:rows] for part in self.kv_up.parts]


class GLA(LatentHeadsMLA):
    """MLA with several latents per token, each for a group of heads (eq. 3)."""

    def __init__(self, config: GLAConfig):
        super().__init__(config, config.num_heads)

    def first_ups(self) -> list[Tensor]:
        return super().first_ups()[:1]


KIND = AttentionKind(title="Grouped Latent Attention", options=LatentHeadsOptions, layer_config=GLAConfig, layer=GLA)
