"""Attention of one new token over a cache by our own C++ kernel (cpu_kernel.cpp), for compiled steps on a CPU.

PyTorch's fused kernel gains nothing when many query heads share a key, as in absorbed MLA. This kernel reads such a key
once for all of them, and an int8 cache as stored, which the others would have to convert first.
"""

import ctypes
import functools
import hashlib
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from mla_lm.errors import UserError

SOURCE = Path(__file__).with_suffix(".cpp")
HEADERS = [SOURCE.with_name(name) for name in ("cpu_products.h", "cpu_vectors.h")]
LANES = 16  # head sizes must be a multiple of this
DTYPES = (torch.float32, torch.bfloat16)  # of queries, and of a cache that is not int8
WIDEST = 1024  # int8 key: sums of its products fit into 32 bits
Sizes = ctypes.c_long * 19  # those of `Sizes` in cpu_kernel.cpp, in its order
Pointers = ctypes.c_void_p * 4  # those of `Cache` there


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernel serves this call; shapes are as in `causal_attention`."""
    return q.dtype == k.dtype and _serves(q, k.size(3), v.size(3))


def takes_int8(q: Tensor, width: int, value_width: int) -> bool:
    """Whether the kernel serves the queries (B, H, T, D) over an int8 cache with keys and values of these widths."""
    return width <= WIDEST and _serves(q, width, value_width)


def _serves(q: Tensor, width: int, value_width: int) -> bool:
    """Whether this is one query on a CPU, in a compiled step without gradients, over keys and values of such widths.

    The kernel is built by the C++ compiler that torch.compile uses, so a compiled step can rely on having one.
    """
    inference = torch.compiler.is_compiling() and not torch.is_grad_enabled() and q.size(2) == 1
    return inference and q.device.type == "cpu" and q.dtype in DTYPES and width % LANES == value_width % LANES == 0


def attend_to_all(
    q: Tensor, k: Tensor, v: Tensor, k_scales: Tensor | None = None, v_scales: Tensor | None = None
) -> Tensor:
    """softmax(q k^T) v, where each query sees every key.

    Sums are accumulated in fp32. With bf16 inputs on a CPU that has bf16 product instructions, the softmax weights are
    rounded to bf16, as in PyTorch's kernel. Over int8 on a CPU that has integer product instructions (AVX512-VNNI),
    queries and softmax weights are rounded to 1 / 16,000 of the largest in a row or in 32 keys, and products are exact.

    Args:
        q: (B, H_kv, rows, D), fp32 or bf16, already scaled; the query heads that share a key head are its rows
        k: (B, H_kv, S, D), of the same dtype or int8
        v: (B, H_kv, S, D_v), of the same dtype as k
        k_scales: of int8 keys, (B, H_kv, S, 1) bf16, or (B, H_kv, S, 2): of the first D_v columns, and of the others
        v_scales: of int8 values, (B, H_kv, S, 1) bf16

    Returns:
        (B, H_kv, rows, D_v) fp32
    """
    if k_scales is not None:
        q = q.float()
    return torch.ops.mla_lm.attend_to_all.default(q, k, v, k_scales, v_scales)


def _attend_to_all(q: Tensor, k: Tensor, v: Tensor, k_scales: Tensor | None, v_scales: Tensor | None) -> Tensor:
    q, out = q.contiguous(), _empty(q, k, v)
    batch, heads, rows, dim = q.shape
    tensors = (k, v) if k_scales is None or v_scales is None else (k, v, k_scales, v_scales)
    first_part = v.size(3) if k_scales is not None and k_scales.size(3) == 2 else dim
    strides = [stride for tensor in tensors for stride in tensor.stride()[:3]]
    sizes = Sizes(batch, heads, rows, k.size(2), dim, v.size(3), first_part, *strides)
    _functions()[k.dtype](q.data_ptr(), Pointers(*(t.data_ptr() for t in tensors)), sizes, out.data_ptr())
    return out


def _empty(q: Tensor, k: Tensor, v: Tensor, k_scales: Tensor | None = None, v_scales: Tensor | None = None) -> Tensor:
    return q.new_empty(*q.shape[:3], v.size(3), dtype=torch.float32)


# `torch.library.custom_op` would add 10 microseconds to a call that takes 50.
OPERATORS = torch.library.Library("mla_lm", "DEF")
OPERATORS.define("attend_to_all(Tensor q, Tensor k, Tensor v, Tensor? k_scales, Tensor? v_scales) -> Tensor")
OPERATORS.impl("attend_to_all", _attend_to_all, "CPU")
torch.library.register_fake("mla_lm::attend_to_all", _empty, lib=OPERATORS)


@functools.cache
def _functions() -> dict[torch.dtype, Callable]:
    """The kernel function for each dtype of keys and values."""
    library = _library()
    functions = {
        torch.float32: library.attend_fp32,
        torch.bfloat16: library.attend_bf16,
        torch.int8: library.attend_int8,
    }
    for function in functions.values():
        function.argtypes, function.restype = [ctypes.c_void_p, Pointers, Sizes, ctypes.c_void_p], None
    return functions


def _library() -> ctypes.CDLL:
    """Load the kernel's library, which is compiled for this CPU on first use and kept in `code_folder`.

    Raises:
        UserError: the kernel cannot be compiled or stored, or another user could have replaced it.
    """
    # Imported here because not every system has all the modules that these need.
    from mla_lm.compiled_code import code_folder
    from mla_lm.files import check_private
    from mla_lm.hardware import cpp_compiler

    arm = platform.machine() in ("arm64", "aarch64")
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]  # Apple's compiler lacks OpenMP: one thread
    flags = ["-O3", "-std=c++17", "-shared", "-fPIC", "-mcpu=native" if arm else "-march=native", *openmp]
    key = hashlib.sha256(repr((cpp_compiler(), flags, _cpu_features())).encode())
    for file in (SOURCE, *HEADERS):
        key.update(file.read_bytes())
    path = code_folder() / f"{key.hexdigest()[:16]}.so"
    try:
        if not path.exists():
            with TemporaryDirectory(dir=path.parent) as temporary:  # its name cannot be guessed
                built = Path(temporary) / path.name
                command = [cpp_compiler(), *flags, str(SOURCE), "-o", str(built)]
                subprocess.run(command, check=True, capture_output=True, text=True)
                built.chmod(0o700)  # whatever the umask is
                built.replace(path)
        check_private(path)
        return ctypes.CDLL(str(path))
    except subprocess.CalledProcessError as error:
        raise UserError(
            f"{cpp_compiler()} does not compile {SOURCE}: {error.stderr.strip().splitlines()[0]}"
        ) from error
    except OSError as error:
        raise UserError(
            f"{path} cannot be made or loaded: {error}\n"
            "  Delete it if it is there, or set TORCH_HOME to a folder that can be written."
        ) from error


def _cpu_features() -> str:
    """The CPU's instruction-set flags as Linux lists them, since different machines may share the code folder."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
