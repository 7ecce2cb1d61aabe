"""A cache at a fixed position: the same results as an ordinary one, by a step that is the same at every length.

What an ordinary cache does is in test_decoding.py.
"""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import counters

from mla_lm import Transformer
from mla_lm.attention import YarnConfig, gpu_kernel
from tests import kinds
from tests.kinds import each_kind, spread
from tests.on_device import OnTheDevice

DTYPES = [torch.float32, torch.bfloat16, torch.int8]


def model_of(kind: str, seq_len: int = 24, yarn: YarnConfig | None = None) -> Transformer:
    config = kinds.config_of(kind, seq_len=seq_len, tie_embeddings=False)
    torch.manual_seed(0)
    attention = replace(config.attention, yarn=yarn or YarnConfig())
    return spread(Transformer(replace(config, attention=attention)), std=0.2)


def off(out: Tensor, expected: Tensor) -> Tensor:
    return (out - expected).norm() / expected.norm()


def tolerance_of(dtype: torch.dtype) -> float:
    """Sums in another order; with a cache in few bits, a number near the middle between two may become the other."""
    return 1e-5 if dtype == torch.float32 else 3e-3


def both_ways(model: Transformer, dtype: torch.dtype, prompt: int, room: int, autocast: bool = False) -> None:
    """Steps at a fixed position give the hidden states of steps over an ordinary cache, up to rounding."""
    tokens = torch.randint(61, (3, room))
    ordinary, fixed = model.new_cache(3, dtype=dtype), model.new_cache(3, dtype=dtype)
    context = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    with torch.no_grad(), context:
        for cache in (ordinary, fixed):
            model.hidden_states(tokens[:, :prompt], cache)
        with fixed.fixed(room):
            for i in range(prompt, room):
                fixed.reserve(1)
                out, expected = (model.hidden_states(tokens[:, i : i + 1], cache) for cache in (fixed, ordinary))
                assert off(out, expected) < (0.05 if autocast else tolerance_of(dtype))
        assert fixed.length == ordinary.length == room


@each_kind
@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_are_those_over_an_ordinary_cache(kind, dtype):
    both_ways(model_of(kind), dtype, prompt=5, room=20)


@pytest.mark.parametrize("kind", ["mla", "mha", "gqa", "mqa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_in_half_precision_too(kind, dtype):
    both_ways(model_of(kind), dtype, prompt=5, room=20, autocast=True)


@pytest.mark.parametrize("kind", ["mla", "gqa"])
def test_with_yarn(kind):
    both_ways(model_of(kind, yarn=YarnConfig(factor=4.0)), torch.float32, prompt=1, room=24)


@settings(max_examples=10)
@given(prompt=st.integers(1, 23), room=st.integers(1, 24), absorb=st.booleans())
def test_with_any_room_on_either_path(prompt, room, absorb):
    model = model_of("mla")
    for block in model.blocks:
        block.attention.absorbing_is_cheaper = lambda queries, keys: absorb
    both_ways(model, torch.float32, min(prompt, room), room)


def test_afterwards_it_is_an_ordinary_cache_again():
    model, tokens = model_of("mla"), torch.randint(61, (2, 20))
    cache = model.new_cache(2)
    with torch.no_grad():
        model.hidden_states(tokens[:, :7], cache)
        with cache.fixed(10):
            for token in tokens[:, 7:10].split(1, dim=1):
                cache.reserve(1)
                model.hidden_states(token, cache)
        torch.testing.assert_close(
            model.hidden_states(tokens[:, 10:], cache), model.hidden_states(tokens)[:, 10:], rtol=1e-4, atol=1e-4
        )


def test_no_token_beyond_the_room():
    cache = model_of("mla").new_cache(1, 6)
    with cache.fixed(9):
        assert cache.layers[0].room == 6
        cache.reserve(6)
        with pytest.raises(ValueError, match="room for 6 tokens: 6 are stored, 7 needed"):
            cache.reserve(1)
    assert cache.length == 6


def test_what_the_room_held_before_is_not_seen():
    """Not even where it is no number: a weight of zero times that would be none either."""
    model, tokens = model_of("gqa"), torch.randint(61, (1, 3))
    cache = model.new_cache(1, 8)
    for layer in cache.layers:
        for tensor in layer.tensors:
            tensor.fill_(float("nan"))
    with torch.no_grad(), cache.fixed(8):
        for i, token in enumerate(tokens.split(1, dim=1)):
            out = model.hidden_states(token, cache)
            torch.testing.assert_close(out, model.hidden_states(tokens[:, : i + 1])[:, -1:], rtol=1e-4, atol=1e-4)


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_one_graph_serves_every_length(kind, dtype):
    """Here it is captured and not compiled, which takes long."""
    model, tokens = model_of(kind, seq_len=60), torch.randint(61, (2, 55))
    torch.compiler.reset()
    counters.clear()
    step = torch.compile(model.hidden_states, fullgraph=True, backend="eager")
    ordinary, cache = model.new_cache(2, dtype=dtype), model.new_cache(2, dtype=dtype)
    with torch.no_grad():
        for either in (ordinary, cache):
            model.hidden_states(tokens[:, :5], either)
        with cache.fixed(55):
            for token in tokens[:, 5:].split(1, dim=1):
                out = step(token, cache)
                assert off(out, model.hidden_states(token, ordinary)) < tolerance_of(dtype)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mla", "gqa"])
def test_compiled_it_writes_into_the_cache_and_copies_none_of_it(monkeypatch, kind):
    """The kernel of a GPU, here in Triton's interpreter, reads the tensors of the cache themselves."""
    pytest.importorskip("triton")
    reads, attend = [], gpu_kernel.split_attention
    monkeypatch.setattr(gpu_kernel, "split_attention", lambda *call: reads.append(call[1]) or attend(*call))
    monkeypatch.setattr(gpu_kernel, "_serves", lambda q, width: q.size(2) == 1)
    model, tokens = model_of(kind), torch.randint(61, (2, 9))
    torch.compiler.reset()
    step = torch.compile(model.hidden_states, fullgraph=True, dynamic=True)
    cache = model.new_cache(2)
    with torch.no_grad():
        model.hidden_states(tokens[:, :5], cache)
        with cache.fixed(20):
            stepped = torch.cat([step(token, cache) for token in tokens[:, 5:].split(1, dim=1)], dim=1)
        assert off(stepped, model.hidden_states(tokens)[:, 5:]) < 1e-4
    assert [k.data_ptr() for k in reads] == 4 * [layer.tensors[0].data_ptr() for layer in cache.layers]


@each_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("by_kernel", [True, False])
def test_a_step_stays_on_the_device(monkeypatch, kind, dtype, by_kernel):
    """The meta device stands for a GPU: it has no elements, and its tensors do not mix with a CPU's."""
    if by_kernel:
        monkeypatch.setattr(gpu_kernel, "_serves", lambda q, width: True)
    model = model_of(kind).to("meta")
    cache = model.new_cache(2, 24, dtype)
    token = torch.zeros(2, 1, dtype=torch.int64, device="meta")
    with torch.no_grad(), cache.fixed(24), OnTheDevice() as ops:
        assert model(token, cache=cache).is_meta
    assert ops.count > 50
