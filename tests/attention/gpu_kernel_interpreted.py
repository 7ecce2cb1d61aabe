"""The GPU's kernel of decoding on the CPU, by Triton's interpreter: test_gpu_kernel.py runs this file.

The interpreter multiplies no bf16: it reads bf16 and multiplies in fp32, so that here softmax weights are not rounded.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mla_lm import AttentionConfig, Transformer, TransformerConfig
from mla_lm.attention import gpu_kernel
from mla_lm.attention.kv_cache import dequantize, quantize
from mla_lm.attention.sdpa import causal_attention

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
    equals_softmax(gpu_kernel.split_attention(q, k, v, None, None, call["processors"], call["most_rows"]), q, k, v)


@settings(max_examples=10)
@given(call=calls, dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_values_that_are_no_part_of_the_keys(call, dtype):
    q, k = drawn(call, dtype)
    v = torch.randn_like(k)
    equals_softmax(gpu_kernel.split_attention(q, k, v, None, None, call["processors"], call["most_rows"]), q, k, v)


@settings(max_examples=20)
@given(call=calls, rope_dim=st.integers(0, 64), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_int8(call, rope_dim, dtype):
    """Values that are a part of the keys, with a scale of their own where they are not all of it."""
    q, k = drawn(call, dtype)
    rope_dim = min(rope_dim, call["dim"] - 1)
    parts = (call["dim"] - rope_dim, rope_dim)[: 1 + (rope_dim > 0)]
    values, scales = quantize(k, parts)
    out = gpu_kernel.split_attention(
        *(q, values, values[..., : parts[0]], scales, scales[..., :1]), call["processors"], call["most_rows"]
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
        out = gpu_kernel.split_attention(torch.eye(16)[:1].view(1, 1, 1, 16), k, v, None, None, processors, 64)
        torch.testing.assert_close(out[0, 0, 0], v[0, 0, at])


def test_is_an_operator_that_torch_can_compile():
    q, k = torch.randn(1, 2, 3, 16), torch.randn(1, 2, 9, 16)
    values, scales = quantize(k, (16,))
    torch.library.opcheck(torch.ops.mla_lm.attend_on_gpu.default, (q, k, k[..., :8], None, None))
    torch.library.opcheck(torch.ops.mla_lm.attend_on_gpu.default, (q, values, values, scales, scales))


def one_query(q: Tensor, *_: object) -> bool:
    return q.size(2) == 1


def as_on_a_gpu(patch: pytest.MonkeyPatch) -> None:
    """Let the CPU take the GPU's path."""
    patch.setattr(gpu_kernel, "takes", one_query)
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
def test_decoding_gives_the_logits_of_the_cpu(monkeypatch, attention, dtype):
    model = Transformer(TransformerConfig(2, 32, 4, 16, 64, attention, vocab_size=100)).eval()
    tokens = torch.randint(100, (2, 16))

    def decoded() -> Tensor:
        cache = model.new_cache(2, dtype=dtype)
        return torch.cat(
            [model(tokens[:, :8], cache=cache)] + [model(t, cache=cache) for t in tokens[:, 8:].split(1, 1)], 1
        )

    with torch.no_grad():
        expected = decoded()
        as_on_a_gpu(monkeypatch)
        launches = []
        launch = gpu_kernel.split_attention
        monkeypatch.setattr(gpu_kernel, "split_attention", lambda *call: launches.append(call) or launch(*call))
        torch.testing.assert_close(decoded(), expected, rtol=1e-4, atol=1e-4)
    assert len(launches) == 2 * 8  # in both layers
