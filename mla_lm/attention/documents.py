"""Several documents in one window: where each one begins, and attention that stays within it."""

from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mla_lm.attention.sdpa import causal_attention

WIDEST_HEAD = 192  # up to this head size, FlashAttention has a backward pass on every GPU that runs it


@dataclass(frozen=True)
class Documents:
    """The documents in a batch of windows, with the windows laid end to end.

    A document begins with the end-of-text token of the one before it, as a prompt does in generation. Each window also
    begins a document.
    """

    starts: Tensor  # (N + 1,) int32: where each document begins, then where the last one ends
    positions: Tensor  # (B, T): position of each token in its document

    @classmethod
    def find(cls, tokens: Tensor, document_token: int, most: int | None = None) -> "Documents":
        """Find the documents in `tokens`, (B, T) ids; each `document_token` begins one.

        Args:
            most: at least as many as there are documents; those that do not exist are empty and come last. If None, the
                documents are counted, for which this waits for the device.
        """
        begins = tokens == document_token
        begins[:, 0] = True
        begins = begins.flatten()
        if most is None:
            most = int(begins.sum())
        number = begins.cumsum(0) - 1  # of the document that each token belongs to
        place = torch.arange(len(begins), device=tokens.device)
        starts = place.new_full((most + 1,), len(begins))
        # A token that begins no document writes into the last entry what that holds already.
        starts = starts.scatter(0, torch.where(begins, number, most), torch.where(begins, place, len(begins)))
        return cls(starts.int(), (place - starts[number]).view(tokens.shape))

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens in each document that is not empty. This waits for the device."""
        return [length for length in self.starts.diff().tolist() if length]


def document_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, documents: Documents | None, position: Tensor | None = None
) -> Tensor:
    """`causal_attention`; where documents are given, each attends to itself alone.

    Args:
        q: (B, H, T, D)
        k: (B, H_kv, T, D), H_kv a divisor of H
        v: (B, H_kv, T, D_v)
        scale: factor on the scores
        position: see `causal_attention`; not together with documents

    Returns:
        (B, H, T, D_v)
    """
    if documents is None:
        return causal_attention(q, k, v, scale, position)
    B, T = q.size(0), q.size(2)
    rows = [t.transpose(1, 2).flatten(0, 1) for t in (q, k, v)]  # (B * T, H | H_kv, D)
    if takes_all_at_once(q.device, q.dtype, max(q.size(3), v.size(3))):
        out = _all_at_once(*rows, scale=scale, starts=documents.starts, longest=T)
    else:  # no kernel here takes them all at once, and a mask would be slower than a call for each
        parts = zip(*(t.transpose(0, 1).unsqueeze(0).split(documents.lengths, dim=2) for t in rows), strict=True)
        out = torch.cat([causal_attention(*part, scale=scale) for part in parts], dim=2).squeeze(0).transpose(0, 1)
    return out.unflatten(0, (B, T)).transpose(1, 2)


@torch.compiler.assume_constant_result  # else these calls would break the compiled graph
def takes_all_at_once(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether one kernel takes documents of any lengths: FlashAttention's does, on Ampere GPUs and later.

    Args:
        head_dim: width of a head's queries and keys, or of its values, whichever is wider
    """
    if device.type != "cuda" or dtype == torch.float32 or head_dim > WIDEST_HEAD:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _all_at_once(q: Tensor, k: Tensor, v: Tensor, scale: float, starts: Tensor, longest: int) -> Tensor:
    """Causal attention within each document by FlashAttention's variable-length kernel.

    The kernel needs q, k and v to have one head size, a multiple of 8. They are padded with zeros, which change no
    score and no sum. Of an empty document it computes nothing, forward or backward: each of its blocks first asks
    whether the document reaches that far.

    Shapes: q (tokens, H, D), k (tokens, H_kv, D), v (tokens, H_kv, D_v), starts (N + 1,), result (tokens, H, D_v).
    """
    from torch.nn.attention.varlen import varlen_attn  # imported here because no other run needs it

    value_dim, group = v.size(2), q.size(1) // k.size(1)
    width = -(-max(q.size(2), value_dim) // 8) * 8
    q, k, v = (F.pad(t, (0, width - t.size(2))) for t in (q, k, v))
    k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))  # torch 2.11's kernel does not share key heads
    out = varlen_attn(q, k, v, starts, starts, longest, longest, scale=scale, window_size=(-1, 0))
    return cast(Tensor, out)[..., :value_dim]  # it returns a tuple only if asked for more than the output
