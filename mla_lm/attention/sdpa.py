"""Causal attention through PyTorch's fused kernels, whatever the head sizes, or in compiled decoding through ours."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from mla_lm.attention import cpu_kernel

MOST_PLAIN_KEYS = 512  # in bf16 on a CPU: products and a softmax take less time than the fused kernel up to here
LEAST_KEYS = 2048  # cutting fewer among two threads costs more than it gains


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
    queries, keys = q.size(2), k.size(2)
    if queries == keys and stores_scores(q.device.type, q.dtype, keys):
        return _plain(q, k, v, scale)
    if cpu_kernel.takes(q, k, v):
        return cpu_kernel.attend_to_all(_rows(q, k) * scale, k, v).to(q.dtype).reshape(*q.shape[:3], -1)
    dim, value_dim = q.size(-1), v.size(-1)
    if value_dim < dim:
        v = F.pad(v, (0, dim - value_dim))
    elif value_dim > dim:
        q, k = F.pad(q, (0, value_dim - dim)), F.pad(k, (0, value_dim - dim))
    if queries < keys and q.device.type == "cpu" and not (torch.is_grad_enabled() and q.requires_grad):
        return _attend_to_past(q, k, v, scale)[..., :value_dim]
    if queries == 1:  # it sees every key
        return _without_cudnn(_rows(q, k), k, v, scale).reshape(q.shape)[..., :value_dim]
    if q.is_cuda and q.dtype == torch.float32:  # only FlashAttention shares key heads, and it has no fp32
        k, v = (t.repeat_interleave(q.size(1) // t.size(1), dim=1) for t in (k, v))
    # Neither is a tensor on CUDA. is_causal would align the first query, not the last, with the first key.
    mask = causal_lower_right(queries, keys) if queries < keys else None
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=k.size(1) < q.size(1)
    )
    return out[..., :value_dim]


def _without_cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Every query over every key, not by cuDNN's kernel, which would be planned anew for each length of a cache."""
    if torch.compiler.is_compiling():  # which knows this context; by itself it takes 15 times as long as the flag
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            return F.scaled_dot_product_attention(q, k, v, scale=scale)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def stores_scores(device: str, dtype: torch.dtype, tokens: int) -> bool:
    """Whether `causal_attention` over so many tokens stores the scores of every head, as no fused kernel does."""
    return device == "cpu" and dtype == torch.bfloat16 and tokens <= MOST_PLAIN_KEYS


def _plain(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The case T = S with the T x T scores stored, in bf16."""
    B, H, T, _ = q.shape
    mask = torch.full((T, T), float("-inf"), dtype=q.dtype, device=q.device).triu(1).repeat(H // k.size(1), 1)
    q, k, v = (t.flatten(0, 1) for t in (_rows(q, k), k, v))
    weights = torch.baddbmm(mask, q, k.mT, alpha=scale).softmax(-1)  # within, it sums in fp32
    return (weights @ v).view(B, H, T, -1)


def _rows(q: Tensor, k: Tensor) -> Tensor:
    """The query heads that share a key head as rows of one matrix: (B, H_kv, H / H_kv * T, D)."""
    return q.reshape(q.size(0), k.size(1), -1, q.size(3))


def _attend_to_past(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The case T < S on a CPU, without a mask over the past, which would make the kernel several times slower.

    All queries see all of the past; only among themselves is there an order. The two are attended to apart, and put
    together by what the softmax of each was divided by. There is no gradient of that.
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
    """Every query over every key, in pieces to `_merge`; q (B, H_kv, rows, D).

    The kernel has a thread for each head of each sequence. Where threads would be left over, keys are cut among them.
    """
    B, heads, keys, _ = k.shape
    cuts = _threads() // (B * heads)
    if cuts < 2 or keys < LEAST_KEYS or B > 1 < heads:
        return [_flash(q, k, v, scale=scale)]
    length = keys // cuts
    q, k, v = (t if B > 1 else t.transpose(0, 1) for t in (q, k, v))  # heads are now in dimension 0, and 1 is free
    cut = [t[:, :, : cuts * length].unflatten(2, (cuts, length)).squeeze(1) for t in (k, v)]
    out, divisor = _flash(q.expand(-1, cuts, -1, -1), *cut, scale=scale)
    pieces = list(zip(out.split(1, dim=1), divisor.split(1, dim=1), strict=True))
    if cuts * length < keys:
        pieces.append(_flash(q, k[:, :, cuts * length :], v[:, :, cuts * length :], scale=scale))
    return pieces if B > 1 else [(out.transpose(0, 1), divisor.transpose(0, 1)) for out, divisor in pieces]


@torch.compiler.assume_constant_result  # a compiled step would be cut here
def _threads() -> int:
    return torch.get_num_threads()


# (B, H, T, D), and the logarithm of what the softmax was divided by, (B, H, T)
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def _merge(pieces: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Attention over all keys from attention over some of them each."""
    if len(pieces) == 1:
        return pieces[0][0]
    outs, divisors = zip(*pieces, strict=True)
    divisors = torch.stack(divisors)
    shares = (divisors - divisors.logsumexp(0)).exp()  # of each piece, in fp32
    return (torch.stack(outs) * shares.unsqueeze(-1)).sum(0).to(outs[0].dtype)
