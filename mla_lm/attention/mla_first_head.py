"""How the first head of MLA is set: by way of its latents."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mla_lm.attention.first_head import FirstHead, looking_back, rms, unit
from mla_lm.attention.mla_config import MLAConfig

if TYPE_CHECKING:
    from mla_lm.attention.mla import MLA


def matched_dim(c: MLAConfig) -> int:
    """How many numbers the first head can match and write; position needs the rotated part of a head."""
    widths = (c.nope_dim, c.value_dim, c.kv_compressed_dim // 2, c.q_compressed_dim or c.nope_dim)
    return min(widths) if c.rope_dim else 0


def set_first_head(mla: "MLA", x: Tensor, head: FirstHead) -> None:
    """`AttentionLayer.set_first_head`: the latent carries the value and, behind it, the key."""
    c, n = mla.config, len(head.value)
    w_uk, w_uv = mla.kv_up.weight[: c.nope_dim + c.value_dim].zero_().split((c.nope_dim, c.value_dim))
    rows = head.value if head.key is None else torch.cat((head.value, head.key))
    down = mla.kv_down.weight[: c.kv_compressed_dim]
    down[: len(rows)] = rms(x @ down.mT) * unit(rows, x)
    latent = mla.scaled(mla.kv_norm(x @ down.mT), c.latent_dim)
    w_uv[:n, :n] = torch.eye(n) / rms(latent[..., :n])
    query = torch.zeros(mla.qk_dim, n)
    if head.key is None:
        query[c.nope_dim :, 0], key = looking_back(mla.rope, mla.scale)
        mla.kv_down.weight[c.kv_compressed_dim :] = key[:, None] * unit(head.query, x)
    else:
        strength = (head.score / mla.scale / n) ** 0.5
        w_uk[:n, n : 2 * n] = strength * torch.eye(n) / rms(latent[..., n : 2 * n])
        query[:n] = strength * torch.eye(n)
    _set_first_query(mla, x, query, head.query)
    mla.out_proj.weight[:, : c.value_dim] = 0
    mla.out_proj.weight[:, :n] = head.out


def _set_first_query(mla: "MLA", x: Tensor, query: Tensor, rows: Tensor) -> None:
    """Let the first head's query be `query`, (qk_dim, n), times what `rows` read of x, at a size of 1."""
    if mla.config.q_compressed_dim is None:
        mla.q_proj.weight[: mla.qk_dim] = query[:, : len(rows)] @ unit(rows, x)
    else:
        mla.q_down.weight[: len(rows)] = rms(mla.q_down(x)) * unit(rows, x)
        latent = mla.scaled(mla.q_norm(mla.q_down(x)), mla.config.q_compressed_dim)[..., : len(rows)]
        mla.q_up.weight[: mla.qk_dim] = 0
        mla.q_up.weight[: mla.qk_dim, : len(rows)] = query[:, : len(rows)] / rms(latent)
