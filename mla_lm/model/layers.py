"""The layers of a transformer: feed-forward network and block."""

import torch.nn.functional as F
from torch import Tensor, nn

from mla_lm.attention import KINDS
from mla_lm.attention.documents import Documents
from mla_lm.attention.kv_cache import LayerCache
from mla_lm.attention.linear import Linear
from mla_lm.model.config import TransformerConfig


class FeedForward(nn.Module):
    """SwiGLU feed-forward network (arXiv 2002.05202), (B, T, d_model) to the same."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.gate_proj = Linear(config.d_model, config.ff_hidden, bias=config.use_bias)
        self.up_proj = Linear(config.d_model, config.ff_hidden, bias=config.use_bias)
        self.down_proj = Linear(config.ff_hidden, config.d_model, bias=config.use_bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)))


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream.

    Args:
        index: the block's place in the model, from 0; in some kinds of attention, every second layer reads the keys of
            the layer before it
    """

    def __init__(self, config: TransformerConfig, index: int = 0):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.attention = KINDS[config.attention.kind].layer_at(index, config.layer_config())
        self.feed_forward_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(
        self,
        x: Tensor,
        cache: LayerCache | None = None,
        documents: Documents | None = None,
        carried: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The residual stream after this block, (B, T, d_model), and what its attention passes on to the next block."""
        out, carried = self.attention.attend(self.attention_norm(x), cache, documents, carried)
        x = x + out
        return x + self.feed_forward(self.feed_forward_norm(x)), carried
