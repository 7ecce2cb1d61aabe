"""Multi-head Latent Attention (DeepSeek-V2, arXiv 2405.04434, section 2.1 and appendix C)."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mla_lm.attention import cpu_kernel
from mla_lm.attention.documents import Documents, document_attention
from mla_lm.attention.kind import DERIVED, AttentionKind, TransformersForm, check_positive
from mla_lm.attention.kv_cache import LayerCache
from mla_lm.attention.layer import AttentionLayer
from mla_lm.attention.linear import Linear
from mla_lm.attention.rope import RotaryEmbedding, YarnConfig, rotate
from mla_lm.attention.sdpa import causal_attention
from mla_lm.errors import UserError


@dataclass
class MLAOptions:
    """The keys of `model.attention` that only MLA reads; see `MLAConfig`."""

    kv_compressed_dim: int | None = None
    q_compressed_dim: int | None = None
    rope_dim: int | None = None
    nope_dim: int | None = None
    value_dim: int | None = None
    latent_norm: bool = True
    rope_frequencies: list[float] | None = None


@dataclass
class MLAConfig:
    """Sizes of one MLA layer, with the paper's symbols in brackets.

    `q_compressed_dim=None` projects queries straight from the input. `nope_dim` and `value_dim` default to
    `d_model // num_heads`. Where nope_dim + rope_dim == value_dim, fused attention needs no padding.

    Raises:
        UserError (a ValueError): the sizes are invalid or do not fit together.
    """

    d_model: int  # [d]
    num_heads: int  # [n_h]
    kv_compressed_dim: int  # [d_c]: width of the latent, which is cached instead of keys and values
    q_compressed_dim: int | None  # [d_c']
    rope_dim: int  # [d_h^R]: the part of each head that RoPE rotates; all heads share its key
    seq_len: int  # longest sequence, in tokens
    dropout: float = 0.0  # on the layer's output; attention weights are never dropped
    use_bias: bool = False
    nope_dim: int = DERIVED  # [d_h]: the part of each query and key head without position
    value_dim: int = DERIVED  # [d_h]
    rope_base: float = 10000.0
    yarn: YarnConfig = field(default_factory=YarnConfig)
    latent_norm: bool = True  # norm of the KV latent; False for a model converted from MHA, which has none
    rope_frequencies: list[float] | None = None  # for a converted model: (rope_dim / 2,) radians per position

    def __post_init__(self):
        for name in ("kv_compressed_dim", "rope_dim"):
            if getattr(self, name) is None:
                raise UserError(f"{name} is missing: MLA needs kv_compressed_dim and rope_dim")
        check_positive(self, "d_model", "num_heads", "kv_compressed_dim", "q_compressed_dim", "rope_dim", "seq_len")
        check_positive(self, "nope_dim", "value_dim", "rope_base")
        self.yarn.check()
        if self.d_model % self.num_heads:
            raise UserError(f"d_model={self.d_model} is not divisible by num_heads={self.num_heads}")
        if self.rope_dim % 2:
            raise UserError(f"rope_dim={self.rope_dim} must be even: rotation works on pairs")
        if self.rope_frequencies is not None and len(self.rope_frequencies) != self.rope_dim // 2:
            given = len(self.rope_frequencies)
            raise UserError(f"rope_frequencies has {given} entries, but rope_dim={self.rope_dim} needs half of it")
        if self.rope_frequencies is not None and self.yarn.factor != 1:
            raise UserError(f"yarn.factor={self.yarn.factor} cannot be combined with rope_frequencies")
        if self.nope_dim is None:
            self.nope_dim = self.d_model // self.num_heads
        if self.value_dim is None:
            self.value_dim = self.d_model // self.num_heads

    @property
    def cached_elements(self) -> int:
        """Elements cached per token: its latent and the shared rotated key (section 2.1.4)."""
        return self.kv_compressed_dim + self.rope_dim

    @property
    def macs_per_key(self) -> int:
        return self.num_heads * (self.nope_dim + self.rope_dim + self.value_dim)

    @property
    def rotated_dim(self) -> int:
        return self.rope_dim


class LatentNorm(nn.RMSNorm):
    """RMSNorm in the dtype of its weight. The paper puts it after both compressions (section 3.1.2).

    Under autocast, the latent is bf16 and the weight fp32; PyTorch's fused kernel does not take such a mixture.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class MLA(AttentionLayer):
    """Causal self-attention whose cache is one latent per token.

    Keys and values are up-projections of the cached latent. Training and prefill compute them (the decompressed
    path). For a few queries over a long cache, they are applied to the queries and the outputs instead (the absorbed
    path), so that attention runs on the latents themselves. Both give the same result.
    """

    def __init__(self, config: MLAConfig):
        super().__init__()
        self.config = c = config
        self.qk_dim = c.nope_dim + c.rope_dim
        self.scale = self.qk_dim**-0.5 * c.yarn.score_scale
        if c.q_compressed_dim is None:
            self.q_proj = Linear(c.d_model, c.num_heads * self.qk_dim, bias=c.use_bias)
        else:
            self.q_down = Linear(c.d_model, c.q_compressed_dim, bias=c.use_bias)  # W^DQ, eq. 12
            self.q_norm = LatentNorm(c.q_compressed_dim, eps=1e-6)
            self.q_up = Linear(c.q_compressed_dim, c.num_heads * self.qk_dim, bias=c.use_bias)  # W^UQ, W^QR
        self.kv_down = Linear(c.d_model, c.kv_compressed_dim + c.rope_dim, bias=c.use_bias)  # W^DKV, W^KR
        self.kv_norm = LatentNorm(c.kv_compressed_dim, eps=1e-6) if c.latent_norm else nn.Identity()
        # W^UK and W^UV never have a bias: in a key, it adds the same to all scores of a query, which softmax cancels;
        # in a value, it adds a constant to the output, which out_proj's bias already does.
        self.kv_up = Linear(c.kv_compressed_dim, c.num_heads * (c.nope_dim + c.value_dim), bias=False)
        self.out_proj = Linear(c.num_heads * c.value_dim, c.d_model, bias=c.use_bias)  # W^O, eq. 19
        self.cache_shapes = [(1, (c.kv_compressed_dim, c.rope_dim))]  # the latent and the shared key
        self.rope = RotaryEmbedding(c.rope_dim, c.seq_len, c.rope_base, c.yarn, c.rope_frequencies)
        self.dropout = nn.Dropout(c.dropout)

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
        c = self.config
        B, T, _ = x.shape
        cos, sin = self.rotation(T, cache, documents)

        q = self.q_proj(x) if c.q_compressed_dim is None else self.q_up(self.q_norm(self.q_down(x)))
        q_nope, q_rope = q.view(B, T, c.num_heads, self.qk_dim).split((c.nope_dim, c.rope_dim), dim=-1)
        q_rope = rotate(q_rope, cos, sin)
        latent, k_rope = self.kv_down(x).split((c.kv_compressed_dim, c.rope_dim), dim=-1)
        latent = self.kv_norm(latent)
        k_rope = rotate(k_rope.unsqueeze(2), cos, sin)  # (B, T, 1, rope_dim): shared by all heads

        if cache is None:
            out = self._decompressed(q_nope, q_rope, latent, k_rope, documents)
        else:
            entry = torch.cat((latent, k_rope.squeeze(2)), dim=-1)  # (B, T, kv_compressed_dim + rope_dim)
            # Under autocast the new latent is fp32, as its norm is. The cache is read in the dtype of matrix products.
            (entries,) = cache.append(entry.unsqueeze(1), dtype=q.dtype)
            entries = entries.squeeze(1)  # (B, S, kv_compressed_dim + rope_dim)
            if self.absorbing_is_cheaper(T, cache.length):
                out = self._absorbed(q_nope, q_rope, entries)
            else:
                latent, k_rope = entries.split((c.kv_compressed_dim, c.rope_dim), dim=-1)
                out = self._decompressed(q_nope, q_rope, latent, k_rope.unsqueeze(2))
        return self.dropout(self.out_proj(out))

    def _decompressed(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, documents: Documents | None = None
    ) -> Tensor:
        """Attention on keys and values computed from the latents (eqs. 9 to 19).

        Shapes: q_nope (B, T, H, nope_dim), q_rope (B, T, H, rope_dim), latent (B, S, kv_compressed_dim),
        k_rope (B, S, 1, rope_dim), result (B, T, H * value_dim).
        """
        c = self.config
        kv = self.kv_up(latent).unflatten(-1, (c.num_heads, c.nope_dim + c.value_dim))
        k_nope, v = kv.split((c.nope_dim, c.value_dim), dim=-1)
        q = torch.cat((q_nope, q_rope), dim=-1)
        k = torch.cat((k_nope, k_rope.to(k_nope.dtype).expand(-1, -1, c.num_heads, -1)), dim=-1)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out = document_attention(q, k, v, self.scale, documents)
        return out.transpose(1, 2).flatten(2)

    def _absorbed(self, q_nope: Tensor, q_rope: Tensor, entries: Tensor) -> Tensor:
        """Attention on the cached latents themselves, as multi-query attention with one wide key (appendix C).

        q_nope . (W^UK c) = (W^UK^T q_nope) . c, and sum_s p_s W^UV c_s = W^UV sum_s p_s c_s: no key and no value of
        a past token is ever computed.

        Shapes: q_nope (B, T, H, nope_dim), q_rope (B, T, H, rope_dim), entries (B, S, kv_compressed_dim + rope_dim),
        result (B, T, H * value_dim).
        """
        c = self.config
        B, T = q_nope.shape[:2]
        up = self.kv_up.weight.to(q_nope.dtype).unflatten(0, (c.num_heads, c.nope_dim + c.value_dim))
        w_uk, w_uv = up.split((c.nope_dim, c.value_dim), dim=1)  # (H, nope_dim | value_dim, kv_compressed_dim)
        # One plain matrix product per head: for one token, einsum takes twice as long to arrive at the same product.
        q = torch.bmm(q_nope.flatten(0, 1).transpose(0, 1), w_uk).unflatten(1, (B, T)).transpose(0, 1)
        q = torch.cat((q, q_rope.transpose(1, 2)), dim=-1)  # (B, H, T, kv_compressed_dim + rope_dim)
        key = entries.unsqueeze(1)  # (B, 1, S, kv_compressed_dim + rope_dim)
        latents = key[..., : c.kv_compressed_dim]  # the values
        # PyTorch's fused kernel needs values as wide as the key, so the RoPE part goes along and is dropped afterwards.
        values = latents if cpu_kernel.takes(q, key, latents) else key
        out = causal_attention(q, key, values, self.scale)[..., : c.kv_compressed_dim]  # (B, H, T, kv_compressed_dim)
        out = torch.bmm(out.transpose(0, 1).flatten(1, 2), w_uv.mT)  # (H, B * T, value_dim)
        return out.transpose(0, 1).reshape(B, T, c.num_heads * c.value_dim)

    def absorbing_is_cheaper(self, queries: int, keys: int) -> bool:
        """Whether the absorbed path needs fewer multiply-adds for `queries` new tokens over `keys` cached ones.

        Per head, with d = nope_dim + value_dim, the decompressed path costs keys * d_c * d for the up-projections and
        queries * keys * (d + rope_dim) for attention. The absorbed path costs queries * d_c * d to apply the
        up-projections to queries and outputs, and queries * keys * (2 d_c + rope_dim) for attention.
        """
        r, d, rope = self.config.kv_compressed_dim, self.config.nope_dim + self.config.value_dim, self.config.rope_dim
        absorbed = queries * r * d + queries * keys * (2 * r + rope)
        return absorbed < keys * r * d + queries * keys * (d + rope)


KIND = AttentionKind(
    title="Multi-head Latent Attention",
    options=MLAOptions,
    layer_config=MLAConfig,
    layer=MLA,
    transformers=TransformersForm(
        architecture="DeepseekV3ForCausalLM",
        projections={
            "q_proj": "q_proj",
            "q_down": "q_a_proj",
            "q_norm": "q_a_layernorm",
            "q_up": "q_b_proj",
            "kv_down": "kv_a_proj_with_mqa",
            "kv_norm": "kv_a_layernorm",
            "kv_up": "kv_b_proj",
            "out_proj": "o_proj",
        },
        entries={
            "num_key_value_heads": "num_heads",  # with any other number, DeepseekV3 repeats the keys
            "kv_lora_rank": "kv_compressed_dim",
            "q_lora_rank": "q_compressed_dim",
            "qk_nope_head_dim": "nope_dim",
            "qk_rope_head_dim": "rope_dim",
            "v_head_dim": "value_dim",
        },
        rotated={
            "q_proj": ("num_heads", "nope_dim"),
            "q_up": ("num_heads", "nope_dim"),
            "kv_down": (None, "kv_compressed_dim"),
        },
    ),
)
