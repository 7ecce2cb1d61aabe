"""The Triton kernel that one query attends to a cache with on a GPU, as far as it can be held without one.

Triton's interpreter multiplies no bf16: it reads bf16 and multiplies in fp32, so that here softmax weights are not
rounded.
"""

import math
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mla_lm import AttentionConfig, Transformer, TransformerConfig
from mla_lm.attention import gpu_kernel, sdpa
from mla_lm.attention.kv_cache import dequantize, quantize
from mla_lm.attention.sdpa import causal_attention
from tests import triton_kernels

triton_kernel = pytest.importorskip("mla_lm.attention.triton_kernel", exc_type=ImportError)
BF16, INT8 = torch.bfloat16, torch.int8

calls = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 2),
        "heads": st.integers(1, 2),
        "rows": st.integers(1, 40),
        "keys": st.integers(1, 400),
        "dim": st.one_of(st.integers(1, 100), st.sampled_from([160, 288, 416, 576])),
        "processors": st.sampled_from([1, 7, 40, 500]),  # so that there are one to many splits
        "most_rows": st.sampled_from([16, 32, 64]),
        "spread": st.sampled_from([0.1, 1.0, 5.0]),
        "seed": st.integers(0, 2**31),
    }
)


def equals_softmax(out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
    weights = (q.double() @ k.double().mT).softmax(-1)
    off = (out - weights @ v.double()).abs()
    assert (off <= 1e-4 * (weights @ v.double().abs()) + 1e-5).all(), off.max()


def drawn(call: dict, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Queries, and keys as in a cache with room."""
    torch.manual_seed(call["seed"])
    batch, heads, rows, keys, dim = (call[name] for name in ("batch", "heads", "rows", "keys", "dim"))
    q = (call["spread"] * dim**-0.5 * torch.randn(batch, rows, heads, dim)).to(dtype).transpose(1, 2)
    return q, torch.randn(batch, heads, keys + 5, dim).to(dtype)[:, :, :keys]


@settings(max_examples=25)
@given(call=calls, value_dim=st.integers(1, 130), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_equals_softmax_written_out(call, value_dim, dtype):
    q, k = drawn(call, dtype)
    if value_dim <= call["dim"]:
        v = k[..., :value_dim]
    else:
        v = torch.randn(call["batch"], call["keys"], call["heads"], value_dim).to(dtype).transpose(1, 2)
    out = gpu_kernel.split_attention(q, k, v, None, None, None, call["processors"], call["most_rows"])
    equals_softmax(out, q, k, v)


@settings(max_examples=10)
@given(call=calls, dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_values_that_are_no_part_of_the_keys(call, dtype):
    q, k = drawn(call, dtype)
    v = torch.randn_like(k)
    out = gpu_kernel.split_attention(q, k, v, None, None, None, call["processors"], call["most_rows"])
    equals_softmax(out, q, k, v)


@settings(max_examples=30)
@given(
    call=calls,
    data=st.data(),
    value_dim=st.one_of(st.none(), st.integers(1, 130)),
    dtype=st.sampled_from([torch.float32, BF16, INT8]),
)
def test_only_the_keys_up_to_a_position(call, data, value_dim, dtype):
    """What lies beyond is NaN, so it is not read. Positions at the borders of blocks of keys are drawn often."""
    q, k = drawn(call, torch.float32 if dtype == INT8 else dtype)
    borders = st.sampled_from([0, 15, 16, 31, 32, 63, 64, 127, 128, call["keys"] - 1])
    position = min(call["keys"] - 1, data.draw(st.one_of(borders, st.integers(0, call["keys"] - 1))))
    v = torch.randn_like(k) if value_dim is None else k[..., : min(value_dim, call["dim"])]
    scales = (None, None)
    seen = (k[:, :, : position + 1].clone(), v[:, :, : position + 1].clone())
    if dtype == INT8:
        (k, k_scales), (v, v_scales) = (quantize(t, (t.size(3),)) for t in (k, v))
        scales = (k_scales, v_scales)
        seen = tuple(
            dequantize(t, s, (t.size(3),), torch.float32)[:, :, : position + 1]
            for t, s in zip((k, v), scales, strict=True)
        )
    for unread in (k, v) if dtype != INT8 else scales:
        unread[:, :, position + 1 :] = float("nan")
    at = torch.tensor([position])
    out = gpu_kernel.split_attention(q, k, v, *scales, at, call["processors"], call["most_rows"])
    equals_softmax(out, q, *seen)


@pytest.mark.parametrize("filled", [1, 2, 31, 32, 33, 64, 320, 399, 400])
def test_splits_share_the_keys_that_are_seen(filled):
    """Many splits of few keys: those that get none count for nothing."""
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 4, 48), torch.randn(1, 1, 400, 48)
    out = gpu_kernel.split_attention(q, k, k[..., :40], None, None, torch.tensor([filled - 1]), 500, 64)
    equals_softmax(out, q, k[:, :, :filled], k[:, :, :filled, :40])


@settings(max_examples=20)
@given(call=calls, rope_dim=st.integers(0, 64), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_int8(call, rope_dim, dtype):
    """Values that are a part of the keys, with a scale of their own where they are not all of it."""
    q, k = drawn(call, dtype)
    rope_dim = min(rope_dim, call["dim"] - 1)
    parts = (call["dim"] - rope_dim, rope_dim)[: 1 + (rope_dim > 0)]
    values, scales = quantize(k, parts)
    out = gpu_kernel.split_attention(
        *(q, values, values[..., : parts[0]], scales, scales[..., :1]), None, call["processors"], call["most_rows"]
    )
    k = dequantize(values, scales, parts, torch.float32)
    equals_softmax(out, q, k, k[..., : parts[0]])


@pytest.mark.parametrize("at", [0, 300, 498])
def test_scores_far_apart(at):
    """Only the key with the largest score counts, whichever split it is in, and no exponential overflows."""
    k = torch.zeros(1, 1, 499, 16)
    k[0, 0, :, 0] = -1000.0
    k[0, 0, at, 0] = 1000.0
    v = torch.randn(1, 1, 499, 16)
    for processors in (1, 100):
        out = gpu_kernel.split_attention(torch.eye(16)[:1].view(1, 1, 1, 16), k, v, None, None, None, processors, 64)
        torch.testing.assert_close(out[0, 0, 0], v[0, 0, at])


def test_is_an_operator_that_torch_can_compile():
    q, k, position = torch.randn(1, 2, 3, 16), torch.randn(1, 2, 9, 16), torch.tensor([4])
    values, scales = quantize(k, (16,))
    torch.library.opcheck(torch.ops.mla_lm.attend_on_gpu.default, (q, k, k[..., :8], None, None, None))
    torch.library.opcheck(torch.ops.mla_lm.attend_on_gpu.default, (q, values, values, scales, scales, position))


def one_query(q: Tensor, *_: object) -> bool:
    return q.size(2) == 1


def as_on_a_gpu(patch: pytest.MonkeyPatch) -> None:
    """Let the CPU take the GPU's path."""
    patch.setattr(gpu_kernel, "takes", one_query)
    patch.setattr(gpu_kernel, "serves", one_query)
    patch.setattr(gpu_kernel, "takes_int8", one_query)


def test_one_compiled_step_serves_every_length(monkeypatch):
    as_on_a_gpu(monkeypatch)
    graphs = []
    compiled = torch.compile(
        causal_attention, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True, dynamic=True
    )
    cache = torch.randn(2, 1, 400, 48)
    q = torch.randn(2, 4, 1, 48)
    for keys in (5, 64, 65, 400):
        k = cache[:, :, :keys]
        out = compiled(q, k, k[..., :40], 0.2)
        equals_softmax(out, q * 0.2, k, k[..., :40])
    assert len(graphs) == 1
    assert "attend_on_gpu" in graphs[0].code


KINDS = [AttentionConfig(kind="mla", kv_compressed_dim=20, rope_dim=4, nope_dim=8, value_dim=8)]
KINDS += [AttentionConfig(kind="gla", kv_compressed_dim=20, rope_dim=4, nope_dim=8, value_dim=8)]
KINDS += [AttentionConfig(kind=kind, num_kv_heads=n) for kind, n in (("mha", 4), ("gqa", 2), ("mqa", 1))]


@pytest.mark.parametrize("attention", KINDS, ids=[kind.kind for kind in KINDS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("fixed", [False, True])
def test_decoding_gives_the_logits_of_the_cpu(monkeypatch, attention, dtype, fixed):
    model = Transformer(TransformerConfig(2, 32, 4, 16, 64, attention, vocab_size=100)).eval()
    tokens = torch.randint(100, (2, 16))

    def decoded() -> Tensor:
        cache = model.new_cache(2, dtype=dtype)
        logits = [model(tokens[:, :8], cache=cache)]
        with cache.fixed(16) if fixed else nullcontext():
            logits += [model(token, cache=cache) for token in tokens[:, 8:].split(1, 1)]
        return torch.cat(logits, 1)

    with torch.no_grad():
        expected = decoded()
        as_on_a_gpu(monkeypatch)
        launches = []
        launch = gpu_kernel.split_attention
        monkeypatch.setattr(gpu_kernel, "split_attention", lambda *call: launches.append(call) or launch(*call))
        torch.testing.assert_close(decoded(), expected, rtol=1e-4, atol=1e-4)
    assert len(launches) == 2 * 8  # in both layers


@given(programs=st.integers(1, 300), keys=st.integers(1, 100_000), block=st.sampled_from([16, 32, 64, 128]))
def test_splits_cover_the_keys(programs, keys, block):
    splits = gpu_kernel.split(programs, keys, block, wanted=264)
    length = math.ceil(math.ceil(keys / block) / splits) * block  # as the kernel counts them
    assert (splits - 1) * length < keys <= splits * length
    assert splits == 1 or programs * splits <= 264
    assert splits <= gpu_kernel.MOST_SPLITS


def test_a_gpu_is_filled():
    assert gpu_kernel.split(1, 131_072, 32, wanted=264) == 128
    assert gpu_kernel.split(32, 8_192, 32, wanted=264) == 8
    assert gpu_kernel.split(1, 60, 32, wanted=264) == 1  # too few keys to split


def test_a_cpu_does_not_take_it():
    q, k = torch.randn(1, 4, 1, 64, dtype=BF16), torch.randn(1, 1, 9, 64, dtype=BF16)
    with torch.no_grad():
        assert not gpu_kernel.takes(q, k, k)
        assert not gpu_kernel.takes_int8(q, 64, 64)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (BF16, 0.03)])
def test_plain_products_where_triton_is_missing(dtype, tolerance):
    q, k = torch.randn(2, 1, 6, 48).to(dtype), torch.randn(2, 1, 300, 48).to(dtype)
    v = k[..., :40]
    expected = (0.1 * q.double() @ k.double().mT).softmax(-1) @ v.double()
    out = sdpa._by_products(0.1 * q, k, v)
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


# compiled, without a GPU


def compiled(rows: int, dim: int, value_dim: int, cache: torch.dtype, shared: bool, fixed: bool = False) -> dict:
    """What the kernel takes of an H100, for bf16 queries over a cache of one key head."""
    q = torch.empty(1, 1, rows, dim, dtype=BF16, device="meta")
    k, v = (torch.empty(1, 1, 9, width, dtype=cache, device="meta") for width in (dim, value_dim))
    scales = torch.empty(1, 1, 9, 2 if value_dim < dim else 1, device="meta") if cache == INT8 else None
    constants, options = gpu_kernel.constants(q, k, v, scales, shared, most_rows=64)
    constants["TO_POSITION"] = fixed
    kept = "*i8" if cache == INT8 else "*bf16"
    pointers = {"q": "*bf16", "k": kept, "v": kept, "k_scales": "*bf16", "v_scales": "*bf16"}
    pointers |= {"out": "*fp32", "lse": "*fp32", "position": "*i64" if fixed else kept}
    numbers = [name for name in triton_kernel.attend.arg_names if name not in constants | pointers]
    strides = [f"{tensor}_{name}" for tensor in "kv" for name in ("batch", "head", "key")]
    signature, aligned = pointers | dict.fromkeys(numbers, "i32"), [*pointers, *strides]
    found = triton_kernels.compiled(triton_kernel.attend, signature, constants, aligned, **options)
    print({name: found[name] for name in ("registers", "stack", "shared")})
    return found


@pytest.mark.parametrize(
    ("rows", "dim", "value_dim", "cache", "shared"),
    [
        *((16, *dims, BF16, True) for dims in ((576, 512), (416, 384), (288, 256), (80, 64))),
        *((16, *dims, INT8, False) for dims in ((576, 512), (416, 384), (288, 256), (80, 64))),
        (32, 576, 512, BF16, True),
        (32, 576, 512, INT8, False),
        (64, 416, 384, BF16, True),
        (8, 128, 128, BF16, False),  # GQA and MQA
        (64, 256, 256, BF16, False),
    ],
)
def test_compiles_for_a_gpu_and_spills_nothing(rows, dim, value_dim, cache, shared):
    fits(compiled(rows, dim, value_dim, cache, shared), rows)


@pytest.mark.parametrize(
    ("rows", "dim", "value_dim", "cache", "shared"),
    [
        (16, 576, 512, BF16, True),
        (32, 576, 512, INT8, False),
        (64, 416, 384, BF16, True),
        (1, 64, 64, BF16, False),  # MHA, which PyTorch's kernel serves without a fixed position
        (1, 128, 128, BF16, False),
    ],
)
def test_with_a_fixed_position_too(rows, dim, value_dim, cache, shared):
    fits(compiled(rows, dim, value_dim, cache, shared, fixed=True), rows)


def fits(found: dict, rows: int) -> None:
    assert found["stack"] == 0
    assert "cp.async" in found["ptx"]  # the next block is read while this one is multiplied
    assert found["shared"] <= (gpu_kernel.BLOCKS[max(16, rows)][0] or 99 * 1024)  # the least from Ampere on


def test_of_64_heads_and_the_widest_keys_hardly_anything_is_spilled():
    found = compiled(128, 576, 512, BF16, shared=True)
    assert found["stack"] <= 256  # in bytes of a thread, which has 1,020 in registers
    assert found["shared"] <= gpu_kernel.BLOCKS[64][0]
    assert "wgmma" in found["ptx"]  # Hopper's own instruction for products of 64 rows


def test_the_kernel_that_merges_splits_compiles_for_a_gpu():
    pointers = dict.fromkeys(("parts", "lse", "out"), "*fp32")
    fixed = {"D_V": 512, "MOST_SPLITS": gpu_kernel.MOST_SPLITS, "BLOCK": 32}
    found = triton_kernels.compiled(triton_kernel.merge, pointers | {"splits": "i32"}, fixed, pointers)
    assert found["stack"] == 0
