"""Properties over drawn shapes of all four kinds: every way through the cache gives what the full forward gives."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from mla_lm.attention import MHA, MLA, MHAConfig, MLAConfig
from mla_lm.attention.kv_cache import dequantize, quantize

few = settings(max_examples=25)


@st.composite
def mla_layers(draw) -> MLA:
    heads = draw(st.sampled_from([1, 2, 4]))
    head_dim = draw(st.integers(1, 12))
    rope_dim = 2 * draw(st.integers(1, 4))
    nope_dim = draw(st.integers(1, 12))
    # Half of the draws have equal head sizes, which the fused kernels take as they are.
    value_dim = draw(st.one_of(st.just(nope_dim + rope_dim), st.integers(1, 24)))
    config = MLAConfig(
        d_model=heads * head_dim,
        num_heads=heads,
        kv_compressed_dim=draw(st.integers(1, 24)),
        q_compressed_dim=draw(st.one_of(st.none(), st.integers(1, 24))),
        rope_dim=rope_dim,
        seq_len=32,
        use_bias=draw(st.booleans()),
        nope_dim=nope_dim,
        value_dim=value_dim,
    )
    return drawn(draw, MLA, config)


@st.composite
def mha_layers(draw) -> MHA:
    kv_heads, group = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 4]))
    heads, head_dim = kv_heads * group, 2 * draw(st.integers(1, 8))
    rope_dim, use_bias = 2 * draw(st.integers(0, head_dim // 2)), draw(st.booleans())
    sizes = {"num_kv_heads": kv_heads, "rope_dim": rope_dim, "use_bias": use_bias}
    return drawn(draw, MHA, MHAConfig(heads * head_dim, heads, 32, **sizes))


def drawn(draw, kind, config):
    """A layer whose weights are a part of the example, so that a failure repeats."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    return kind(config)


layers = st.one_of(mla_layers(), mha_layers())
chunkings = st.lists(st.integers(1, 8), min_size=1, max_size=4)  # at most seq_len tokens


def through_cache(layer, x, chunks):
    cache = layer.new_cache(x.size(0), x.size(1))
    return torch.cat([layer(part, cache) for part in x.split(chunks, dim=1)], dim=1)


