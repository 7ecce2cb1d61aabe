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

from mla_lm.attention.gla import LatentHeadsConfig, LatentHeadsMLA, LatentHeadsOptions
from mla_lm.attention.kind import AttentionKind


@dataclass
class MLRAConfig(LatentHeadsConfig):
    """Sizes of one MLRA layer."""

    of_paper = 4  # MLRA-4

    @property
    def macs_per_key(self) -> int:
        return self.num_latent_heads * super().macs_per_key


class MLRA(LatentHeadsMLA):
    """MLA in branches: n * num_heads heads attend, the first num_heads of them over the first latent (eq. 2)."""

    def __init__(self, config: MLRAConfig):
        super().__init__(config, config.num_latent_heads * config.num_heads)

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
