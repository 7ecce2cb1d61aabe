"""Causal attention by PyTorch's fused kernels for any head sizes, or by our own in decoding."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from mla_lm.attention import cpu_kernel, gpu_kernel
from mla_lm.attention.kv_cache import LayerCache

KERNELS = (cpu_kernel, gpu_kernel)  # our own: one query over a cache
QUERIES = 256  # in a block of plain attention: fewer skip more of what the mask hides, more make fewer, larger products
MOST_PLAIN_KEYS = 1024  # in bf16 on a CPU, products and a softmax are faster than the fused kernel up to this
LEAST_KEYS = 2048  # splitting fewer keys between two threads costs more than it gains


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, position: Tensor | None = None) -> Tensor:
    """softmax(scale * q k^T) v, where the T queries are the last T of the S positions.

    Each query sees the positions up to its own. PyTorch's fused kernels need one head size for q, k and v. For other
    sizes it falls back to a kernel that stores the T x S scores of every head. So the narrower side is padded with
    zeros, which changes no score and no sum.

    Args:
        q: (B, H, T, D)
        k: (B, H_kv, S, D), H_kv a divisor of H: consecutive query heads share a key head
        v: (B, H_kv, S, D_v)
        scale: factor on the scores
        position: that of a single query, (1,) int64, if it is not the last of the S positions: the query sees the keys
            up to it, and the values beyond are finite. It is read on the device, so that a call is the same at every
            length

    Returns:
        (B, H, T, D_v)
    """
    if position is not None:
        attend = gpu_kernel.attend_to_all if gpu_kernel.serves(q, k, v) else _by_products
        return _one_query(attend, q, k, v, scale, position=position)
    queries, keys = q.size(2), k.size(2)
    if q.numel() == 0:  # for which the kernels divide by zero, and that of the CPU ends the process
        return q.new_empty(*q.shape[:3], v.size(3))
    if queries == keys and stored_scores(q.device.type, q.dtype, keys):
        return _plain(q, k, v, scale)
    for kernel in KERNELS:
        if kernel.takes(q, k, v):
            return _one_query(kernel.attend_to_all, q, k, v, scale)
    if _shared_on_gpu(q, k):
        return _one_query(_by_products, q, k, v, scale)
    dim, value_dim = q.size(-1), v.size(-1)
    if value_dim < dim:
        v = F.pad(v, (0, dim - value_dim))
    elif value_dim > dim:
        q, k = F.pad(q, (0, value_dim - dim)), F.pad(k, (0, value_dim - dim))
    if queries < keys and q.device.type == "cpu" and not (torch.is_grad_enabled() and q.requires_grad):
        return _attend_to_past(q, k, v, scale)[..., :value_dim]
    if queries == 1:  # it sees every key, so it needs no mask
        return _without_cudnn(_rows(q, k), k, v, scale).reshape(q.shape)[..., :value_dim]
    if q.is_cuda and q.dtype == torch.float32:  # only FlashAttention supports shared key heads, and it has no fp32
        k, v = (t.repeat_interleave(q.size(1) // t.size(1), dim=1) for t in (k, v))
    # On CUDA neither mask is stored as a tensor. For T < S, is_causal would align the first query with the first key;
    # causal_lower_right aligns the last query with the last key.
    mask = causal_lower_right(queries, keys) if queries < keys else None
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=k.size(1) < q.size(1)
    )
    return out[..., :value_dim]


def takes_narrow_values(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `causal_attention` reads values narrower than the keys as they are, and does not pad them first."""
    return cpu_kernel.takes(q, k, v) or _shared_on_gpu(q, k)


def _shared_on_gpu(q: Tensor, k: Tensor) -> bool:
    """Whether this is one query on a GPU over keys that several heads share, of which no fused kernel makes use."""
    return q.size(2) == 1 and q.is_cuda and q.size(1) > k.size(1)


