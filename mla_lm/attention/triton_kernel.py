"""The Triton kernels of gpu_kernel.py: attention of one query over a KV cache, split over keys.

The keys of a sequence are cut into splits, so that few sequences fill a GPU too (flash decoding; Dao et al., 2023,
https://pytorch.org/blog/flash-decoding). Within a split, softmax is computed block by block of keys with a running
maximum (FlashAttention, arXiv 2205.14135). All query heads that share a key are rows of one matrix product.
"""

# Triton's types are not Python's, and it may be missing.
# pyright: reportMissingImports=false, reportArgumentType=false, reportAssignmentType=false

import triton
import triton.language as tl


@triton.jit
def _tile(base, rows, stride, lives, FIRST: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Columns FIRST to FIRST + WIDTH of `rows`; zeros in columns up to PADDED and where a row is not alive."""
    columns = tl.arange(0, PADDED)
    pointers = base + rows[:, None] * stride + (FIRST + columns)[None, :]
    return tl.load(pointers, mask=lives[:, None] & (columns < WIDTH)[None, :], other=0.0)


@triton.jit
def _store(base, rows, stride, lives, values, FIRST: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """The inverse of `_tile`."""
    columns = tl.arange(0, PADDED)
    pointers = base + rows[:, None] * stride + (FIRST + columns)[None, :]
    tl.store(pointers, values, mask=lives[:, None] & (columns < WIDTH)[None, :])


@triton.jit(do_not_specialize=["keys"])  # it changes with every token
def attend(
    q,  # (B, HEADS, ROWS, D), contiguous
    k,  # (B, HEADS, S, D)
    v,  # (B, HEADS, S, D_V)
    k_scales,  # of int8 keys, (B, HEADS, S, PARTS); not read otherwise
    v_scales,  # of int8 values, (B, HEADS, S, 1); not read otherwise
    out,  # (B, HEADS, ROWS, splits, D_V) fp32, contiguous
    lse,  # (B, HEADS, ROWS, splits) fp32, contiguous: the logarithms to base 2 of the softmax denominators
    position,  # of the last key that is seen, int64; not read unless TO_POSITION
    keys,  # S
    k_batch,  # strides in elements
    k_head,
    k_key,
    v_batch,
    v_head,
    v_key,
    k_scales_batch,
    k_scales_head,
    k_scales_key,
    v_scales_batch,
    v_scales_head,
    v_scales_key,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    D_V: tl.constexpr,
    SHARED: tl.constexpr,  # the values are the first D_V columns of the keys, and what was read for one serves as both
    PARTS: tl.constexpr,  # scales of a key: of its first W1 + W2 columns, and of the rest; 0 where it is not int8
    # A key is read in three pieces, a value in two, since tl.dot takes powers of two, from 16 on. A width may be 0.
    W1: tl.constexpr,
    W2: tl.constexpr,
    W3: tl.constexpr,
    P1: tl.constexpr,  # the widths with padding
    P2: tl.constexpr,
    P3: tl.constexpr,
    V1: tl.constexpr,
    V2: tl.constexpr,
    PV1: tl.constexpr,
    PV2: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    TO_POSITION: tl.constexpr,  # only the keys up to `position` are seen
    EXACT: tl.constexpr,  # products of fp32, since Triton's interpreter multiplies no bf16; otherwise in q's dtype
):
    """Attention of a block of rows over a split of the keys. Grid: (B * HEADS * blocks of rows, splits)."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    FACTOR: tl.constexpr = tl.float32 if EXACT else q.dtype.element_ty
    ROW_BLOCKS: tl.constexpr = (ROWS + BLOCK_ROWS - 1) // BLOCK_ROWS
    sequence = (tl.program_id(0) // ROW_BLOCKS).to(tl.int64)  # int64, since a large cache has more than 2^31 elements
    rows = tl.program_id(0) % ROW_BLOCKS * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_lives = rows < ROWS
    batch, head = sequence // HEADS, sequence % HEADS
    if TO_POSITION:
        keys = tl.load(position).to(tl.int32) + 1
    split_keys = tl.cdiv(tl.cdiv(keys, BLOCK_KEYS), tl.num_programs(1)) * BLOCK_KEYS
    first = tl.program_id(1) * split_keys
    count = tl.minimum(split_keys, keys - first)  # 0 or less where few keys are seen: such a split reads nothing
    first = first.to(tl.int64)
    k += batch * k_batch + head * k_head + first * k_key
    v += batch * v_batch + head * v_head + first * v_key
    k_scales += batch * k_scales_batch + head * k_scales_head + first * k_scales_key
    v_scales += batch * v_scales_batch + head * v_scales_head + first * v_scales_key

    q += sequence * (ROWS * D)
    q1 = _tile(q, rows, D, row_lives, 0, W1, P1).to(FACTOR)
    if W2 > 0:
        q2 = _tile(q, rows, D, row_lives, W1, W2, P2).to(FACTOR)
    if W3 > 0:
        q3 = _tile(q, rows, D, row_lives, W1 + W2, W3, P3).to(FACTOR)
    acc1 = tl.zeros((BLOCK_ROWS, PV1), tl.float32)
    if V2 > 0:
        acc2 = tl.zeros((BLOCK_ROWS, PV2), tl.float32)
    largest = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)

    for start in range(0, count, BLOCK_KEYS):
        offsets = start + tl.arange(0, BLOCK_KEYS)
        lives = offsets < count
        k1 = _tile(k, offsets, k_key, lives, 0, W1, P1).to(FACTOR)
        scores = tl.dot(q1, tl.trans(k1), input_precision="ieee")
        if W2 > 0:
            k2 = _tile(k, offsets, k_key, lives, W1, W2, P2).to(FACTOR)
            scores = tl.dot(q2, tl.trans(k2), scores, input_precision="ieee")
        if PARTS > 0:
            scores *= tl.load(k_scales + offsets * k_scales_key, mask=lives, other=0.0).to(tl.float32)[None, :]
        if W3 > 0:
            k3 = _tile(k, offsets, k_key, lives, W1 + W2, W3, P3).to(FACTOR)
            if PARTS > 0:
                last_scale = tl.load(k_scales + offsets * k_scales_key + PARTS - 1, mask=lives, other=0.0)
                scores += tl.dot(q3, tl.trans(k3), input_precision="ieee") * last_scale.to(tl.float32)[None, :]
            else:
                scores = tl.dot(q3, tl.trans(k3), scores, input_precision="ieee")
        scores = tl.where(lives[None, :], scores * LOG2_E, float("-inf"))

        before = largest
        largest = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - largest[:, None])
        shrink = tl.exp2(before - largest)
        total = total * shrink + tl.sum(weights, 1)
        if PARTS > 0:
            weights *= tl.load(v_scales + offsets * v_scales_key, mask=lives, other=0.0).to(tl.float32)[None, :]
        weights = weights.to(FACTOR)
        v1 = k1 if SHARED else _tile(v, offsets, v_key, lives, 0, V1, PV1).to(FACTOR)
        acc1 = tl.dot(weights, v1, acc1 * shrink[:, None], input_precision="ieee")
        if V2 > 0:
            v2 = k2 if SHARED else _tile(v, offsets, v_key, lives, V1, V2, PV2).to(FACTOR)
            acc2 = tl.dot(weights, v2, acc2 * shrink[:, None], input_precision="ieee")

    at = (sequence * ROWS + rows) * tl.num_programs(1) + tl.program_id(1)
    total = tl.maximum(total, 1.0)  # which it is where there are keys; a split without any gives -inf and zeros
    tl.store(lse + at, largest + tl.log2(total), mask=row_lives)
    _store(out, at, D_V, row_lives, acc1 / total[:, None], 0, V1, PV1)
    if V2 > 0:
        _store(out, at, D_V, row_lives, acc2 / total[:, None], V1, V2, PV2)


@triton.jit(do_not_specialize=["splits"])
def merge(
    parts,  # (rows, splits, D_V) fp32, contiguous
    lse,  # (rows, splits) fp32, contiguous
    out,  # (rows, D_V) fp32, contiguous
    splits,
    D_V: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Combine the outputs of `attend` over the splits. Grid: (rows, blocks of columns)."""
    row = tl.program_id(0).to(tl.int64)
    columns, numbers = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, MOST_SPLITS)
    lives = numbers < splits
    logs = tl.load(lse + row * splits + numbers, mask=lives, other=float("-inf"))
    weights = tl.exp2(logs - tl.max(logs, 0))
    weights /= tl.sum(weights, 0)
    tile = tl.load(
        parts + (row * splits + numbers)[:, None] * D_V + columns[None, :],
        mask=lives[:, None] & (columns < D_V)[None, :],
        other=0.0,
    )
    tl.store(out + row * D_V + columns, tl.sum(weights[:, None] * tile, 0), mask=columns < D_V)
