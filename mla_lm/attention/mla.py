"""Multi-head Latent Attention (DeepSeek-V2, arXiv 2405.04434, section 2.1 and appendix C)."""

from typing import Any

import torch
from torch import Tensor, nn

from mla_lm.attention import mla_first_head
from mla_lm.attention.documents import Documents, document_attention
from mla_lm.attention.first_head import FirstHead
from mla_lm.attention.kind import AttentionKind, TransformersForm
from mla_lm.attention.kv_cache import LayerCache, length
from mla_lm.attention.layer import AttentionLayer
from mla_lm.attention.linear import Linear
from mla_lm.attention.mla_config import MLAConfig, MLAOptions
from mla_lm.attention.rope import RotaryEmbedding, rotate
from mla_lm.attention.sdpa import causal_attention, quantized_attention, reads_int8, takes_narrow_values


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
        self.kv_up: Any = Linear(c.kv_compressed_dim, c.num_heads * (c.nope_dim + c.value_dim), bias=False)
        self.out_proj = Linear(c.num_heads * c.value_dim, c.d_model, bias=c.use_bias)  # W^O, eq. 19
        self.cache_shapes = [(1, (c.kv_compressed_dim, c.rope_dim)[: 1 + (c.rope_dim > 0)])]  # latent and shared key
        self.rope = RotaryEmbedding(c.rope_dim, c.seq_len, c.rope_base, c.yarn, c.rope_frequencies)
        self.dropout = nn.Dropout(c.dropout)

    def init_weights(self) -> None:
        """With `init=fan_in`, draw the up-projections such that their outputs have their inputs' variance."""
        if self.config.init == "fan_in":
            ups = [self.kv_up] if self.config.q_compressed_dim is None else [self.kv_up, self.q_up]
            for linear in (module for up in ups for module in up.modules() if isinstance(module, Linear)):
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5)

    def matched_dim(self) -> int:
        return mla_first_head.matched_dim(self.config, len(self.first_ups()))

    def set_first_head(self, x: Tensor, head: FirstHead) -> None:
        mla_first_head.set_first_head(self, x, head)

    def first_ups(self) -> list[Tensor]:
        """W^UK and W^UV of the first head, (nope_dim + value_dim, latent_dim), for each latent that it reads."""
        return [self.kv_up.weight[: self.config.nope_dim + self.config.value_dim]]

    def forward(self, x: Tensor, cache: LayerCache | None = None, documents: Documents | None = None) -> Tensor:
        cos, sin = self.rotation(x.size(1), length(cache), documents)
        q_nope, q_rope = self.queries(x, cos, sin)
        latent, k_rope = self.latents(x, cos, sin)
        if cache is None:
            out = self.decompressed(q_nope, q_rope, latent, k_rope, documents)
        else:
            # (B, 1, T, kv_compressed_dim + rope_dim)
            entry = torch.cat((latent, k_rope.squeeze(2)), dim=-1).unsqueeze(1)
            if reads_int8(q_nope.transpose(1, 2), cache):
                out = self.absorbed_int8(q_nope, q_rope, *cache.store(entry), position=cache.position)
            else:
                # Under autocast the new latent is fp32, as its norm is. The cache is read in the dtype of products.
                (entries,) = cache.append(entry, dtype=q_nope.dtype)
                out = self.over_entries(q_nope, q_rope, entries.squeeze(1), cache.position)
        return self.output(out)

    def queries(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """The queries of x: (B, T, H, nope_dim), and (B, T, H, rope_dim), rotated (eq. 14)."""
        q_nope, q_rope = self.plain_queries(x).split((self.config.nope_dim, self.config.rope_dim), dim=-1)
        return q_nope, rotate(q_rope, cos, sin)

    def plain_queries(self, x: Tensor) -> Tensor:
        """The queries before rotation, (B, T, H, nope_dim + rope_dim) (eqs. 12 and 13)."""
        c = self.config
        if c.q_compressed_dim is None:
            q = self.q_proj(x)
        else:
            q = self.q_up(self.scaled(self.q_norm(self.q_down(x)), c.q_compressed_dim))
        return q.unflatten(-1, (c.num_heads, self.qk_dim))

    def latents(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """The latents (eq. 9) and the rotated key that all heads share (eq. 15).

        Returns:
            (B, T, kv_compressed_dim) and (B, T, 1, rope_dim)
        """
        c = self.config
        latent, k_rope = self.kv_down(x).split((c.kv_compressed_dim, c.rope_dim), dim=-1)
        return self.scaled(self.kv_norm(latent), c.latent_dim), rotate(k_rope.unsqueeze(2), cos, sin)

    def scaled(self, latent: Tensor, width: int) -> Tensor:
        return latent * (self.config.d_model / width) ** 0.5 if self.config.latent_scale else latent

    def over_entries(self, q_nope: Tensor, q_rope: Tensor, entries: Tensor, position: Tensor | None = None) -> Tensor:
        """Attention over cached entries, (B, S, kv_compressed_dim + rope_dim), by the cheaper path.

        Here and in what it calls, `position` is that of `causal_attention`.
        """
        if self.absorbing_is_cheaper(q_nope.size(1), entries.size(1)):
            return self.absorbed(q_nope, q_rope, entries, position)
        return self.decompressed(q_nope, q_rope, *self.split(entries), position=position)

    def split(self, entries: Tensor) -> tuple[Tensor, Tensor]:
        """Entries as latents (B, S, kv_compressed_dim) and shared keys (B, S, 1, rope_dim)."""
        latent, k_rope = entries.split((self.config.kv_compressed_dim, self.config.rope_dim), dim=-1)
        return latent, k_rope.unsqueeze(2)

    def decompressed(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        latent: Tensor,
        k_rope: Tensor,
        documents: Documents | None = None,
        position: Tensor | None = None,
    ) -> Tensor:
        """Attention on keys and values computed from the latents (eqs. 10, 11 and 16 to 18).

        Shapes: q_nope (B, T, H, nope_dim), q_rope (B, T, H, rope_dim), latent (B, S, kv_compressed_dim),
        k_rope (B, S, 1, rope_dim), result (B, T, H, value_dim).
        """
        k_nope, v = self.up(latent)
        q = torch.cat((q_nope, q_rope), dim=-1)
        k = torch.cat((k_nope, k_rope.to(k_nope.dtype).expand(-1, -1, v.size(2), -1)), dim=-1)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return document_attention(q, k, v, self.scale, documents, position).transpose(1, 2)

    def up(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Keys without position and values: (B, S, H, nope_dim) and (B, S, H, value_dim) (eqs. 10 and 11)."""
        c = self.config
        kv = self.kv_up(latent).unflatten(-1, (-1, c.nope_dim + c.value_dim))
        k_nope, v = kv.split((c.nope_dim, c.value_dim), dim=-1)
        return k_nope, v

    def absorbed(self, q_nope: Tensor, q_rope: Tensor, entries: Tensor, position: Tensor | None = None) -> Tensor:
        """Attention on the cached latents themselves, as multi-query attention with one wide key (appendix C).

        q_nope . (W^UK c) = (W^UK^T q_nope) . c, and sum_s p_s W^UV c_s = W^UV sum_s p_s c_s: no key and no value of
        a past token is ever computed.

        Shapes: q_nope (B, T, H, nope_dim), q_rope (B, T, H, rope_dim), entries (B, S, kv_compressed_dim + rope_dim),
        result (B, T, H, value_dim).
        """
        q, w_uv = self.absorbed_queries(q_nope, q_rope)
        key = entries.unsqueeze(1)  # (B, 1, S, kv_compressed_dim + rope_dim)
        latents = key[..., : self.config.kv_compressed_dim]  # the values
        # PyTorch's fused kernel needs values as wide as the key, so the RoPE part goes along and is dropped afterwards.
        values = latents if takes_narrow_values(q, key, latents) else key
        out = causal_attention(q, key, values, self.scale, position)  # (B, H, T, kv_compressed_dim, or more)
        return out_of_latents(out[..., : latents.size(-1)], w_uv)

    def absorbed_int8(
        self, q_nope: Tensor, q_rope: Tensor, entries: Tensor, scales: Tensor, position: Tensor | None = None
    ) -> Tensor:
        """`absorbed` for one query over an int8 cache as it is stored, see `quantize`.

        Shapes: as in `absorbed`, with entries (B, 1, S, kv_compressed_dim + rope_dim) and scales (B, 1, S, parts).
        """
        q, w_uv = self.absorbed_queries(q_nope, q_rope)
        latents = entries[..., : self.config.kv_compressed_dim]
        out = quantized_attention(q, entries, latents, scales, scales[..., :1], self.scale, position)
        return out_of_latents(out, w_uv)

    def absorbed_queries(self, q_nope: Tensor, q_rope: Tensor) -> tuple[Tensor, Tensor]:
        """The queries of cached latents and keys, (B, H, T, kv_compressed_dim + rope_dim), and the heads' W^UV."""
        w_uk, w_uv = self.up_weights(q_nope)
        return torch.cat((into_latents(q_nope, w_uk), q_rope.transpose(1, 2)), dim=-1), w_uv

    def up_weights(self, q_nope: Tensor) -> tuple[Tensor, Tensor]:
        """W^UK and W^UV of each of the heads, (H, nope_dim | value_dim, kv_compressed_dim), in the queries' dtype."""
        up = self.kv_up.weight.to(q_nope.dtype).unflatten(0, (q_nope.size(2), -1))
        w_uk, w_uv = up.split((self.config.nope_dim, self.config.value_dim), dim=1)
        return w_uk, w_uv

    def output(self, out: Tensor) -> Tensor:
        """The heads' outputs, (B, T, H, value_dim), projected into the residual stream (eq. 19)."""
        return self.dropout(self.out_proj(out.flatten(2)))

    def absorbing_is_cheaper(self, queries: int, keys: int) -> bool:
        """Whether the absorbed path needs fewer multiply-adds for `queries` new tokens over `keys` cached ones.

        Per head, with d = nope_dim + value_dim, the decompressed path costs keys * latent_dim * d for the
        up-projections and queries * keys * (d + rope_dim) for attention. The absorbed path costs queries * d_c * d to
        apply the up-projections to queries and outputs, and queries * keys * (2 d_c + rope_dim) for attention.
        """
        r, d, rope = self.config.kv_compressed_dim, self.config.nope_dim + self.config.value_dim, self.config.rope_dim
        absorbed = queries * r * d + queries * keys * (2 * r + rope)
        return absorbed < keys * self.config.latent_dim * d + queries * keys * (d + rope)


def into_latents(q: Tensor, w_uk: Tensor) -> Tensor:
    """W^UK^T q for each head: (B, T, H, nope_dim) and (H, nope_dim, d_c) to (B, H, T, d_c).

    It is one plain matrix product per head: for one token, einsum takes twice as long to arrive at the same product.
    """
    return torch.bmm(q.flatten(0, 1).transpose(0, 1), w_uk).unflatten(1, q.shape[:2]).transpose(0, 1)


def out_of_latents(out: Tensor, w_uv: Tensor) -> Tensor:
    """W^UV times each head's sum of latents: (B, H, T, d_c) and (H, value_dim, d_c) to (B, T, H, value_dim)."""
    batch_and_tokens = (out.size(0), out.size(2))
    out = torch.bmm(out.transpose(0, 1).flatten(1, 2), w_uv.mT)  # (H, B * T, value_dim)
    return out.transpose(0, 1).unflatten(0, batch_and_tokens)


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
