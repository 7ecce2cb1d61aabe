"""Causal attention through PyTorch's fused kernels, whatever the head sizes."""

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale * q k^T) v, where the T queries are the last T of the S positions, each seeing those up to it.

    The fused kernels want q, k and v of one head size; on any other they give way to one that stores the T x S
    scores of every head. So the narrower side is filled with zeros, which changes no score and no sum.

    Args:
        q: (B, H, T, D)
        k: (B, H_kv, S, D), H_kv a divisor of H: consecutive query heads share a key head
        v: (B, H_kv, S, D_v)
        scale: factor of the scores

    Returns:
        (B, H, T, D_v)
    """
    dim, value_dim = q.size(-1), v.size(-1)
    if value_dim < dim:
        v = F.pad(v, (0, dim - value_dim))
    elif value_dim > dim:
        q, k = F.pad(q, (0, value_dim - dim)), F.pad(k, (0, value_dim - dim))
    if q.size(2) < k.size(2):
        out = _attend_to_past(q, k, v, scale)
    else:
        if q.is_cuda and q.dtype == torch.float32:  # only FlashAttention shares key heads, and it has no fp32
            k, v = (t.repeat_interleave(q.size(1) // t.size(1), dim=1) for t in (k, v))
        shared = k.size(1) < q.size(1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=shared)
    return out[..., :value_dim]


def _attend_to_past(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The case T < S. The query heads that share a key head become rows of one matrix: (B, H_kv, H / H_kv * T, D).

    So a step of decoding is one product for each key head, and no kernel need know both a mask and shared heads,
    which on CUDA none does.
    """
    kv_heads, queries, keys = k.size(1), q.size(2), k.size(2)
    mask = None  # a single query sees every key
    if queries > 1:  # is_causal would align the first query, not the last, with the first key
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
        mask = mask.repeat(q.size(1) // kv_heads, 1)
    rows = q.reshape(q.size(0), kv_heads, -1, q.size(3))
    return F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scale).view(q.shape)
