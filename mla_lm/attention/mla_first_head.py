"""How the first head of MLA, and of the kinds made from it, is set: by way of its latents."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mla_lm.attention.first_head import FirstHead, looking_back, rms, unit
from mla_lm.attention.mla_config import MLAConfig

if TYPE_CHECKING:
    from mla_lm.attention.mla import MLA


def matched_dim(c: MLAConfig, latents: int) -> int:
    """How many numbers the first head can match and write; position needs the rotated part of a head.

    Args:
        latents: number of those that the first head reads; each has room for the key and its share of the value
    """
    widths = (c.nope_dim, c.value_dim, latents * c.latent_dim // (latents + 1), c.q_compressed_dim or c.nope_dim)
    return min(widths) if c.rope_dim else 0


def set_first_head(mla: "MLA", x: Tensor, head: FirstHead) -> None:
    """`AttentionLayer.set_first_head`: each latent carries its share of the value and, behind it, the key."""
    c, n, ups = mla.config, len(head.value), mla.first_ups()
    values = head.value.tensor_split(len(ups))
    down = mla.kv_down.weight[: c.kv_compressed_dim]
    for part, value in zip(down.split(c.latent_dim), values, strict=False):
        rows = value if head.match is None else torch.cat((value, head.match[1]))
        part[: len(rows)] = rms(x @ part.mT) * unit(rows, x)
    latents = mla.scaled(mla.kv_norm(x @ down.mT), c.latent_dim).split(c.latent_dim, dim=-1)
    first = 0  # number of the value
    for up, latent, value in zip(ups, latents, values, strict=False):
        w_uk, w_uv = up.zero_().split((c.nope_dim, c.value_dim))
        m = len(value)
        # Each branch of MLRA writes its share; their sum is divided by this root.
        w_uv[first : first + m, :m] = len(ups) ** 0.5 * torch.eye(m) / rms(latent[..., :m])
        if head.match is not None:
            w_uk[:n, m : m + n] = head.strength(mla.scale) * torch.eye(n) / rms(latent[..., m : m + n])
        first += m
    _set_first_query(mla, x, head)
    mla.out_proj.weight[:, : c.value_dim] = 0
    mla.out_proj.weight[:, :n] = head.out


def _set_first_query(mla: "MLA", x: Tensor, head: FirstHead) -> None:
    """Set the first head's queries, and the rotated key if it attends by position."""
    c, n = mla.config, len(head.value)
    if head.match is None:
        rows, query = head.constant, torch.zeros(mla.qk_dim, 1)
        query[c.nope_dim :, 0], key = looking_back(mla.rope, mla.scale)
        mla.kv_down.weight[c.kv_compressed_dim :] = key[:, None] * unit(rows, x)
    else:
        rows, query = head.match[0], head.strength(mla.scale) * torch.eye(mla.qk_dim, n)
    if c.q_compressed_dim is None:
        mla.q_proj.weight[: mla.qk_dim] = query @ unit(rows, x)
    else:
        mla.q_down.weight[: len(rows)] = rms(mla.q_down(x)) * unit(rows, x)
        latent = mla.scaled(mla.q_norm(mla.q_down(x)), c.q_compressed_dim)[..., : len(rows)]
        mla.q_up.weight[: mla.qk_dim] = 0
        mla.q_up.weight[: mla.qk_dim, : len(rows)] = query / rms(latent)
