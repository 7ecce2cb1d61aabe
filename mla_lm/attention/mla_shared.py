"""MLA with one latent for each pair of layers: cross-layer attention (arXiv 2405.12981) on MLA's cache.

With x^l_t the input of layer l, and l even:

    c_t = RMSNorm(W^DKV x^l_t),  r_t = RoPE(W^KR x^l_t)      computed and cached by layer l               (1)
    k^m_t,i = [W^UK,m_i c_t ; r_t],  v^m_t,i = W^UV,m_i c_t      in layers m = l and m = l + 1            (2)

Each layer has its own queries and up-projections. The cache has half the bytes of MLA's; with an odd number of layers,
the last one serves itself alone. Decoding absorbs in both layers. The equations are numbered here.
"""

import torch
from torch import Tensor

from mla_lm.attention.documents import Documents
from mla_lm.attention.kind import AttentionKind
from mla_lm.attention.kv_cache import LayerCache, length, position
from mla_lm.attention.mla import MLA
from mla_lm.attention.mla_config import MLAConfig, MLAOptions


class SharedMLA(MLA):
    """The first layer of a pair: MLA that passes on its latents and rotated keys.

    What it passes on, `carried`, is (B, S, kv_compressed_dim + rope_dim): of the tokens of x, or with a cache of all
    that it holds.
    """

    def attend(
        self, x: Tensor, cache: LayerCache | None, documents: Documents | None, carried: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        cos, sin = self.rotation(x.size(1), length(cache), documents)
        q_nope, q_rope = self.queries(x, cos, sin)
        latent, k_rope = self.latents(x, cos, sin)
        entries = torch.cat((latent, k_rope.squeeze(2)), dim=-1)  # eq. 1
        if cache is not None:
            (entries,) = cache.append(entries.unsqueeze(1), dtype=q_nope.dtype)
            entries = entries.squeeze(1)
        return self.over(q_nope, q_rope, entries, cache, documents), entries

    def forward(self, x: Tensor, cache: LayerCache | None = None, documents: Documents | None = None) -> Tensor:
        return self.attend(x, cache, documents, None)[0]

    def over(
        self, q_nope: Tensor, q_rope: Tensor, entries: Tensor, cache: LayerCache | None, documents: Documents | None
    ) -> Tensor:
        """Attention of the queries over what a pair shares (eq. 2), projected into the residual stream."""
        if cache is not None:
            return self.output(self.over_entries(q_nope, q_rope, entries, position(cache)))
        latent, k_rope = self.split(entries)
        return self.output(self.decompressed(q_nope, q_rope, latent, k_rope, documents))


class SharedMLAReader(SharedMLA):
    """The second layer of a pair: it reads what the first one carries to it, and has no cache."""

    def __init__(self, config: MLAConfig):
        super().__init__(config)
        del self.kv_down, self.kv_norm
        self.cache_shapes = []

    def attend(
        self, x: Tensor, cache: LayerCache | None, documents: Documents | None, carried: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        assert carried is not None  # Transformer passes on what the layer before returned
        at = position(cache)
        cos, sin = self.rotation(x.size(1), carried.size(1) - x.size(1) if at is None else at, documents)
        q_nope, q_rope = self.queries(x, cos, sin)
        return self.over(q_nope, q_rope, carried, cache, documents), carried


KIND = AttentionKind(
    title="Multi-head Latent Attention with one latent for two layers",
    options=MLAOptions,
    layer_config=MLAConfig,
    layer=SharedMLA,
    reader=SharedMLAReader,
)
