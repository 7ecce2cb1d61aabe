"""The C++ kernel that compiled steps attend to a cache with."""

import ctypes
import functools
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mla_lm import AttentionConfig, Transformer, TransformerConfig
from mla_lm.attention import cpu_kernel
from mla_lm.attention.kv_cache import LARGEST, dequantize, quantize
from mla_lm.attention.sdpa import causal_attention
from mla_lm.errors import UserError
from mla_lm.hardware import cpp_compiler
from tests.test_files import ANOTHER_USER, mode, needs_root

needs_compiler = pytest.mark.skipif(shutil.which(cpp_compiler()) is None, reason="no C++ compiler")


FUNCTIONS = cpu_kernel._functions.__wrapped__
on_every_cpu = pytest.mark.parametrize("without", [None, "-mno-avx512bf16", "-mno-avx512f"])


@contextmanager
def on_a_cpu(without: str | None) -> Iterator[None]:
    """The kernel as it is called on this CPU, or on one that lacks instructions."""
    if without and platform.machine() != "x86_64":
        pytest.skip("instructions of x86-64")
    with pytest.MonkeyPatch.context() as patch:
        if without:
            patch.setattr(cpu_kernel, "_functions", lambda: functions_without(without))
        yield


@functools.cache
def functions_without(flag: str) -> dict:
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        library = f"{folder}/decode.so"
        flags = ("-O1", "-std=c++17", "-shared", "-fPIC", "-march=native", flag)
        subprocess.run([cpp_compiler(), *flags, str(cpu_kernel.SOURCE), "-o", library], check=True)
        patch.setattr(cpu_kernel, "_library", lambda: ctypes.CDLL(library))
        return FUNCTIONS()


@needs_compiler
@on_every_cpu
@settings(max_examples=60)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    rows=st.integers(1, 20),
    keys=st.integers(1, 600),
    dims=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    spread=st.sampled_from([0.1, 1.0, 5.0]),
    seed=st.integers(0, 2**31),
)
def test_equals_softmax_written_out(without, batch, heads, rows, keys, dims, dtype, spread, seed):
    torch.manual_seed(seed)
    dim, value_dim = (cpu_kernel.LANES * n for n in dims)
    q = (spread * dim**-0.5 * torch.randn(batch, rows, heads, dim)).to(dtype).transpose(1, 2)
    k = torch.randn(batch, heads, keys + 5, dim).to(dtype)[:, :, :keys]  # as in a cache with room
    v = k[..., :value_dim] if value_dim <= dim else torch.randn(batch, keys, heads, value_dim).to(dtype).transpose(1, 2)
    weights = (q.double() @ k.double().mT).softmax(-1)
    with on_a_cpu(without):
        off = (cpu_kernel.attend_to_all(q, k, v) - weights @ v.double()).abs()
    rounding = 1e-4 if dtype == torch.float32 else 2**-8  # of each weight
    assert (off <= rounding * (weights @ v.double().abs()) + 1e-5).all()


