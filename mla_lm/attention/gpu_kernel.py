"""Attention of one new token over a cache by our own Triton kernel (triton_kernel.py), on an NVIDIA GPU.

PyTorch's fused kernels want values as wide as keys, heads of at most 256, and no int8. This kernel reads a key once for
all query heads that share it. Where the values are a part of the keys, as in absorbed MLA, it reads the two as one. An
int8 cache it reads as stored.
"""

import functools
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16)  # of queries; the tests also call it with fp32
WIDEST = 576  # head size; the sums of wider ones would not fit into registers
MOST_SPLITS = 128  # the kernel that merges the splits reads so many at once
# Most bytes of keys and values that a program reads at once, and how many such blocks are under way. int8 is converted
# in registers, of which a larger block needs too many.
READS = {"half": (36 * 1024, 3), "int8": (18 * 1024, 4)}
# For the rows of a program: bytes of shared memory that it needs beyond what every GPU has, and its warps.
BLOCKS = {64: (180 * 1024, 8), 32: (112 * 1024, 8), 16: (0, 4)}


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernel is the best for this call: one that it `serves`, over keys that several query heads share.

    Keys that no other head shares are left to PyTorch's FlashAttention, which reads each once and splits them too. But
    it has no mask, which hides the keys beyond a fixed position.
    """
    return q.size(1) > k.size(1) and serves(q, k, v)


def serves(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernel can compute this: one query, without gradients. Shapes are as in `causal_attention`."""
    return q.dtype == k.dtype and v.size(3) <= WIDEST and _serves(q, q.size(3))


def takes_int8(q: Tensor, width: int, value_width: int) -> bool:
    """Whether the kernel serves the queries (B, H, T, D) over an int8 cache with keys and values of these widths."""
    return value_width <= WIDEST and _serves(q, width)


def _serves(q: Tensor, width: int) -> bool:
    """Whether this is one query in half precision, without gradients, on a GPU that runs our kernels."""
    one = q.size(2) == 1 and not torch.is_grad_enabled() and width <= WIDEST
    return one and q.is_cuda and q.dtype in DTYPES and _runs_here()


@torch.compiler.assume_constant_result  # else these calls would break the compiled graph
def _runs_here() -> bool:
    from mla_lm.hardware import triton_failure  # here, because not every system has all the modules that it needs

    return triton_failure() is None


