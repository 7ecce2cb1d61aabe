"""Multi-head, grouped-query (arXiv 2305.13245) and multi-query (arXiv 1911.02150) attention: the baselines."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from mla_lm.attention.documents import Documents, document_attention
from mla_lm.attention.first_head import FirstHead, rotated_head, slow_rows
from mla_lm.attention.kind import DERIVED, AttentionKind, TransformersForm, check_positive
from mla_lm.attention.kv_cache import LayerCache, length, position
from mla_lm.attention.layer import AttentionLayer
from mla_lm.attention.linear import Linear
from mla_lm.attention.rope import RotaryEmbedding, YarnConfig, rotate
from mla_lm.attention.sdpa import quantized_attention, reads_int8
from mla_lm.errors import UserError


@dataclass
class GroupOptions:
    """The key of `model.attention` that the kinds with groups of query heads read."""

    num_kv_heads: int | None = None


@dataclass
class GQAOptions(GroupOptions):
    """The keys of `model.attention` that MHA, GQA and MQA read."""

    rope_dim: int | None = None


@dataclass
class MHAConfig:
    """Sizes of one MHA, GQA or MQA layer.

    `num_kv_heads` decides which: num_heads (the default, None) is MHA, 1 is MQA, and a divisor in between is GQA.

    Raises:
        UserError (a ValueError): the sizes are invalid or do not fit together.
    """

    d_model: int
    num_heads: int
    seq_len: int  # longest sequence, in tokens
    num_kv_heads: int = DERIVED
    dropout: float = 0.0  # on the layer's output; attention weights are never dropped
    use_bias: bool = False
    rope_base: float = 10000.0
    yarn: YarnConfig = field(default_factory=YarnConfig)
    rope_dim: int = DERIVED  # the part of each head that RoPE rotates; None: the whole head. 0: no positions

    def __post_init__(self):
        if self.num_kv_heads is None:
            self.num_kv_heads = self.num_heads
        check_positive(self, "d_model", "num_heads", "seq_len", "num_kv_heads", "rope_base")
        self.yarn.check()
        if self.d_model % self.num_heads:
            raise UserError(f"d_model={self.d_model} is not divisible by num_heads={self.num_heads}")
        if self.d_model // self.num_heads % 2:
            raise UserError(f"a head of d_model / num_heads = {self.d_model // self.num_heads} must be even for RoPE")
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"num_heads={self.num_heads} is not divisible by num_kv_heads={self.num_kv_heads}")
        if self.rope_dim is None:
            self.rope_dim = self.head_dim
        if self.rope_dim % 2 or not 0 <= self.rope_dim <= self.head_dim:
            raise UserError(
                f"rope_dim={self.rope_dim} must be even, at least 0, and at most the "
                f"d_model / num_heads = {self.head_dim} of a head"
            )

    @property
    def head_dim(self) -> int:
        return self.d_model // self.num_heads

    @property
    def cached_elements(self) -> int:
        """Elements cached per token: its keys and values."""
        return 2 * self.num_kv_heads * self.head_dim

    @property
    def macs_per_key(self) -> int:
        return self.num_heads * 2 * self.head_dim

    @property
    def macs_per_token(self) -> int:
        return 0

    @property
    def rotated_dim(self) -> int:
        return self.rope_dim


class MHA(AttentionLayer):
    """Causal self-attention that caches the keys and values of `num_kv_heads` heads."""

    def __init__(self, config: MHAConfig):
        super().__init__()
        self.config = c = config
        self.head_dim = c.head_dim
        self.scale = self.head_dim**-0.5 * c.yarn.score_scale
        kv_dim = c.num_kv_heads * self.head_dim
        self.q_proj = Linear(c.d_model, c.d_model, bias=c.use_bias)
        self.k_proj = Linear(c.d_model, kv_dim, bias=c.use_bias)
        self.v_proj = Linear(c.d_model, kv_dim, bias=c.use_bias)
        self.out_proj = Linear(c.d_model, c.d_model, bias=c.use_bias)
        self.cache_shapes = 2 * [(c.num_kv_heads, (c.head_dim,))]  # keys and values
        self.rope = RotaryEmbedding(self.head_dim, c.seq_len, c.rope_base, c.yarn, rotated=c.rope_dim)
        self.dropout = nn.Dropout(c.dropout)

    def matched_dim(self) -> int:
        return len(slow_rows(self.rope)) if self.config.rope_dim else 0

    def set_first_head(self, x: Tensor, head: FirstHead) -> None:
        weights = rotated_head(head, x, self.rope, self.scale)
        for proj, weight in zip((self.q_proj, self.k_proj, self.v_proj), weights, strict=True):
            proj.weight[: self.head_dim] = weight
        self.out_proj.weight[:, : self.head_dim] = 0
        self.out_proj.weight[:, : len(head.value)] = head.out

    def forward(self, x: Tensor, cache: LayerCache | None = None, documents: Documents | None = None) -> Tensor:
        cos, sin = self.rotation(x.size(1), length(cache), documents)
        q = rotate(self.q_proj(x).unflatten(-1, (-1, self.head_dim)), cos, sin).transpose(1, 2)  # (B, H, T, D)
        k = rotate(self.k_proj(x).unflatten(-1, (-1, self.head_dim)), cos, sin).transpose(1, 2)  # (B, H_kv, T, D)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        if cache is not None and reads_int8(q, cache):
            k, k_scales, v, v_scales = cache.store(k, v)
            out = quantized_attention(q, k, v, k_scales, v_scales, self.scale, cache.position)
        else:
            if cache is not None:
                k, v = cache.append(k, v, dtype=q.dtype)
            out = document_attention(q, k, v, self.scale, documents, position(cache))
        return self.dropout(self.out_proj(out.transpose(1, 2).flatten(2)))


def kind_of_heads(num_kv_heads: int | None, num_heads: int) -> str:
    """The kind of attention that has this many key heads: mha, gqa or mqa."""
    return {1: "mqa", num_heads: "mha", None: "mha"}.get(num_kv_heads, "gqa")


def _checked(kind: str, wanted: str) -> Callable[..., MHAConfig]:
    """Make a function that builds an `MHAConfig` and refuses a number of key heads that is not of this kind."""

    def layer_config(num_kv_heads: int | None, num_heads: int, **sizes: Any) -> MHAConfig:
        if num_kv_heads is None and kind == "mqa":
            num_kv_heads = 1
        heads = DERIVED if num_kv_heads is None else num_kv_heads
        config = MHAConfig(num_kv_heads=heads, num_heads=num_heads, **sizes)
        if kind_of_heads(num_kv_heads, num_heads) != kind:
            raise UserError(f"num_kv_heads={num_kv_heads} of {num_heads} heads is not {kind}: it must be {wanted}")
        return config

    return layer_config


def _kind(title: str, kind: str, wanted: str) -> AttentionKind:
    form = TransformersForm(
        architecture="LlamaForCausalLM",
        projections={"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "out_proj": "o_proj"},
        entries={"num_key_value_heads": "num_kv_heads", "head_dim": "head_dim"},
    )
    return AttentionKind(title, GQAOptions, _checked(kind, wanted), MHA, form)


MHA_KIND = _kind("multi-head attention", "mha", "num_heads, or left out")
GQA_KIND = _kind("grouped-query attention", "gqa", "a divisor of num_heads between the two")
MQA_KIND = _kind("multi-query attention", "mqa", "1, or left out")