@needs_compiler
@on_every_cpu
@settings(max_examples=60)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    rows=st.integers(1, 16),
    keys=st.integers(1, 600),
    parts=st.lists(st.integers(1, 6), min_size=1, max_size=2),
    own_values=st.integers(0, 6),  # 0: they are the first part of the keys
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    spread=st.sampled_from([0.1, 1.0, 5.0, 50.0]),
    exponents=st.tuples(*[st.integers(-40, 40)] * 2),  # of the keys' parts; the queries have the inverse
    outliers=st.booleans(),
    seed=st.integers(0, 2**31),
)
@example(2, 3, 13, 2, [1, 1], 1, torch.float32, 1.0, (20, 0), True, 756)
def test_int8_equals_softmax_on_the_dequantised_cache(
    without, batch, heads, rows, keys, parts, own_values, dtype, spread, exponents, outliers, seed
):
    """Within what the rounding of queries and weights can change.

    The elements of a query are off by half a step, so a score is off by as much of the sum of the key's magnitudes. Of
    32 weights times scales, each is off by 1 / 33,000 of the largest, so their sum by at most 1 / 1,000 of it. Weights
    below the smallest normal number of fp32 become that number.
    """
    torch.manual_seed(seed)
    parts = [cpu_kernel.LANES * n for n in parts]
    if own_values and len(parts) == 2:
        parts, own_values = parts[:1], 0
    q = torch.randn(batch, rows, heads, sum(parts)).transpose(1, 2)
    k = torch.randn(batch, heads, keys + 5, sum(parts))  # as in a cache with room
    k[:, :, ::7] = 0
    for piece, query, exponent in zip(k.split(parts, -1), q.split(parts, -1), exponents, strict=False):
        if outliers:
            piece *= 2.0 ** torch.randint(-20, 5, (keys + 5, 1))
            query[..., :1] *= 30
        piece *= 2.0**exponent
        query *= spread * 2.0**-exponent * sum(parts) ** -0.5
    q, (k_int8, k_scales) = q.to(dtype), (t[:, :, :keys] for t in quantize(k, parts))
    v_int8, v_scales = k_int8[..., : parts[0]], k_scales[..., :1]
    if own_values:
        values = torch.randn(batch, keys, heads, cpu_kernel.LANES * own_values).transpose(1, 2)
        v_int8, v_scales = quantize(values * 2.0 ** exponents[1], values.shape[-1:])
    with on_a_cpu(without):
        out = cpu_kernel.attend_to_all(q, k_int8, v_int8, k_scales, v_scales)
    k = dequantize(k_int8, k_scales, parts, torch.float64)
    v = dequantize(v_int8, v_scales, v_int8.shape[-1:], torch.float64)
    weights = (q.double() @ k.mT).softmax(-1)
    score_off = 1e-6 * q.double().abs() @ k.abs().mT
    for query, piece in zip(q.double().split(parts, -1), k.split(parts, -1), strict=True):
        score_off += query.abs().amax(-1, keepdim=True) / 33_000 * piece.abs().sum(-1).unsqueeze(2)
    weight_off = (2 * score_off.amax(-1, keepdim=True)).expm1() + 1e-5
    largest = weights @ v_scales.double() * LARGEST
    tiny = torch.finfo(torch.float32).tiny * v.abs().sum(2, keepdim=True)
    allowed = weight_off * (weights @ v.abs()) + (1 + weight_off) * largest / 1000 + 2 * tiny
    assert ((out - weights @ v).abs() <= allowed).all()


@needs_compiler
@on_every_cpu
def test_int8_of_zeros(without):
    values, scales = quantize(torch.zeros(1, 1, 40, 48), (32, 16))
    with on_a_cpu(without):
        for q in (torch.zeros(1, 1, 3, 48), torch.randn(1, 1, 3, 48)):
            assert not cpu_kernel.attend_to_all(q, values, values[..., :32], scales, scales[..., :1]).any()


@needs_compiler
def test_is_an_operator_that_torch_can_compile():
    q, k = torch.randn(1, 2, 3, 16), torch.randn(1, 2, 9, 16)
    values, scales = quantize(k, (16,))
    torch.library.opcheck(torch.ops.mla_lm.attend_to_all.default, (q, k, k, None, None))
    torch.library.opcheck(torch.ops.mla_lm.attend_to_all.default, (q, values, values, scales, scales))


# without latents and keys of 16 or a multiple of it, no kernel would take them
MLA = {"kv_compressed_dim": 32, "rope_dim": 16, "nope_dim": 16, "value_dim": 16}
KINDS = [AttentionConfig(kind=kind, **MLA) for kind in ("mla", "gla", "mlra")]
KINDS += [AttentionConfig(kind=kind, num_kv_heads=n) for kind, n in (("mha", 4), ("gqa", 2), ("mqa", 1))]


@needs_compiler
@torch.no_grad()
@pytest.mark.parametrize(
    ("attention", "dtype"),
    [*((kind, torch.float32) for kind in KINDS), (KINDS[0], torch.bfloat16)],
    ids=[*(kind.kind for kind in KINDS), "mla_bf16"],
)
def test_one_compiled_step_reads_int8_as_stored_at_every_length(attention, dtype):
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(2, 64, 4, 64, 64, attention, vocab_size=100)).to(dtype).eval()
    tokens, graphs = torch.randint(100, (2, 60)), []

    def decoded(step) -> torch.Tensor:
        cache = model.new_cache(2, 64, torch.int8)
        model(tokens[:, :3], cache=cache)
        return torch.cat([step(token, cache=cache) for token in tokens[:, 3:].split(1, 1)], 1)

    compiled = torch.compile(
        model.forward, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True, dynamic=True
    )
    torch.compiler.reset()
    tolerance = 1e-3 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(decoded(compiled), decoded(model), rtol=tolerance, atol=tolerance)
    assert len(graphs) == 1
    kernels = [node for node in graphs[0].graph.nodes if node.target is torch.ops.mla_lm.attend_to_all.default]
    assert len(kernels) == 2  # in both layers