def attend_to_all(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    position: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T) v, where each query sees every key, or every key up to a position.

    Sums and softmax are in fp32; the softmax weights are rounded to the dtype of q.

    Args:
        q: (B, H_kv, rows, D), already scaled; the query heads that share a key head are its rows
        k: (B, H_kv, S, D), in the dtype of q or int8
        v: (B, H_kv, S, D_v), likewise; it may be k[..., :D_v], which in half precision is then read once. The last
            dimension of k, v and the scales is contiguous
        k_scales: of int8 keys, (B, H_kv, S, 1), or (B, H_kv, S, 2): of the first D_v columns, and of the others
        v_scales: of int8 values, (B, H_kv, S, 1)
        position: of the last key that is seen, (1,) int64; no key beyond it is read

    Returns:
        (B, H_kv, rows, D_v) fp32
    """
    return torch.ops.mla_lm.attend_on_gpu.default(q, k, v, k_scales, v_scales, position)


def split_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    position: Tensor | None,
    processors: int,
    most_rows: int,
) -> Tensor:
    """`attend_to_all` for a GPU of so many processors, whose programs hold at most so many rows."""
    from mla_lm.attention import triton_kernel  # here, because not everyone has Triton

    kernels: Any = triton_kernel  # its functions are called with a grid, and with options of the compiler
    batch, heads, rows, value_dim = *q.shape[:3], v.size(3)
    q, keys = q.contiguous(), k.size(2)
    # Triton reads no block of int8 ahead that two products use, so its values are loaded on their own.
    same = k.data_ptr() == v.data_ptr() and k.stride() == v.stride() and value_dim <= k.size(3) and k_scales is None
    fixed, options = constants(q, k, v, k_scales, same, most_rows)
    row_blocks = batch * heads * -(-rows // fixed["BLOCK_ROWS"])
    splits = split(row_blocks, keys, fixed["BLOCK_KEYS"], processors * (2 if options["num_warps"] == 4 else 1))
    parts = q.new_empty(batch, heads, rows, splits, value_dim, dtype=torch.float32)
    lse = q.new_empty(batch, heads, rows, splits, dtype=torch.float32)
    scales = [k if k_scales is None else k_scales, v if v_scales is None else v_scales]
    strides = [stride for tensor in (k, v, *scales) for stride in tensor.stride()[:3]]
    fixed["TO_POSITION"], last = position is not None, k if position is None else position
    kernels.attend[(row_blocks, splits)](q, k, v, *scales, parts, lse, last, keys, *strides, **fixed, **options)
    if splits == 1:
        return parts.squeeze(3)
    out, block = _empty(q, k, v), 32
    kernels.merge[(batch * heads * rows, -(-value_dim // block))](
        parts, lse, out, splits, D_V=value_dim, MOST_SPLITS=MOST_SPLITS, BLOCK=block
    )
    return out


def split(programs: int, keys: int, block: int, wanted: int) -> int:
    """The number of splits of the keys, which make `wanted` programs in all.

    A split has as many blocks of keys as any other, and the last one what is left. The kernel counts them.

    Args:
        programs: their number without splits
        block: the keys that a program reads at once; a split has two such blocks or more, where there are as many
    """
    blocks = -(-keys // block)
    splits = max(1, min(wanted // programs, blocks // 2, MOST_SPLITS))
    return -(-blocks // -(-blocks // splits))


def constants(
    q: Tensor, k: Tensor, v: Tensor, k_scales: Tensor | None, shared: bool, most_rows: int
) -> tuple[dict[str, Any], dict[str, int]]:
    """What the kernel is compiled for, and the options of Triton's compiler."""
    dim, value_dim, rows = q.size(3), v.size(3), q.size(2)
    parts = 0 if k_scales is None else k_scales.size(3)
    first = value_dim if shared or parts == 2 else dim
    widths = {"W": (*_pieces(first), dim - first), "V": _pieces(value_dim)}
    padded = {"P": [_padded(width) for width in widths["W"]], "PV": [_padded(width) for width in widths["V"]]}
    row_bytes = (sum(padded["P"]) + (0 if shared else sum(padded["PV"]))) * k.element_size()
    block_bytes, stages = READS["int8" if parts else "half"]
    block_keys = max(n for n in (16, 32, 64, 128) if n == 16 or n * row_bytes <= block_bytes)
    block_rows = min(most_rows, 32 if parts else 64, max(16, 1 << (rows - 1).bit_length()))
    pieces = {f"{name}{i + 1}": n for name, ns in (widths | padded).items() for i, n in enumerate(ns)}
    sizes = {"HEADS": q.size(1), "ROWS": rows, "D": dim, "D_V": value_dim, "SHARED": shared, "PARTS": parts}
    blocks = {"BLOCK_ROWS": block_rows, "BLOCK_KEYS": block_keys, "EXACT": q.device.type == "cpu"}
    return sizes | pieces | blocks, {"num_warps": BLOCKS[block_rows][1], "num_stages": stages}


def _pieces(width: int) -> tuple[int, int]:
    """Cut a width into the largest power of two in it and the rest."""
    first = 1 << (width.bit_length() - 1)
    return first, width - first


def _padded(width: int) -> int:
    """The next power of two from 16 on, which is the least that a matrix product takes; 0 for 0."""
    return max(16, 1 << (width - 1).bit_length()) if width else 0


@functools.cache
def _device(device: torch.device) -> tuple[int, int]:
    """The processors of a GPU, and the most rows of a program that its shared memory has room for."""
    if device.type == "cpu":  # in Triton's interpreter
        return 1, 64
    properties = torch.cuda.get_device_properties(device)
    room = properties.shared_memory_per_block_optin
    return properties.multi_processor_count, next(rows for rows, (needed, _) in BLOCKS.items() if needed <= room)


def _attend_on_gpu(
    q: Tensor, k: Tensor, v: Tensor, k_scales: Tensor | None, v_scales: Tensor | None, position: Tensor | None
) -> Tensor:
    with torch.cuda.device_of(q):  # Triton launches on the current device
        return split_attention(q, k, v, k_scales, v_scales, position, *_device(q.device))


def _empty(q: Tensor, k: Tensor, v: Tensor, *_: Tensor | None) -> Tensor:
    return q.new_empty(*q.shape[:3], v.size(3), dtype=torch.float32)


# The operator is opaque to torch.compile: it chooses the splits from the actual number of keys, so that one compiled
# step serves every length.
OPERATORS = torch.library.Library("mla_lm", "FRAGMENT")
OPERATORS.define(
    "attend_on_gpu(Tensor q, Tensor k, Tensor v, Tensor? k_scales, Tensor? v_scales, Tensor? position) -> Tensor"
)
for device in ("CUDA", "CPU"):  # on a CPU in Triton's interpreter alone
    OPERATORS.impl("attend_on_gpu", _attend_on_gpu, device)
torch.library.register_fake("mla_lm::attend_on_gpu", _empty, lib=OPERATORS)
