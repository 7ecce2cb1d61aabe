"""Tensor Product Attention (Tensor Product Attention Is All You Need, arXiv 2501.06425)."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mla_lm.attention.documents import Documents, document_attention
from mla_lm.attention.first_head import FirstHead, rotated_head, slow_rows, unit
from mla_lm.attention.kind import DERIVED, AttentionKind, check_positive
from mla_lm.attention.kv_cache import LayerCache, length, position
from mla_lm.attention.layer import AttentionLayer
from mla_lm.attention.linear import Linear
from mla_lm.attention.rope import RotaryEmbedding, YarnConfig, rotate
from mla_lm.attention.sdpa import causal_softmax
from mla_lm.errors import UserError


@dataclass
class TPAOptions:
    """The keys of `model.attention` that only TPA reads; see `TPAConfig`."""

    q_rank: int | None = None
    kv_rank: int | None = None


@dataclass
class TPAConfig:
    """Sizes of one TPA layer, with the paper's symbols in brackets.

    Raises:
        UserError (a ValueError): the sizes are invalid or do not fit together.
    """

    d_model: int
    num_heads: int  # [h]
    seq_len: int  # longest sequence, in tokens
    q_rank: int = DERIVED  # [R_Q]: terms in the sum that makes a token's queries; 6 if it is not given, as in the paper
    kv_rank: int = DERIVED  # [R_K = R_V]: the same for its keys, and for its values; 2 if it is not given
    dropout: float = 0.0  # on the layer's output; attention weights are never dropped
    use_bias: bool = False
    rope_base: float = 10000.0
    yarn: YarnConfig = field(default_factory=YarnConfig)

    def __post_init__(self):
        self.q_rank = 6 if self.q_rank is None else self.q_rank
        self.kv_rank = 2 if self.kv_rank is None else self.kv_rank
        check_positive(self, "d_model", "num_heads", "seq_len", "q_rank", "kv_rank", "rope_base")
        self.yarn.check()
        if self.d_model % self.num_heads:
            raise UserError(f"d_model={self.d_model} is not divisible by num_heads={self.num_heads}")
        if self.head_dim % 2:
            raise UserError(f"a head of d_model / num_heads = {self.head_dim} must be even for RoPE")

    @property
    def head_dim(self) -> int:
        """[d_h]"""
        return self.d_model // self.num_heads

    @property
    def cached_elements(self) -> int:
        """Elements cached per token: the factors of its keys and of its values (section 3.3)."""
        return 2 * self.kv_rank * (self.num_heads + self.head_dim)

    @property
    def macs_per_key(self) -> int:
        return self.num_heads * 2 * self.head_dim

    @property
    def macs_per_token(self) -> int:
        """Of the products of factors that make queries, keys and values."""
        return (self.q_rank + 2 * self.kv_rank) * self.num_heads * self.head_dim

    @property
    def rotated_dim(self) -> int:
        return self.head_dim


class TPA(AttentionLayer):
    """Causal self-attention whose queries, keys and values are sums of products of two factors per token.

    A factor A has an element for each head, a factor B one for each dimension of a head. The cache keeps the factors
    of keys and values, those of keys rotated. Training and prefill multiply them out; for a few queries over a long
    cache, scores and outputs are computed from the factors instead. Both give the same result.
    """

    def __init__(self, config: TPAConfig):
        super().__init__()
        self.config = c = config
        self.scale = c.head_dim**-0.5 * c.yarn.score_scale
        width = c.num_heads + c.head_dim  # A, then B, for each term of the sum (eq. 3.1)
        self.q_proj = Linear(c.d_model, c.q_rank * width, bias=c.use_bias)
        self.k_proj = Linear(c.d_model, c.kv_rank * width, bias=c.use_bias)
        self.v_proj = Linear(c.d_model, c.kv_rank * width, bias=c.use_bias)
        self.out_proj = Linear(c.d_model, c.d_model, bias=c.use_bias)  # W^O, eq. 3.3
        self.cache_shapes = 2 * [(c.kv_rank, (c.num_heads, c.head_dim))]  # factors of keys and of values
        self.rope = RotaryEmbedding(c.head_dim, c.seq_len, c.rope_base, c.yarn)
        self.dropout = nn.Dropout(c.dropout)

    def init_weights(self) -> None:
        """Xavier's initialisation of the factors (section 3.1)."""
        for proj in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.xavier_uniform_(proj.weight)

    def matched_dim(self) -> int:
        return len(slow_rows(self.rope))

    def set_first_head(self, x: Tensor, head: FirstHead) -> None:
        """`AttentionLayer.set_first_head`: the first head is the first term of each sum, and has no other.

        Its factor A is constant, and factor B is what the head's query, key or value should be. Keys and values often
        have this one term, so the other heads keep their share of it; of the queries they have the other terms.
        """
        n, dim, heads = len(head.value), self.config.head_dim, self.config.num_heads
        weights = rotated_head(head, x, self.rope, self.scale)
        for proj, weight in zip((self.q_proj, self.k_proj, self.v_proj), weights, strict=True):
            factors = proj.weight.unflatten(0, (-1, heads + dim))  # (R, H + D, d_model)
            a, b = unit(head.constant, x), len(factors) * weight  # `product` takes the mean of the terms
            share = (b.norm() / a.norm()) ** 0.5  # training changes their product least where both are of one size
            factors[:, 0] = 0
            factors[0, :1] = a * share
            factors[0, heads:] = b / share
        self.q_proj.weight[1:heads] = 0
        self.out_proj.weight[:, :dim] = 0
        self.out_proj.weight[:, :n] = head.out

    def forward(self, x: Tensor, cache: LayerCache | None = None, documents: Documents | None = None) -> Tensor:
        c = self.config
        cos, sin = self.rotation(x.size(1), length(cache), documents)
        q, k, v = (
            proj(x).unflatten(-1, (rank, -1))  # (B, T, R, H + D)
            for proj, rank in ((self.q_proj, c.q_rank), (self.k_proj, c.kv_rank), (self.v_proj, c.kv_rank))
        )
        q, k = (
            torch.cat((factors[..., : c.num_heads], rotate(factors[..., c.num_heads :], cos, sin)), dim=-1)  # eq. 3.5
            for factors in (q, k)
        )
        q = self.product(q.transpose(1, 2))
        k, v = k.transpose(1, 2), v.transpose(1, 2)  # (B, R, T, H + D)
        if cache is not None:
            k, v = cache.append(k, v, dtype=q.dtype)
            if self.factors_are_cheaper(x.size(1)):
                return self.output(self.by_factors(q, k, v, cache.position))
        k, v = self.product(k), self.product(v)
        return self.output(document_attention(q, k, v, self.scale, documents, position(cache)))

    def product(self, factors: Tensor) -> Tensor:
        """The mean of the terms' products, (B, R, T, H + D) to (B, H, T, D) (eq. 3.1)."""
        a, b = factors.transpose(1, 2).split((self.config.num_heads, self.config.head_dim), dim=-1)  # (B, T, R, H | D)
        return ((a.mT @ b) / factors.size(1)).transpose(1, 2)

    def by_factors(self, q: Tensor, k: Tensor, v: Tensor, position: Tensor | None = None) -> Tensor:
        """Attention of a few queries without keys and values multiplied out.

        q . sum_r a_r b_r = sum_r a_r (q . b_r), and likewise for the sum of values.

        Shapes: q (B, H, T, D), k and v (B, R, S, H + D), result (B, H, T, D).
        """
        sizes, shape = (self.config.num_heads, self.config.head_dim), q.shape[1:3]
        k_a, k_b = k.split(sizes, dim=-1)
        v_a, v_b = v.split(sizes, dim=-1)
        dots = (q.flatten(1, 2).unsqueeze(1) @ k_b.mT).unflatten(2, shape)  # (B, R, H, T, S)
        weights = causal_softmax((dots * k_a.mT.unsqueeze(3)).sum(1) * (self.scale / k.size(1)), position)
        weighted = (weights.unsqueeze(1) * v_a.mT.unsqueeze(3)).flatten(2, 3) @ v_b  # (B, R, H * T, D)
        return weighted.sum(1).unflatten(1, shape) / v.size(1)

    def factors_are_cheaper(self, queries: int) -> bool:
        """Whether `by_factors` needs fewer multiply-adds for so many new tokens, per cached one and head.

        Scores and outputs each cost queries * R * (D + 1) from the factors; from keys and values they cost queries * D,
        after R * D to multiply these out.
        """
        rank, dim = self.config.kv_rank, self.config.head_dim
        return queries * rank * (dim + 1) < rank * dim + queries * dim

    def output(self, out: Tensor) -> Tensor:
        """The heads' outputs, (B, H, T, D), projected into the residual stream (eq. 3.3)."""
        return self.dropout(self.out_proj(out.transpose(1, 2).flatten(2)))


KIND = AttentionKind(title="Tensor Product Attention", options=TPAOptions, layer_config=TPAConfig, layer=TPA)