@needs_compiler
@pytest.mark.parametrize("dtype", cpu_kernel.DTYPES)
def test_threads_do_not_change_the_result(dtype):
    q, k = torch.randn(1, 1, 6, 32, dtype=dtype), torch.randn(1, 1, 1000, 32, dtype=dtype)
    outs = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        outs.append(cpu_kernel.attend_to_all(q, k, k))
    torch.set_num_threads(1)
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


@pytest.mark.parametrize(
    ("dtype", "queries", "dim", "taken"),
    [
        (torch.float32, 1, 32, True),
        (torch.bfloat16, 1, 32, True),
        (torch.float16, 1, 32, False),
        (torch.float32, 2, 32, False),
        (torch.float32, 1, 24, False),
    ],
)
def test_which_compiled_steps_take_it(dtype, queries, dim, taken):
    """Of the others PyTorch's kernel takes care, as of every step that is not compiled."""
    q, k = torch.randn(1, 4, queries, dim, dtype=dtype), torch.randn(1, 1, 40, dim, dtype=dtype)
    graphs = []
    compiled = torch.compile(causal_attention, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True)
    torch.compiler.reset()
    with torch.no_grad():
        torch.testing.assert_close(compiled(q, k, k, 0.3), causal_attention(q, k, k, 0.3), rtol=0.02, atol=0.02)
    names = {node.target for node in graphs[0].graph.nodes}
    assert (torch.ops.mla_lm.attend_to_all.default in names) == taken


@needs_compiler
def test_a_compiler_that_fails(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(cpu_kernel, "SOURCE", tmp_path / "cpu_kernel.cpp")
    cpu_kernel.SOURCE.write_text("int attend( {")
    with pytest.raises(UserError, match="does not compile"):
        cpu_kernel._library()
    assert not list((tmp_path / "mla_lm").iterdir())


@needs_compiler
def test_a_folder_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="TORCH_HOME"):
        cpu_kernel._library()


@needs_compiler
@on_every_cpu
@pytest.mark.parametrize("dtype", cpu_kernel.DTYPES)
@pytest.mark.parametrize("at", [300, 498])
def test_scores_far_apart(without, dtype, at):
    """Only the key with the largest score counts, wherever it is, and no exponential overflows."""
    k = torch.zeros(1, 1, 499, 16, dtype=dtype)
    k[0, 0, :, 0] = -1000.0
    k[0, 0, at, 0] = 1000.0
    v = torch.randn(1, 1, 499, 16).to(dtype)
    with on_a_cpu(without):
        out = cpu_kernel.attend_to_all(torch.eye(16, dtype=dtype)[:1].view(1, 1, 1, 16), k, v)
    torch.testing.assert_close(out[0, 0, 0], v[0, 0, at].float())


@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="names of Linux on x86-64")
def test_the_kept_kernel_is_of_this_kind_of_cpu():
    """Or a machine that shares the folder would run instructions that it does not have."""
    assert {"sse2", "fpu"} <= set(cpu_kernel._cpu_features().split())


# where it is kept: nothing that is run is loaded from where others can put theirs


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    """The folder that it is kept in, of a user with the worst of umasks."""
    home, before = tmp_path_factory.mktemp("home"), os.umask(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(home / "torch"))
        cpu_kernel._library()
    os.umask(before)
    return home / "torch"


@pytest.fixture
def kernel(kept, tmp_path, monkeypatch) -> Path:
    """It as it is kept, a copy for each test."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    shutil.copytree(kept, tmp_path / "torch")
    return next((tmp_path / "torch" / "mla_lm").iterdir())


@needs_compiler
def test_the_kernel_is_kept_privately(kernel):
    cpu_kernel._library()
    assert mode(kernel) == mode(kernel.parent) == 0o700
    assert list(kernel.parent.iterdir()) == [kernel]


@needs_compiler
@pytest.mark.parametrize("what", ["file", "folder", "folder above"])
def test_a_kernel_that_others_can_write_is_not_loaded(kernel, what):
    kernel.write_bytes(b"theirs")  # which would be an error of the loader
    place = {"file": kernel, "folder": kernel.parent, "folder above": kernel.parent.parent}[what]
    place.chmod(0o777)
    with pytest.raises(UserError, match="can be written by others"):
        cpu_kernel._library()


@needs_compiler
@needs_root
@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_kernel_of_another_user_is_not_loaded(kernel, what):
    os.chown(kernel if what == "file" else kernel.parent, ANOTHER_USER, -1)
    with pytest.raises(UserError, match="belongs to another user"):
        cpu_kernel._library()
