"""Multi-head Low-Rank Attention (arXiv 2603.02188).

MLA's latent is split into latents that each serve all heads. Each is a branch of attention of its own, and the sum
over latents moves from the keys and values to the outputs. With x_t the input, j one of n latents, i a head:

    c_t,j = RMSNorm(W^DKV_j x_t)                            kv_compressed_dim / n wide                      (1)
    k_t,j,i = [W^UK_j,i c_t,j ; r_t],  v_t,j,i = W^UV_j,i c_t,j      with MLA's one rotated key r           (2)
    o_t,i = 1 / sqrt(n) sum_j Attention(q_t,i, k_j,i, v_j,i)                                                (3)

n = 4 is the paper's MLRA-4, which also scales latents (`latent_scale`). Each head attends n times: parameters and cache
are MLA's, the multiply-adds of scores and sums n times as many. Decoding absorbs as MLA does (the paper's eq. 1), with
W^UK_j and W^UV_j zero outside their own latent. The paper spreads the latents over devices; here all are on one. The
equations are numbered here.
"""

from dataclasses import dataclass

from torch import Tensor

from mla_lm.attention.gla import LatentHeadsLinear, LatentHeadsNorm, LatentHeadsOptions
from mla_lm.attention.kind import DERIVED, AttentionKind, check_positive
from mla_lm.attention.mla import MLA
from mla_lm.attention.mla_config import MLAConfig
from mla_lm.errors import UserError


@dataclass
class MLRAConfig(MLAConfig):
    """Sizes of one MLRA layer; `kv_compressed_dim` is the width of all latents together.

    Raises:
        UserError (a ValueError): the sizes are invalid or do not fit together.
    """

    num_latent_heads: int = DERIVED  # 4, as in the paper's MLRA-4, if it is not given

    def __post_init__(self):
        super().__post_init__()
        self.num_latent_heads = 4 if self.num_latent_heads is None else self.num_latent_heads
        check_positive(self, "num_latent_heads")
        if self.kv_compressed_dim % self.num_latent_heads:
            raise UserError(
                f"kv_compressed_dim={self.kv_compressed_dim} is not divisible by num_latent_heads="
                f"{self.num_latent_heads}"
            )

    @property
    def latent_dim(self) -> int:
        """Width of one latent."""
        return self.kv_compressed_dim // self.num_latent_heads

    @property
    def macs_per_key(self) -> int:
        return self.num_latent_heads * super().macs_per_key


class MLRA(MLA):
    """MLA in branches: n * num_heads heads attend, the first num_heads of them over the first latent."""

    def __init__(self, config: MLRAConfig):
        super().__init__(config)
        c = config
        if c.latent_norm:
            self.kv_norm = LatentHeadsNorm(c.num_latent_heads, c.kv_compressed_dim)
        rows = c.num_latent_heads * c.num_heads * (c.nope_dim + c.value_dim)
        self.kv_up = LatentHeadsLinear(c.num_latent_heads, c.kv_compressed_dim, rows)  # W^UK and W^UV, eq. 2

    def matched_dim(self) -> int:
        return 0

    def queries(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """MLA's queries, once for each branch: (B, T, n * H, nope_dim) and (B, T, n * H, rope_dim)."""
        branches = self.config.num_latent_heads
        q_nope, q_rope = super().queries(x, cos, sin)
        return q_nope.repeat(1, 1, branches, 1), q_rope.repeat(1, 1, branches, 1)

    def output(self, out: Tensor) -> Tensor:
        """The sum over branches (eq. 3) of (B, T, n * H, value_dim), projected into the residual stream."""
        branches = self.config.num_latent_heads
        return super().output(out.unflatten(2, (branches, -1)).sum(2) / branches**0.5)


KIND = AttentionKind(
    title="Multi-head Low-Rank Attention", options=LatentHeadsOptions, layer_config=MLRAConfig, layer=MLRA
)
