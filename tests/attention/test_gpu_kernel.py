"""The Triton kernel that one query attends to a cache with on a GPU, as far as it can be held without one."""

import importlib.util
import re
import subprocess
from collections.abc import Collection

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mla_lm.attention import gpu_kernel, sdpa

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
HOPPER = 90
BF16, INT8 = torch.bfloat16, torch.int8


@pytest.mark.e2e
def test_in_the_interpreter(triton_interpreter):
    triton_interpreter("tests/attention/gpu_kernel_interpreted.py")


@given(programs=st.integers(1, 300), keys=st.integers(1, 100_000), block=st.sampled_from([16, 32, 64, 128]))
def test_splits_cover_the_keys(programs, keys, block):
    splits, length = gpu_kernel.split(programs, keys, block, wanted=264)
    assert (splits - 1) * length < keys <= splits * length
    assert length % block == 0
    assert splits == 1 or programs * splits <= 264
    assert splits <= gpu_kernel.MOST_SPLITS


def test_a_gpu_is_filled():
    assert gpu_kernel.split(1, 131_072, 32, wanted=264)[0] == 128
    assert gpu_kernel.split(32, 8_192, 32, wanted=264)[0] == 8
    assert gpu_kernel.split(1, 60, 32, wanted=264)[0] == 1  # too few keys to split


def test_a_cpu_does_not_take_it():
    q, k = torch.randn(1, 4, 1, 64, dtype=BF16), torch.randn(1, 1, 9, 64, dtype=BF16)
    with torch.no_grad():
        assert not gpu_kernel.takes(q, k, k)
        assert not gpu_kernel.takes_int8(q, 64)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (BF16, 0.03)])
def test_plain_products_where_triton_is_missing(dtype, tolerance):
    q, k = torch.randn(2, 1, 6, 48).to(dtype), torch.randn(2, 1, 300, 48).to(dtype)
    v = k[..., :40]
    expected = (0.1 * q.double() @ k.double().mT).softmax(-1) @ v.double()
    out = sdpa._attend_to_all(q, k, v, 0.1)
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


def compiled(rows: int, dim: int, value_dim: int, cache: torch.dtype, shared: bool = True, most_rows: int = 64):
    """The kernel as compiled for Hopper, for bf16 queries over a cache of one key head."""
    from mla_lm.attention import triton_kernel

    q = torch.empty(1, 1, rows, dim, dtype=BF16, device="meta")
    k, v = (torch.empty(1, 1, 9, width, dtype=cache, device="meta") for width in (dim, value_dim))
    parts = 2 if value_dim < dim else 1
    scales = torch.empty(1, 1, 9, parts, device="meta") if cache == INT8 else None
    fixed, warps = gpu_kernel.constants(q, k, v, scales, shared, most_rows)
    kept = "*i8" if cache == INT8 else "*bf16"
    pointers = {"q": "*bf16", "k": kept, "v": kept, "k_scales": "*bf16", "v_scales": "*bf16"}
    pointers |= {"out": "*fp32", "lse": "*fp32"}
    # Triton finds this out of real arguments: they are multiples of 16, so that loads are wide.
    aligned = {*pointers, "k_batch", "k_head", "k_key", "v_batch", "v_head", "v_key"}
    return for_hopper(triton_kernel.attend, fixed, pointers, aligned, num_warps=warps, num_stages=3)


def for_hopper(function, fixed: dict, pointers: dict[str, str], aligned: Collection[str], **options: int):
    """A Triton function compiled for Hopper; its arguments are constants, pointers and 32-bit integers."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = function.arg_names
    source = ASTSource(
        fn=function,
        signature={name: "constexpr" if name in fixed else pointers.get(name, "i32") for name in names},
        constexprs={(names.index(name),): value for name, value in fixed.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in aligned},
    )
    return triton.compile(source, GPUTarget("cuda", HOPPER, 32), options)


def registers_and_spills(ptx: str, folder) -> tuple[int, int]:
    """Registers of a thread, and the bytes that it stores for want of more."""
    from triton.backends.nvidia import compiler

    (folder / "kernel.ptx").write_text(ptx)
    command = [compiler.get_ptxas(HOPPER).path, "-v", "--gpu-name", f"sm_{HOPPER}a"]
    command += [str(folder / "kernel.ptx"), "-o", str(folder / "kernel.cubin")]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    found = re.search(r"(\d+) bytes spill stores.*Used (\d+) registers", said, re.DOTALL)
    assert found, said
    return int(found[2]), int(found[1])


@needs_triton
@pytest.mark.parametrize(
    ("rows", "dim", "value_dim", "cache", "shared"),
    [
        *((rows, *dims, BF16, True) for rows in (16, 32) for dims in ((576, 512), (416, 384), (288, 256), (80, 64))),
        *((16, *dims, INT8, False) for dims in ((576, 512), (416, 384), (288, 256), (80, 64))),
        (64, 288, 256, BF16, True),
        (64, 416, 384, BF16, True),
        (32, 576, 512, INT8, False),
        (8, 128, 128, BF16, False),  # GQA and MQA
        (16, 256, 256, BF16, False),
        (64, 256, 256, BF16, False),
        (8, 128, 128, INT8, False),
    ],
)
def test_compiles_for_hopper(tmp_path, rows, dim, value_dim, cache, shared):
    kernel = compiled(rows, dim, value_dim, cache, shared)
    ptx = kernel.asm["ptx"]
    assert ".target sm_90a" in ptx
    registers, spilled = registers_and_spills(ptx, tmp_path)
    memory = kernel.metadata.shared
    print(f"{rows} rows, {dim}/{value_dim}, {cache}: {registers} registers, {spilled} bytes spilled, {memory} shared")
    assert spilled == 0
    assert "cp.async" in ptx  # the next block is read while this one is multiplied
    assert memory <= (gpu_kernel.BLOCKS[max(16, rows)][0] or 99 * 1024)  # the least that a GPU from Ampere on has


@needs_triton
def test_the_kernel_that_merges_splits_compiles_for_hopper(tmp_path):
    from mla_lm.attention import triton_kernel

    fixed = {"D_V": 512, "MOST_SPLITS": gpu_kernel.MOST_SPLITS, "BLOCK": 32}
    pointers = dict.fromkeys(("parts", "lse", "out"), "*fp32")
    ptx = for_hopper(triton_kernel.merge, fixed, pointers, pointers).asm["ptx"]
    assert registers_and_spills(ptx, tmp_path)[1] == 0


@needs_triton
def test_of_64_heads_and_the_widest_keys_hardly_anything_is_spilled(tmp_path):
    kernel = compiled(128, 576, 512, BF16)
    registers, spilled = registers_and_spills(kernel.asm["ptx"], tmp_path)
    print(f"64 rows, 576/512: {registers} registers, {spilled} bytes spilled, {kernel.metadata.shared} shared")
    assert spilled <= 128
    assert kernel.metadata.shared <= gpu_kernel.BLOCKS[64][0]
    assert "wgmma" in kernel.asm["ptx"]
