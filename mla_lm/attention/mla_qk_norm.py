"""MLA with RMSNorm on queries and keys that survives absorption (QK-Normed MLA, arXiv 2606.16310).

The norms are over each whole head after its up-projection. With q_t,i and k_t,i = [W^UK_i c_t ; W^KR x_t] those of head
i, g^Q and g^K the norms' weights, and * by elements:

    s_t,i = 1 / sqrt(mean(k_t,i^2) + eps)                                    one number per token and head    (1)
    k'_t,i = RoPE(s_t,i g^K * k_t,i),  q'_t,i = RoPE(RMSNorm(q_t,i) * g^Q)                                    (2)

RoPE turns the last rope_dim elements alone. s does not depend on the query, and the part of g^K that meets W^UK moves
to the query like W^UK itself. So a score on the cached latents is

    q'_t,i . k'_u,i = s_u,i ([W^UK_i^T (g^K * q'_t,i) ; q'^R_t,i] . [c_u ; r_u]),   r_u = RoPE(g^K * W^KR x_u)    (3)

which is exact. c, r and s are cached: num_heads elements more than MLA's. As s scales the keys of each head
differently, the absorbed path computes its softmax with plain products. The equations are numbered here.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mla_lm.attention.documents import Documents, document_attention
from mla_lm.attention.first_head import FirstHead, rms
from mla_lm.attention.kind import AttentionKind
from mla_lm.attention.kv_cache import LayerCache, length
from mla_lm.attention.mla import MLA, LatentNorm, into_latents, out_of_latents
from mla_lm.attention.mla_config import MLAConfig, MLAOptions
from mla_lm.attention.rope import rotate
from mla_lm.attention.sdpa import causal_softmax

EPS = 1e-6


@dataclass
class QKNormMLAConfig(MLAConfig):
    """Sizes of one layer: those of MLA.

    Raises:
        UserError (a ValueError): the sizes are invalid or do not fit together.
    """

    @property
    def cached_elements(self) -> int:
        """Elements cached per token: MLA's, and the inverse RMS of each head's key."""
        return super().cached_elements + self.num_heads


class QKNormMLA(MLA):
    """MLA whose queries and keys have a norm."""

    def __init__(self, config: QKNormMLAConfig):
        super().__init__(config)
        self.q_head_norm = LatentNorm(self.qk_dim, eps=EPS)  # g^Q
        self.k_head_weight = nn.Parameter(torch.ones(self.qk_dim))  # g^K
        heads, parts = self.cache_shapes[0]
        self.cache_shapes = [(heads, (*parts, config.num_heads))]

    def set_first_head(self, x: Tensor, head: FirstHead) -> None:
        """`AttentionLayer.set_first_head`: the norms' weights give the score its size."""
        super().set_first_head(x, head)
        c = self.config
        part = slice(c.nope_dim, None) if head.match is None else slice(c.nope_dim)  # of a query, that is not zero
        latent, k_rope = self.kv_down(x).split((c.kv_compressed_dim, c.rope_dim), dim=-1)
        k_nope = self.up(self.scaled(self.kv_norm(latent), c.latent_dim))[0][:, :, 0]
        self.q_head_norm.weight[part] = rms(self.plain_queries(x)[:, :, 0])
        self.k_head_weight[part] = rms(torch.cat((k_nope, k_rope), dim=-1))

    def forward(self, x: Tensor, cache: LayerCache | None = None, documents: Documents | None = None) -> Tensor:
        c = self.config
        cos, sin = self.rotation(x.size(1), length(cache), documents)
        q_nope, q_rope = self.queries(x, cos, sin)
        latent, k_rope = self.kv_down(x).split((c.kv_compressed_dim, c.rope_dim), dim=-1)
        latent, k_rope = self.scaled(self.kv_norm(latent), c.latent_dim), k_rope.unsqueeze(2)
        k_nope, v = self.up(latent)
        squares = k_nope.float().square().sum(-1) + k_rope.float().square().sum(-1)
        inverse_rms = (squares / self.qk_dim + EPS).rsqrt()  # eq. 1: (B, T, H)
        k_rope = rotate(k_rope * self.k_head_weight[c.nope_dim :].to(k_rope.dtype), cos, sin)  # r: (B, T, 1, rope_dim)
        if cache is None:
            return self.output(self.over_keys(q_nope, q_rope, k_nope, v, k_rope, inverse_rms, documents))
        entry = torch.cat((latent, k_rope.squeeze(2), inverse_rms), dim=-1)
        (entries,) = cache.append(entry.unsqueeze(1), dtype=q_nope.dtype)
        entries = entries.squeeze(1)  # (B, S, kv_compressed_dim + rope_dim + H)
        if self.absorbing_is_cheaper(x.size(1), entries.size(1)):
            return self.output(self.absorbed(q_nope, q_rope, entries, cache.position))
        latent, k_rope, inverse_rms = entries.split((c.kv_compressed_dim, c.rope_dim, c.num_heads), dim=-1)
        keys = (*self.up(latent), k_rope.unsqueeze(2), inverse_rms)
        return self.output(self.over_keys(q_nope, q_rope, *keys, position=cache.position))

    def queries(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """The normalised queries of x: (B, T, H, nope_dim), and (B, T, H, rope_dim), rotated (eq. 2)."""
        q = self.plain_queries(x)
        q_nope, q_rope = self.q_head_norm(q).to(q.dtype).split((self.config.nope_dim, self.config.rope_dim), dim=-1)
        return q_nope, rotate(q_rope, cos, sin)

    def over_keys(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        k_nope: Tensor,
        v: Tensor,
        k_rope: Tensor,
        inverse_rms: Tensor,
        documents: Documents | None = None,
        position: Tensor | None = None,
    ) -> Tensor:
        """Attention on the keys themselves (eq. 2): (B, T, H, value_dim)."""
        k_nope = k_nope * self.k_head_weight[: self.config.nope_dim].to(k_nope.dtype)
        k = torch.cat((k_nope, k_rope.to(k_nope.dtype).expand(-1, -1, v.size(2), -1)), dim=-1)
        k = k * inverse_rms.to(k.dtype).unsqueeze(-1)
        q, k, v = (t.transpose(1, 2) for t in (torch.cat((q_nope, q_rope), dim=-1), k, v))
        return document_attention(q, k, v, self.scale, documents, position).transpose(1, 2)

    def absorbed(self, q_nope: Tensor, q_rope: Tensor, entries: Tensor, position: Tensor | None = None) -> Tensor:
        """Attention on the cached latents (eq. 3); shapes as in `MLA.absorbed`, with the inverse RMS in `entries`."""
        c = self.config
        w_uk, w_uv = self.up_weights(q_nope)
        q_nope = q_nope * self.k_head_weight[: c.nope_dim].to(q_nope.dtype)
        q = torch.cat((into_latents(q_nope, w_uk), q_rope.transpose(1, 2)), dim=-1)  # (B, H, T, d_c + rope_dim)
        key, inverse_rms = entries.split((c.kv_compressed_dim + c.rope_dim, c.num_heads), dim=-1)
        scores = (q.flatten(1, 2) @ key.mT).unflatten(1, q.shape[1:3])  # (B, H, T, S)
        weights = causal_softmax(scores * (self.scale * inverse_rms.mT.unsqueeze(2)), position)
        out = (weights.flatten(1, 2) @ key[..., : c.kv_compressed_dim]).unflatten(1, q.shape[1:3])
        return out_of_latents(out, w_uv)


KIND = AttentionKind(
    title="Multi-head Latent Attention with norms of queries and keys",
    options=MLAOptions,
    layer_config=QKNormMLAConfig,
    layer=QKNormMLA,
)
