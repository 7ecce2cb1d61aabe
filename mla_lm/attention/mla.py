"""Multi-head Latent Attention (DeepSeek-V2, arXiv 2405.04434, section 2.1 and appendix C)."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mla_lm.attention import cpu_kernel
from mla_lm.attention.documents import Documents, document_attention
from mla_lm.attention.kind import AttentionKind, TransformersForm, check_positive
from mla_lm.attention.kv_cache import LayerCache
from mla_lm.attention.linear import Linear
from mla_lm.attention.rope import RotaryEmbedding, YarnConfig, rotate
from mla_lm.attention.sdpa import causal_attention
from mla_lm.errors import UserError


@dataclass
class MLAOptions:
    """The keys of `model.attention` that MLA alone reads; see `MLAConfig`."""

    kv_compressed_dim: int | None = None
    q_compressed_dim: int | None = None
    rope_dim: int | None = None
    nope_dim: int | None = None
    value_dim: int | None = None
    latent_norm: bool = True
    rope_frequencies: list[float] | None = None


@dataclass
class MLAConfig:
    """Sizes of one MLA layer; the paper's symbols in brackets.

    `q_compressed_dim=None` projects queries straight from the input. `nope_dim` and `value_dim` default to
    `d_model // num_heads`. Where nope_dim + rope_dim == value_dim, fused attention needs no padding.

    Raises:
        UserError (a ValueError): sizes that cannot be.
    """

    d_model: int  # [d]
    num_heads: int  # [n_h]
    kv_compressed_dim: int  # [d_c]: the latent that is cached in place of keys and values
    q_compressed_dim: int | None  # [d_c']
    rope_dim: int  # [d_h^R]: the part of each head that carries position, its key shared by all heads
    seq_len: int  # longest sequence, in tokens
    dropout: float = 0.0  # of the layer's output; the weights of attention are never dropped
    use_bias: bool = False
    nope_dim: int | None = None  # [d_h]: the part of each query and key head without position
    value_dim: int | None = None  # [d_h]
    rope_base: float = 10000.0
    yarn: YarnConfig = field(default_factory=YarnConfig)
    latent_norm: bool = True  # False: of a model that was converted from MHA, which has no such norm
    rope_frequencies: list[float] | None = None  # of such a model: rope_dim / 2 angles per position

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
            raise UserError(
                f"rope_frequencies are {len(self.rope_frequencies)}: rope_dim={self.rope_dim} takes half of it"
            )
        if self.rope_frequencies is not None and self.yarn.factor != 1:
            raise UserError(f"yarn.factor={self.yarn.factor} does not go with rope_frequencies, which it cannot order")
        if self.nope_dim is None:
            self.nope_dim = self.d_model // self.num_heads
        if self.value_dim is None:
            self.value_dim = self.d_model // self.num_heads

    @property
    def cached_elements(self) -> int:
        """The latent and the shared rotated key of a token (section 2.1.4)."""
        return self.kv_compressed_dim + self.rope_dim

    @property
    def macs_per_key(self) -> int:
        return self.num_heads * (self.nope_dim + self.rope_dim + self.value_dim)

    @property
    def rotated_dim(self) -> int:
        return self.rope_dim


class LatentNorm(nn.RMSNorm):
    """RMSNorm in the precision of its weight: a bf16 latent beside an fp32 weight (autocast) is off the fused kernel.

    The paper puts it after both compressions (section 3.1.2).
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class MLA(nn.Module):
    """Causal self-attention whose cache is one latent per token.

    Keys and values are up-projections of the cached latent. Training and prefill compute them (the decompressed
    path). A short query over a long cache instead moves the up-projections to the query and the output (the absorbed
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
        self.rope = RotaryEmbedding(c.rope_dim, c.seq_len, c.rope_base, c.yarn, c.rope_frequencies)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, cache: LayerCache | None = None, documents: Documents | None = None) -> Tensor:
        """Attend causally over x, or over the cache and x, which is appended to it.

        Args:
            x: (B, T, d_model)
            cache: what `new_cache` made
            documents: without a cache, attend within each of these only

        Returns:
            (B, T, d_model)

        Raises:
            ValueError: more tokens than `seq_len`, or than the cache has room for.
        """
        c = self.config
        B, T, _ = x.shape
        cos, sin = self.rope(0 if cache is None else cache.length, T)
        if documents is not None:
            cos, sin = cos[documents.positions], sin[documents.positions]

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
            # The new latent is in fp32 under autocast, as its norm is; what is read is in what products are made of.
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
        # Plain products of one matrix for each head, as einsum would take twice the time to find out for one token.
        q = torch.bmm(q_nope.flatten(0, 1).transpose(0, 1), w_uk).unflatten(1, (B, T)).transpose(0, 1)
        q = torch.cat((q, q_rope.transpose(1, 2)), dim=-1)  # (B, H, T, kv_compressed_dim + rope_dim)
        key = entries.unsqueeze(1)  # (B, 1, S, kv_compressed_dim + rope_dim)
        latents = key[..., : c.kv_compressed_dim]  # the values
        # PyTorch's kernel is fused for values as wide as the key: the rope part goes along and is dropped afterwards.
        values = latents if cpu_kernel.takes(q, key, latents) else key
        out = causal_attention(q, key, values, self.scale)[..., : c.kv_compressed_dim]  # (B, H, T, kv_compressed_dim)
        out = torch.bmm(out.transpose(0, 1).flatten(1, 2), w_uv.mT)  # (H, B * T, value_dim)
        return out.transpose(0, 1).reshape(B, T, -1)

    def absorbing_is_cheaper(self, queries: int, keys: int) -> bool:
        """Which path needs fewer multiply-adds for `queries` new tokens over `keys` cached ones, per head.

        Decompressing costs keys * d_c * d for the up-projection, d = nope_dim + value_dim, and
        queries * keys * (d + rope_dim) for attention; absorbing queries * d_c * d for moving the up-projections to
        the queries, and queries * keys * (2 d_c + rope_dim) for attention.
        """
        r, d, rope = self.config.kv_compressed_dim, self.config.nope_dim + self.config.value_dim, self.config.rope_dim
        absorbed = queries * r * d + queries * keys * (2 * r + rope)
        return absorbed < keys * r * d + queries * keys * (d + rope)

    def new_cache(
        self,
        batch_size: int,
        max_len: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> LayerCache:
        """An empty cache for `max_len` tokens, or one that grows up to seq_len; see `LayerCache`.

        dtype and device are the weights' unless given; in int8 a token's latent has a scale, and its key another.
        """
        c, weight = self.config, self.kv_up.weight
        shape = (1, (c.kv_compressed_dim, c.rope_dim))
        dtype, device = dtype or weight.dtype, device or weight.device
        return LayerCache(batch_size, max_len or c.seq_len, [shape], dtype, device, grows=max_len is None)


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
            "num_key_value_heads": "num_heads",  # DeepseekV3 repeats the keys where it is any other number
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
