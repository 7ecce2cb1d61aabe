"""What the layers of all kinds of attention do alike."""

from typing import Any

import torch
from torch import Tensor, nn

from mla_lm.attention.documents import Documents
from mla_lm.attention.first_head import FirstHead
from mla_lm.attention.kv_cache import LayerCache
from mla_lm.attention.linear import Linear
from mla_lm.attention.rope import RotaryEmbedding


class AttentionLayer(nn.Module):
    """Causal self-attention with a cache. A kind adds its projections and `forward`.

    Attributes:
        config: the layer's sizes, a `LayerConfig`
        cache_shapes: for each tensor of the cache, its number of heads and the widths of its parts; see `LayerCache`
        rope: rotation of the kind's queries and keys
        out_proj: the projection into the residual stream
    """

    config: Any
    cache_shapes: list[tuple[int, tuple[int, ...]]]
    rope: RotaryEmbedding
    out_proj: Linear

    def matched_dim(self) -> int:
        """How many numbers `set_first_head` can match and write; 0: it has no such head, or not with these sizes."""
        return 0

    def set_first_head(self, x: Tensor, head: FirstHead) -> None:
        """Set the first head's weights such that it does what `head` says.

        Args:
            x: inputs to measure sizes on, (B, T, d_model)
        """
        raise NotImplementedError

    def forward(self, x: Tensor, cache: LayerCache | None = None, documents: Documents | None = None) -> Tensor:
        """Attend causally over x; with a cache, append x to it and attend over all that it holds.

        Args:
            x: (B, T, d_model)
            cache: a cache from `new_cache`
            documents: attend only within each of these; not together with a cache

        Returns:
            (B, T, d_model)

        Raises:
            ValueError: there are more tokens than `seq_len`, or than the cache has room for.
        """
        raise NotImplementedError

    def attend(
        self, x: Tensor, cache: LayerCache | None, documents: Documents | None, carried: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Attention as a block calls it: `forward`, and what one layer passes on to the next.

        Most kinds pass nothing on; a kind whose layers share keys overrides this.

        Args:
            carried: what the layer before returned; None in the first layer

        Returns:
            (B, T, d_model), and what the next layer gets
        """
        return self(x, cache, documents), None

    def init_weights(self) -> None:
        """Draw the weights that begin otherwise than the model's matrices do, which are N(0, 0.02^2)."""

    def rotation(self, tokens: int, past: int | Tensor, documents: Documents | None) -> tuple[Tensor, Tensor]:
        """cos and sin of the `tokens` positions after `past` earlier ones; see `RotaryEmbedding.forward`.

        Returns:
            (T, D/2) each, or (B, T, D/2) where positions begin at documents

        Raises:
            ValueError: there are more tokens than `seq_len`.
        """
        cos, sin = self.rope(past, tokens)
        if documents is None:
            return cos, sin
        return cos[documents.positions], sin[documents.positions]

    def new_cache(
        self,
        batch_size: int,
        max_len: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> LayerCache:
        """An empty cache with room for `max_len` tokens; if None, one that grows up to seq_len. See `LayerCache`.

        dtype and device default to those of the weights. With int8, each part of `cache_shapes` has a scale per token.
        """
        weight, limit = self.out_proj.weight, max_len or self.config.seq_len
        dtype, device = dtype or weight.dtype, device or weight.device
        return LayerCache(batch_size, limit, self.cache_shapes, dtype, device, grows=max_len is None)
