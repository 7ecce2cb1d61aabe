"""Several documents in one window: where each begins, and attention that stays within it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mla_lm.attention.fused import causal_attention


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
        v: (B, H_kv, T, D)
        scale: factor of the scores

    Returns:
        (B, H, T, D)
    """
    if documents is None:
        return causal_attention(q, k, v, scale)
    B, H, T, _ = q.shape
    rows = [t.transpose(1, 2).flatten(0, 1) for t in (q, k, v)]  # (B * T, H | H_kv, D)
    if q.is_cuda and q.dtype != torch.float32:
        from torch.nn.attention.varlen import varlen_attn  # which no other run should have to load

        rows = [t.repeat_interleave(H // t.size(1), dim=1) for t in rows]  # in torch 2.11 it shares no key heads
        starts = documents.starts
        out = varlen_attn(*rows, starts, starts, T, T, scale=scale, window_size=(-1, 0))
    else:  # there is no kernel for all of them at once, and a mask would be slower than one call for each
        parts = zip(*(t.transpose(0, 1).unsqueeze(0).split(documents.lengths, dim=2) for t in rows), strict=True)
        out = torch.cat([causal_attention(*part, scale) for part in parts], dim=2).squeeze(0).transpose(0, 1)
    return out.unflatten(0, (B, T)).transpose(1, 2)
