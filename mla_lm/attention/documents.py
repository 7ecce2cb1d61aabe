"""Several documents in one window: where each begins, and attention that stays within it."""

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mla_lm.attention.sdpa import causal_attention

WIDEST_HEAD = 192  # of FlashAttention with a backward pass on every GPU that has it


@dataclass(frozen=True)
class Documents:
    """The documents in a batch of windows, which are taken as laid end to end.

    A document begins with the token that ends the one before it, as a prompt does in generation, and with each window.
    """

    starts: Tensor  # (N + 1,) int32: where each begins; after them, where the last one ends
    lengths: list[int]  # N
    positions: Tensor  # (B, T): of each token in its document

    @classmethod
    def find(cls, tokens: Tensor, document_token: int) -> "Documents":
        """Those in `tokens`, (B, T) ids, where `document_token` begins one."""
        begins = tokens == document_token
        begins[:, 0] = True
        begins = begins.flatten()
        first = begins.nonzero().squeeze(1)  # (N,)
        place = torch.arange(len(begins), device=tokens.device)
        positions = place - first[begins.cumsum(0) - 1]
        starts = torch.cat((first, first.new_tensor([len(begins)])))
        return cls(starts.int(), starts.diff().tolist(), positions.view(tokens.shape))


def document_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, documents: Documents | None) -> Tensor:
    """`causal_attention`, of every document by itself where there are any.

    Args:
        q: (B, H, T, D)
        k: (B, H_kv, T, D), H_kv a divisor of H
        v: (B, H_kv, T, D_v)
        scale: factor of the scores

    Returns:
        (B, H, T, D_v)
    """
    if documents is None:
        return causal_attention(q, k, v, scale)
    B, T = q.size(0), q.size(2)
    rows = [t.transpose(1, 2).flatten(0, 1) for t in (q, k, v)]  # (B * T, H | H_kv, D)
    if takes_all_at_once(q.device, q.dtype, max(q.size(3), v.size(3))):
        out = _all_at_once(*rows, scale=scale, starts=documents.starts, longest=T)
    else:  # there is no kernel for all of them at once, and a mask would be slower than one call for each
        parts = zip(*(t.transpose(0, 1).unsqueeze(0).split(documents.lengths, dim=2) for t in rows), strict=True)
        out = torch.cat([causal_attention(*part, scale=scale) for part in parts], dim=2).squeeze(0).transpose(0, 1)
    return out.unflatten(0, (B, T)).transpose(1, 2)


def takes_all_at_once(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether there is a kernel for documents of any lengths: FlashAttention's, on GPUs of Ampere and after it."""
    if device.type != "cuda" or dtype == torch.float32 or head_dim > WIDEST_HEAD:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _all_at_once(q: Tensor, k: Tensor, v: Tensor, scale: float, starts: Tensor, longest: int) -> Tensor:
    """Causal attention within each document by that kernel.

    It takes q, k and v of one head size, a multiple of 8: zeros fill them up, which change no score and no sum.

    Shapes: q (tokens, H, D), k (tokens, H_kv, D), v (tokens, H_kv, D_v), starts (N + 1,), result (tokens, H, D_v).
    """
    from torch.nn.attention.varlen import varlen_attn  # which no other run should have to load

    value_dim, group = v.size(2), q.size(1) // k.size(1)
    width = -(-max(q.size(2), value_dim) // 8) * 8
    q, k, v = (F.pad(t, (0, width - t.size(2))) for t in (q, k, v))
    k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))  # in torch 2.11 it shares no key heads
    out = varlen_attn(q, k, v, starts, starts, longest, longest, scale=scale, window_size=(-1, 0))
    return cast(Tensor, out)[..., :value_dim]  # a tuple only where more than the output is asked for