def _one_query(attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, scale: float, **options: Any) -> Tensor:
    """`causal_attention` of one query by `attend`, which takes scaled rows, as `gpu_kernel.attend_to_all` does."""
    return attend(_rows(q, k) * scale, k, v, **options).to(q.dtype).reshape(*q.shape[:3], -1)


def _by_products(q: Tensor, k: Tensor, v: Tensor, position: Tensor | None = None) -> Tensor:
    """Attention of one query, whose few scores are stored; q is (B, H_kv, rows, D), already scaled."""
    return _seen(q @ k.mT, position).softmax(-1) @ v  # softmax sums in fp32 internally


def _seen(scores: Tensor, position: Tensor | None) -> Tensor:
    """Hide the keys beyond `position`, (1,), in scores (..., S)."""
    if position is None:
        return scores
    return scores.masked_fill(torch.arange(scores.size(-1), device=scores.device) > position, float("-inf"))


def reads_int8(q: Tensor, cache: LayerCache) -> bool:
    """Whether the cache is int8 that `quantized_attention` reads as stored for the queries (B, H, T, D).

    Its first tensor must be the keys. The values are the last one, or where it is the same, the first part of each key.
    """
    widths = sum(cache.parts[0]), cache.parts[-1][0]
    return cache.quantized and _int8_kernel(q, *widths, cache.position) is not None


def _int8_kernel(q: Tensor, width: int, value_width: int, position: Tensor | None) -> ModuleType | None:
    """Our kernel that serves the queries over an int8 cache with keys and values of these widths.

    At a fixed position that is a GPU's alone, as it takes the number of keys from the device.
    """
    for kernel in KERNELS if position is None else (gpu_kernel,):
        if kernel.takes_int8(q, width, value_width):
            return kernel
    return None


def quantized_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_scales: Tensor,
    v_scales: Tensor,
    scale: float,
    position: Tensor | None = None,
) -> Tensor:
    """`causal_attention` of one query over an int8 cache, where `reads_int8` says that a kernel can.

    The scales are those of `quantize`, with shapes as in `gpu_kernel.attend_to_all`.
    """
    kernel = _int8_kernel(q, k.size(3), v.size(3), position)
    assert kernel is not None  # as `reads_int8` said
    options = {"k_scales": k_scales, "v_scales": v_scales} | ({} if position is None else {"position": position})
    return _one_query(kernel.attend_to_all, q, k, v, scale, **options)


def _without_cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention without a mask, by any kernel but cuDNN's, which makes a new plan for each length of the cache."""
    if torch.compiler.is_compiling():  # it supports this context, which eagerly takes 15 times as long as the flag
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            return F.scaled_dot_product_attention(q, k, v, scale=scale)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def stored_scores(device: str, dtype: torch.dtype, tokens: int) -> int:
    """How many scores `causal_attention` over this many tokens stores, per head and sequence; no fused kernel does."""
    if device != "cpu" or dtype != torch.bfloat16 or tokens > MOST_PLAIN_KEYS:
        return 0
    return sum((seen - first) * seen for first, seen in _blocks(tokens))


def _blocks(tokens: int) -> list[tuple[int, int]]:
    """The first query of each block, and the first one after it: the number of keys that the block sees."""
    return [(first, min(first + QUERIES, tokens)) for first in range(0, tokens, QUERIES)]