@torch.no_grad()
@few
@given(layers, chunkings, st.integers(1, 3), st.integers(0, 2**31))
def test_chunks_and_single_tokens_equal_the_full_forward(layer, chunks, batch, seed):
    torch.manual_seed(seed)
    x = torch.randn(batch, sum(chunks), layer.config.d_model)
    full = layer(x)
    torch.testing.assert_close(through_cache(layer, x, chunks), full, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(through_cache(layer, x, [1] * sum(chunks)), full, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@few
@given(mla_layers(), chunkings, st.booleans(), st.integers(0, 2**31))
def test_absorbed_equals_decompressed(layer, chunks, absorb, seed):
    torch.manual_seed(seed)
    x = torch.randn(2, sum(chunks), layer.config.d_model)
    layer.absorbing_is_cheaper = lambda queries, keys: absorb  # the choice between paths is about speed alone
    torch.testing.assert_close(through_cache(layer, x, chunks), layer(x), rtol=1e-5, atol=1e-5)


def test_decoding_absorbs_and_long_prefill_decompresses():
    mla = MLA(MLAConfig(256, 8, 64, None, 16, 1024))
    assert mla.absorbing_is_cheaper(1, 1024)
    assert mla.absorbing_is_cheaper(8, 1024)
    assert not mla.absorbing_is_cheaper(1024, 1024)
    assert not mla.absorbing_is_cheaper(256, 1024)


@torch.no_grad()
@few
@given(layers, st.integers(2, 12), st.data())
def test_causal(layer, length, data):
    cut = data.draw(st.integers(1, length - 1))
    x = torch.randn(1, length, layer.config.d_model)
    changed = torch.cat((x[:, :cut], torch.randn(1, length - cut, layer.config.d_model)), dim=1)
    torch.testing.assert_close(layer(x)[:, :cut], layer(changed)[:, :cut], rtol=1e-6, atol=1e-6)


@few
@given(layers, st.integers(1, 3), st.integers(1, 32), st.sampled_from([None, torch.float32, torch.bfloat16]))
def test_cache_bytes_are_the_formulas(layer, batch, max_len, dtype):
    c = layer.config
    if isinstance(c, MLAConfig):
        elements = c.kv_compressed_dim + c.rope_dim
    else:
        elements = 2 * c.num_kv_heads * (c.d_model // c.num_heads)
    width = 2 if dtype == torch.bfloat16 else 4
    cache = layer.new_cache(batch, max_len, dtype)
    assert cache.nbytes == batch * max_len * elements * width
    layer(torch.randn(batch, max_len, c.d_model), cache)  # filling it adds nothing
    assert (cache.nbytes, cache.length) == (batch * max_len * elements * width, max_len)


@torch.no_grad()
@few
@given(layers, st.integers(0, 2**31))
def test_bf16_cache_of_an_fp32_layer(layer, seed):
    torch.manual_seed(seed)
    x = torch.randn(2, 9, layer.config.d_model)
    cache = layer.new_cache(2, 9, torch.bfloat16)
    out = torch.cat([layer(part, cache) for part in x.split([5, 1, 3], dim=1)], dim=1)
    assert out.dtype == torch.float32
    assert {tensor.dtype for tensor in cache.tensors} == {torch.bfloat16}
    torch.testing.assert_close(out, layer(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("num_kv_heads", [None, 2, 1])
def test_a_full_cache_refuses_and_stays_as_it_was(num_kv_heads):
    layer = MHA(MHAConfig(32, 4, 16, num_kv_heads=num_kv_heads))
    cache = layer.new_cache(1, 4)
    layer(torch.randn(1, 3, 32), cache)
    before = [tensor[:, :, :3].clone() for tensor in cache.tensors]  # what lies beyond was never written
    with pytest.raises(ValueError, match="room for 4 tokens: 3 are stored, 5 needed"):
        layer(torch.randn(1, 2, 32), cache)
    assert cache.length == 3
    assert all(torch.equal(tensor[:, :, :3], kept) for tensor, kept in zip(cache.tensors, before, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("layer", [MLA(MLAConfig(32, 4, 12, None, 4, 16)), MHA(MHAConfig(32, 4, 16, num_kv_heads=2))])
@pytest.mark.parametrize("stored", [0, 3])
def test_no_tokens_are_no_output(layer, stored):
    """Over a filled cache, PyTorch's CPU kernel would divide by zero."""
    cache = layer.new_cache(2, 8)
    layer(torch.randn(2, stored, 32), cache)
    assert layer(torch.randn(2, 0, 32), cache).shape == (2, 0, 32)
    assert cache.length == stored


@torch.no_grad()
@few
@given(layers, chunkings, st.sampled_from([None, torch.bfloat16, torch.int8]), st.integers(0, 2**31))
def test_a_cache_that_grows_is_one_that_was_there_at_once(layer, chunks, dtype, seed):
    torch.manual_seed(seed)
    x = torch.randn(2, sum(chunks), layer.config.d_model)
    grown, whole = layer.new_cache(2, dtype=dtype), layer.new_cache(2, 32, dtype)
    assert grown.nbytes == 0
    for part in x.split(chunks, dim=1):
        torch.testing.assert_close(layer(part, grown), layer(part, whole), rtol=1e-5, atol=1e-5)
        room = grown.nbytes * 32 // whole.nbytes
        assert grown.length <= room <= min(32, 2 * grown.length)
    for _ in range(sum(chunks), 32):
        layer(torch.randn(2, 1, layer.config.d_model), grown)
    assert (grown.length, grown.nbytes) == (32, whole.nbytes)  # full, it has the bytes of its tokens and no more
    with pytest.raises(ValueError, match="33 "):
        layer(torch.randn(2, 1, layer.config.d_model), grown)


@torch.no_grad()
@few
@given(layers, chunkings, st.integers(0, 2**31))
def test_int8_cache(layer, chunks, seed):
    """Half the bytes of bf16 and two for each scale; the output within what rounding to 8 bits takes."""
    torch.manual_seed(seed)
    batch = 16  # in a few numbers alone the outputs may be small by chance, where rounding is not
    c, x = layer.config, torch.randn(batch, sum(chunks), layer.config.d_model)
    cache, bf16 = (layer.new_cache(batch, x.size(1), dtype) for dtype in (torch.int8, torch.bfloat16))
    scales = 2 if isinstance(c, MLAConfig) else 2 * c.num_kv_heads
    assert cache.nbytes == bf16.nbytes // 2 + batch * x.size(1) * scales * 2
    out = torch.cat([layer(part, cache) for part in x.split(chunks, dim=1)], dim=1)
    expected = layer(x)
    torch.testing.assert_close(out, expected, rtol=0, atol=0.03 * expected.abs().max().item() + 1e-6)
    assert {tensor.dtype for tensor in cache.tensors} == {torch.int8, torch.bfloat16}


class LargestFp32(TorchDispatchMode):
    """Elements of the largest fp32 tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                self.elements = max(self.elements, tensor.numel())
        return out


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
@pytest.mark.parametrize("absorb", [True, False])
@pytest.mark.parametrize("kind", ["mla", "gqa"])
def test_a_cache_is_read_in_the_dtype_of_the_products(kind, absorb, dtype):
    layer = MLA(MLAConfig(32, 4, 16, None, 4, 256)) if kind == "mla" else MHA(MHAConfig(32, 4, 256, 2))
    layer.absorbing_is_cheaper = lambda queries, keys: absorb
    cache = layer.new_cache(1, 256, dtype)
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(1, 200, 32), cache)
        with LargestFp32() as largest:
            layer(torch.randn(1, 1, 32), cache)
    assert 0 < largest.elements <= 32 * 32  # of weights, of the new token and of sums, but of no 201 tokens


@few
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.floats(-30, 30),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 2**31),
)
def test_quantizing_takes_half_a_step_at_most(parts, exponent, dtype, seed):
    torch.manual_seed(seed)
    x = (torch.randn(2, 3, 5, sum(parts)) * 2.0**exponent).to(dtype)
    x[0, 0, 0] = 0
    values, scales = quantize(x, parts)
    back = dequantize(values, scales, parts, torch.float32)
    for piece, restored, scale in zip(x.split(parts, -1), back.split(parts, -1), scales.split(1, -1), strict=True):
        # the scale itself is rounded to 8 bits, by which the largest value may miss
        assert ((piece - restored).abs() <= 0.51 * scale.float() + piece.abs() * 2**-8).all()
    assert not back[0, 0, 0].any()


def test_a_cache_may_be_longer_than_seq_len_but_no_sequence_may():
    layer = MLA(MLAConfig(32, 4, 16, None, 4, seq_len=8))
    cache = layer.new_cache(1, 12)
    layer(torch.randn(1, 8, 32), cache)
    with pytest.raises(ValueError, match="9 tokens is longer than seq_len=8"):
        layer(torch.randn(1, 1, 32), cache)


def test_no_graph_grows_with_the_cache():
    layer = MLA(MLAConfig(32, 4, 16, None, 4, seq_len=8))
    cache = layer.new_cache(1, 8)
    assert layer(torch.randn(1, 3, 32), cache).requires_grad
    assert not any(tensor.requires_grad for tensor in cache.tensors)
