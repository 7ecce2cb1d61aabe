"""Which kernel ran: the fused one for all kinds, sizes and phases, on inputs of the right precision."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from mla_lm.attention import MHA, MLA, MHAConfig, MLAConfig, sdpa
from mla_lm.attention.sdpa import causal_attention

FORWARD = "_scaled_dot_product_flash_attention_for_cpu"
BACKWARD = "_scaled_dot_product_flash_attention_for_cpu_backward"

LAYERS = {
    "mla": lambda: MLA(MLAConfig(32, 4, 12, 10, 4, 64, nope_dim=4)),
    "mla unequal heads, wide key": lambda: MLA(MLAConfig(32, 4, 12, None, 4, 64)),
    "mla unequal heads, wide value": lambda: MLA(MLAConfig(32, 4, 12, None, 4, 64, value_dim=20)),
    "mha": lambda: MHA(MHAConfig(32, 4, 64)),
    "gqa": lambda: MHA(MHAConfig(32, 4, 64, num_kv_heads=2)),
    "mqa": lambda: MHA(MHAConfig(32, 4, 64, num_kv_heads=1)),
}


class AttentionOps(TorchDispatchMode):
    """Names of the attention kernels that ran, the heads of all sequences and the dtypes that they were given, and the
    largest tensor any op made."""

    def __init__(self):
        super().__init__()
        self.names, self.heads, self.dtypes, self.largest, self.softmaxes = [], [], set(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.softmaxes += "softmax" in name
        if "attention" in name:
            self.names.append(name)
            self.heads.append(args[0].size(0) * args[0].size(1))
            self.dtypes |= {a.dtype for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()}
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.numel())
        return out


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("autocast", [False, True])
def test_training_runs_fused_in_both_directions(monkeypatch, kind, autocast):
    monkeypatch.setattr(sdpa, "MOST_PLAIN_KEYS", 0)
    layer, x = LAYERS[kind](), torch.randn(2, 33, 32)
    with AttentionOps() as ops:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = layer(x)
        out.float().sum().backward()
    assert ops.names == [FORWARD, BACKWARD]
    assert ops.softmaxes == 0
    # nothing is promoted to fp32 on the way: what the kernel reads is what autocast asks for (its logsumexp is fp32)
    assert ops.dtypes - {torch.float32} == ({torch.bfloat16} if autocast else set())


@pytest.mark.parametrize("kind", LAYERS)
def test_few_tokens_in_bf16_take_the_plain_path_to_the_same_result(monkeypatch, kind):
    layer, x = LAYERS[kind](), torch.randn(2, 33, 32)
    results = []
    for most in (sdpa.MOST_PLAIN_KEYS, 0):
        monkeypatch.setattr(sdpa, "MOST_PLAIN_KEYS", most)
        layer.zero_grad()
        with AttentionOps() as ops:
            with torch.autocast("cpu", torch.bfloat16):
                out = layer(x)
            out.float().square().sum().backward()
        assert (ops.softmaxes, len(ops.names)) == ((2, 0) if most else (0, 2))
        results.append([out.float(), *(p.grad for p in layer.parameters())])
    for plain, fused_one in zip(*results, strict=True):
        torch.testing.assert_close(plain, fused_one, rtol=0.05, atol=0.02 * fused_one.abs().max().item())


SHAPES = {
    "group": st.integers(1, 4),
    "kv_heads": st.integers(1, 3),
    "dims": st.tuples(st.integers(1, 20), st.integers(1, 20)),
    "seed": st.integers(0, 2**31),
}


@settings(max_examples=40)
@given(**SHAPES, tokens=st.integers(1, 40), block=st.integers(1, 20))
def test_blocks_of_queries_equal_softmax_written_out(group, kv_heads, dims, tokens, block, seed):
    torch.manual_seed(seed)
    q = torch.randn(2, group * kv_heads, tokens, dims[0], requires_grad=True)
    k, v = torch.randn(2, kv_heads, tokens, dims[0]), torch.randn(2, kv_heads, tokens, dims[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sdpa, "QUERIES", block)
        out = sdpa._plain(q, k, v, 0.3)
        with AttentionOps() as ops:
            sdpa._plain(q.detach(), k, v, 0.3)
        assert ops.softmaxes == -(-tokens // block)
        assert 0 < sdpa.stored_scores("cpu", torch.bfloat16, tokens) <= tokens * (tokens + block) / 2
    torch.testing.assert_close(out, written_out(q, k, v), rtol=1e-5, atol=1e-5)
    (slope,), (expected,) = (torch.autograd.grad(o.square().sum(), q) for o in (out, written_out(q, k, v)))
    torch.testing.assert_close(slope, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", LAYERS)
def test_training_never_holds_the_scores(kind):
    layer, x = LAYERS[kind](), torch.randn(1, 64, 32)
    with AttentionOps() as ops:
        layer(x).sum().backward()
    assert ops.largest < 4 * 64 * 64  # the scores of 4 heads


@torch.no_grad()
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("absorb", [False, True])
def test_prefill_and_decoding_run_fused(kind, absorb):
    layer = LAYERS[kind]()
    layer.absorbing_is_cheaper = lambda queries, keys: absorb
    cache = layer.new_cache(2, 64)
    for length, kernels in ((20, 1), (7, 2), (1, 1), (1, 1)):  # prefill, a chunk of it, two steps of decoding
        with AttentionOps() as ops:
            layer(torch.randn(2, length, 32), cache)
        assert ops.names == [FORWARD] * kernels  # of a chunk, the past and itself are attended to apart
        assert ops.softmaxes == 0


def test_autocast_inputs_are_bf16(monkeypatch):
    monkeypatch.setattr(sdpa, "MOST_PLAIN_KEYS", 0)
    for make in LAYERS.values():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), AttentionOps() as ops:
            make()(torch.randn(2, 9, 32))
        assert ops.dtypes == {torch.bfloat16}


def test_no_warning_under_autocast(recwarn):
    torch.set_warn_always(True)  # or only the first of the process would be seen
    for make in LAYERS.values():
        with torch.autocast("cpu", torch.bfloat16):
            make()(torch.randn(2, 9, 32)).float().sum().backward()
    torch.set_warn_always(False)
    assert [str(w.message) for w in recwarn] == []


def written_out(q, k, v):
    """Attention as `causal_attention(q, k, v, 0.3)` defines it."""
    group, queries, keys = q.size(1) // k.size(1), q.size(2), k.size(2)
    scores = 0.3 * q @ k.repeat_interleave(group, 1).mT
    future = torch.arange(keys) > torch.arange(keys - queries, keys)[:, None]
    return scores.masked_fill(future, -torch.inf).softmax(-1) @ v.repeat_interleave(group, 1)


@settings(max_examples=40)
@given(**SHAPES, queries=st.integers(1, 9), past=st.integers(0, 9), gradient=st.booleans())
def test_equals_softmax_written_out(group, kv_heads, dims, queries, past, gradient, seed):
    torch.manual_seed(seed)
    keys = past + queries
    q = torch.randn(2, group * kv_heads, queries, dims[0], requires_grad=gradient)
    k, v = torch.randn(2, kv_heads, keys, dims[0]), torch.randn(2, kv_heads, keys, dims[1])
    out, expected = causal_attention(q, k, v, 0.3), written_out(q, k, v)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    if gradient:
        (slope,), (expected_slope,) = (torch.autograd.grad(o.square().sum(), q) for o in (out, expected))
        torch.testing.assert_close(slope, expected_slope, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize(("batch", "kv_heads"), [(1, 1), (1, 2), (3, 1), (3, 2)])
@pytest.mark.parametrize(("queries", "keys"), [(1, 40), (1, 97), (5, 48)])
def test_keys_are_cut_among_idle_threads(monkeypatch, threads, batch, kv_heads, queries, keys):
    monkeypatch.setattr(sdpa, "LEAST_KEYS", 5)
    torch.set_num_threads(threads)
    q, k = torch.randn(batch, 4, queries, 8), torch.randn(batch, kv_heads, keys + 9, 8)[:, :, :keys]
    with AttentionOps() as ops:
        out = causal_attention(q, k, k, 0.3)
    torch.set_num_threads(1)
    torch.testing.assert_close(out, written_out(q, k, k), rtol=1e-5, atol=1e-5)
    past, heads = keys if queries == 1 else keys - queries, batch * kv_heads
    cuts = 1 if batch > 1 and kv_heads > 1 else max(1, min(threads // heads, past // 5))
    assert ops.heads[0] == cuts * heads
    assert len(ops.names) == 1 + (past % cuts > 0) + (queries > 1)  # what is left over, and the queries' own keys


class LaidOutByToken(TorchDispatchMode):
    """Kernels whose results lie in memory token by token, as on a GPU; whether cuDNN's was allowed when one ran."""

    def __init__(self):
        super().__init__()
        self.cudnn = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ != FORWARD:
            return out
        self.cudnn.append(torch.backends.cuda.cudnn_sdp_enabled())
        return out[0].transpose(1, 2).contiguous().transpose(1, 2), *out[1:]


@pytest.mark.parametrize("value_dim", [8, 5, 11])
def test_one_query_whatever_the_kernels_layout_and_not_by_cudnn(value_dim):
    q = torch.randn(2, 6, 1, 8, requires_grad=True)  # with a gradient it takes the path of a GPU
    k, v = torch.randn(2, 3, 9, 8), torch.randn(2, 3, 9, value_dim)
    assert torch.backends.cuda.cudnn_sdp_enabled()
    with LaidOutByToken() as kernels:
        out = causal_attention(q, k, v, 0.3)
    assert kernels.cudnn == [False]
    assert torch.backends.cuda.cudnn_sdp_enabled()
    torch.testing.assert_close(out, written_out(q, k, v), rtol=1e-5, atol=1e-5)
    compiled = torch.compile(causal_attention, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v, 0.3), out, rtol=1e-5, atol=1e-5)