def _plain(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """`causal_attention` for T = S in bf16, with scores stored: a block of queries at a time, over the keys it sees."""
    B, H, T, _ = q.shape
    mask = torch.full((T, T), float("-inf"), dtype=q.dtype, device=q.device).triu(1)
    groups = q.unflatten(1, (k.size(1), -1)).flatten(0, 1)  # (B * H_kv, H / H_kv, T, D)
    k, v = k.flatten(0, 1), v.flatten(0, 1)
    outs = []
    for first, seen in _blocks(T):
        rows = groups[:, :, first:seen].flatten(1, 2)
        own = mask[first:seen, :seen].repeat(groups.size(1), 1)
        weights = torch.baddbmm(own, rows, k[:, :seen].mT, alpha=scale).softmax(-1)  # softmax sums in fp32 internally
        outs.append((weights @ v[:, :seen]).view(B, H, seen - first, -1))
    return torch.cat(outs, dim=2)


def causal_softmax(scores: Tensor, position: Tensor | None = None) -> Tensor:
    """The weights of attention whose scores no fused kernel can compute: for few queries, as they are stored.

    Args:
        scores: (B, H, T, S), where the T queries are the last T of the S positions
        position: see `causal_attention`

    Returns:
        (B, H, T, S), in the same dtype; 0 where a position is later than the query
    """
    queries, keys = scores.shape[2:]
    if position is not None:
        scores = _seen(scores, position)
    elif queries > 1:
        later = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).triu(keys - queries + 1)
        scores = scores.masked_fill(later, float("-inf"))
    return scores.softmax(-1)


def _rows(q: Tensor, k: Tensor) -> Tensor:
    """Stack the query heads that share a key head as rows of one matrix: (B, H_kv, H / H_kv * T, D)."""
    return q.reshape(q.size(0), k.size(1), -1, q.size(3))


def _attend_to_past(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """`causal_attention` for T < S on a CPU, without a mask over the past, which would slow the kernel several times.

    Every query sees the whole past; only among the new tokens is attention causal. The two parts are computed
    separately and merged by their softmax denominators. This has no gradient.
    """
    queries, group = q.size(2), q.size(1) // k.size(1)
    if queries == 1:
        return _merge(_all_keys(_rows(q, k), k, v, scale)).reshape(q.shape)
    past = k.size(2) - queries
    pieces = _all_keys(_rows(q, k), k[:, :, :past], v[:, :, :past], scale)
    pieces = [(out.reshape(q.shape), divisor.reshape(q.shape[:3])) for out, divisor in pieces]
    own = (t[:, :, past:].repeat_interleave(group, dim=1) for t in (k, v))
    return _merge([*pieces, _flash(q, *own, is_causal=True, scale=scale)])


def _all_keys(q: Tensor, k: Tensor, v: Tensor, scale: float) -> list[tuple[Tensor, Tensor]]:
    """Attention without a mask, as pieces for `_merge`; q is (B, H_kv, rows, D).

    The kernel uses one thread per head and sequence. If threads would be idle, the keys are split among them.
    """
    B, heads, keys, _ = k.shape
    cuts = _threads() // (B * heads)
    if cuts < 2 or keys < LEAST_KEYS or B > 1 < heads:
        return [_flash(q, k, v, scale=scale)]
    length = keys // cuts
    q, k, v = (t if B > 1 else t.transpose(0, 1) for t in (q, k, v))  # heads to dimension 0, cuts to 1
    cut = [t[:, :, : cuts * length].unflatten(2, (cuts, length)).squeeze(1) for t in (k, v)]
    out, divisor = _flash(q.expand(-1, cuts, -1, -1), *cut, scale=scale)
    pieces = list(zip(out.split(1, dim=1), divisor.split(1, dim=1), strict=True))
    if cuts * length < keys:
        pieces.append(_flash(q, k[:, :, cuts * length :], v[:, :, cuts * length :], scale=scale))
    return pieces if B > 1 else [(out.transpose(0, 1), divisor.transpose(0, 1)) for out, divisor in pieces]


@torch.compiler.assume_constant_result  # else this call would break the compiled graph
def _threads() -> int:
    return torch.get_num_threads()


# It returns the output, (B, H, T, D), and the logarithm of the softmax denominators, (B, H, T).
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def _merge(pieces: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Combine the results over separate groups of keys into attention over all of them."""
    if len(pieces) == 1:
        return pieces[0][0]
    outs, divisors = zip(*pieces, strict=True)
    divisors = torch.stack(divisors)
    shares = (divisors - divisors.logsumexp(0)).exp()  # the weight of each piece, in fp32
    return (torch.stack(outs) * shares.unsqueeze(-1)).sum(0).to(outs[0].dtype)
