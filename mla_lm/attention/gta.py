"""Grouped-Tied Attention (Hardware-Efficient Attention for Fast Decoding, arXiv 2505.21487, section 3.3).

Keys and values of a group of query heads are one tied state. With x_t the input and h the head size:

    u_t = W^KV x_t                       one state per group, h wide                                    (1)
    r_t = RoPE(W^KR x_t)                 one rotated key for all groups, h / 2 wide                     (2)
    k_t = [first half of u_t ; r_t]      the half of the state that is used as key is not rotated       (3)
    v_t = u_t                                                                                           (4)

u and r are cached. The equations are numbered here.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mla_lm.attention.documents import Documents, document_attention
from mla_lm.attention.first_head import FirstHead, looking_back, unit
from mla_lm.attention.gqa import GroupOptions, MHAConfig
from mla_lm.attention.kind import DERIVED, AttentionKind
from mla_lm.attention.kv_cache import LayerCache, length, position
from mla_lm.attention.layer import AttentionLayer
from mla_lm.attention.linear import Linear
from mla_lm.attention.rope import RotaryEmbedding, rotate
from mla_lm.errors import UserError


@dataclass
class GTAConfig(MHAConfig):
    """Sizes of one GTA layer: those of GQA, whose `num_kv_heads` is the number of groups.

    Raises:
        UserError (a ValueError): the sizes are invalid or do not fit together.
    """

    rope_dim: int = field(init=False, default=DERIVED)  # of MHA's heads; here half of each is rotated

    def __post_init__(self):
        super().__post_init__()
        if self.head_dim % 4:
            raise UserError(
                f"a head of d_model / num_heads = {self.head_dim} must be divisible by 4: GTA rotates half of it"
            )

    @property
    def cached_elements(self) -> int:
        """Elements cached per token: the tied states and the rotated key."""
        return self.num_kv_heads * self.head_dim + self.rotated_dim

    @property
    def rotated_dim(self) -> int:
        return self.head_dim // 2


class GTA(AttentionLayer):
    """Causal self-attention that caches one state per group as its keys and its values."""

    def __init__(self, config: GTAConfig):
        super().__init__()
        self.config = c = config
        self.scale = c.head_dim**-0.5 * c.yarn.score_scale
        self.q_proj = Linear(c.d_model, c.d_model, bias=c.use_bias)
        self.kv_proj = Linear(c.d_model, c.num_kv_heads * c.head_dim, bias=c.use_bias)  # W^KV
        self.k_rope_proj = Linear(c.d_model, c.rotated_dim, bias=c.use_bias)  # W^KR
        self.out_proj = Linear(c.d_model, c.d_model, bias=c.use_bias)
        self.cache_shapes = [(c.num_kv_heads, (c.head_dim,)), (1, (c.rotated_dim,))]  # u and r
        self.rope = RotaryEmbedding(c.rotated_dim, c.seq_len, c.rope_base, c.yarn)
        self.dropout = nn.Dropout(c.dropout)

    def matched_dim(self) -> int:
        return self.config.rotated_dim

    def set_first_head(self, x: Tensor, head: FirstHead) -> None:
        """`AttentionLayer.set_first_head`: the state carries the key in its half for keys, the value in the other."""
        n, dim, half = len(head.value), self.config.head_dim, self.config.rotated_dim
        q_nope, q_rope = self.q_proj.weight[:dim].zero_().split(half)
        key, value = self.kv_proj.weight[:dim].split(half)
        if head.match is None:
            parts = (q_rope, self.k_rope_proj.weight)
            for part, vector in zip(parts, looking_back(self.rope, self.scale), strict=True):
                part.copy_(vector[:, None] * unit(head.constant, x))
        else:
            q_nope[:n], key[:n] = (head.strength(self.scale) * unit(rows, x) for rows in head.match)
        value[:n] = unit(head.value, x)
        self.out_proj.weight[:, :dim] = 0
        self.out_proj.weight[:, half : half + n] = head.out

    def forward(self, x: Tensor, cache: LayerCache | None = None, documents: Documents | None = None) -> Tensor:
        c, half = self.config, self.config.rotated_dim
        cos, sin = self.rotation(x.size(1), length(cache), documents)
        q_nope, q_rope = self.q_proj(x).unflatten(-1, (c.num_heads, c.head_dim)).split((half, half), dim=-1)
        q = torch.cat((q_nope, rotate(q_rope, cos, sin)), dim=-1).transpose(1, 2)  # (B, H, T, D)
        state = self.kv_proj(x).unflatten(-1, (c.num_kv_heads, c.head_dim)).transpose(1, 2)  # (B, H_kv, T, D)
        k_rope = rotate(self.k_rope_proj(x).unsqueeze(2), cos, sin).transpose(1, 2)  # (B, 1, T, D / 2)
        if cache is not None:
            state, k_rope = cache.append(state, k_rope, dtype=q.dtype)
        k = torch.cat((state[..., :half], k_rope.expand(-1, c.num_kv_heads, -1, -1)), dim=-1)  # eq. 3
        out = document_attention(q, k, state, self.scale, documents, position(cache))
        return self.dropout(self.out_proj(out.transpose(1, 2).flatten(2)))


KIND = AttentionKind(title="Grouped-Tied Attention", options=GroupOptions, layer_config=GTAConfig, layer=GTA)
