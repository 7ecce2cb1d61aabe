"""PyTorch's attention over documents of any lengths, which only a GPU has, as plain matrix products for a CPU.

Importing this gives PyTorch's operation and its backward pass kernels for CPUs, which ask of their inputs what those of
a GPU do.
"""

import torch
from torch import Tensor
from torch.nn.attention import varlen


def _weights(q: Tensor, k: Tensor, starts: Tensor, scale: float) -> Tensor:
    place = torch.arange(len(q))
    document = torch.bucketize(place, starts, right=True)
    hidden = (document[:, None] != document) | (place[:, None] < place)
    return (torch.einsum("qhd,khd->hqk", q, k) * scale).masked_fill(hidden, float("-inf")).softmax(-1)


@varlen._varlen_attn.register_kernel("cpu")
def _(q, k, v, starts, key_starts, longest, longest_keys, causal, scale, *_):
    assert q.shape == k.shape == v.shape
    assert q.size(2) % 8 == 0
    assert q.size(2) <= 256
    assert q.dtype == k.dtype == v.dtype
    assert all(t.stride(-1) == 1 for t in (q, k, v))
    assert starts.dtype == torch.int32
    assert torch.equal(starts, key_starts)
    assert starts[0] == 0
    assert starts[-1] == len(q)
    assert longest == longest_keys >= starts.diff().max()
    assert starts.diff().min() >= 0
    assert causal
    out = torch.einsum("hqk,khd->qhd", _weights(q, k, starts, scale), v)
    return out.contiguous(), q.new_empty(q.size(1), q.size(0), dtype=torch.float32), torch.zeros(2, dtype=torch.uint64)


@varlen._varlen_attn_backward.register_kernel("cpu")
def _(grad, q, k, v, out, lse, starts, key_starts, longest, longest_keys, causal, rng_state, scale, *_):
    weights, by_weight = _weights(q, k, starts, scale), torch.einsum("qhd,khd->hqk", grad, v)
    by_score = scale * weights * (by_weight - (by_weight * weights).sum(-1, keepdim=True))
    grads = (
        torch.einsum("hqk,khd->qhd", by_score, k),
        torch.einsum("hqk,qhd->khd", by_score, q),
        torch.einsum("hqk,qhd->khd", weights, grad),
    )
    return tuple(t.contiguous() for t in grads)
