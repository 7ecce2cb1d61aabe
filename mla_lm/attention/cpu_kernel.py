"""Attention of one new token over a cache by our own C++ kernel (cpu_kernel.cpp), for compiled steps on a CPU.

PyTorch's fused kernel gains nothing when many query heads share a key, as in absorbed MLA. This kernel reads such a key
once for all of them.
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
LANES = 16  # head sizes must be a multiple of this
DTYPES = (torch.float32, torch.bfloat16)  # dtypes that it takes
Sizes = ctypes.c_long * 12  # batch, heads, rows, keys, dim, value_dim; strides of k, then of v, without the last


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernel can serve this call: one query on a CPU, in a compiled step without gradients.

    The kernel is built by the C++ compiler that torch.compile uses, so a compiled step can rely on having one.
    """
    inference = torch.compiler.is_compiling() and not torch.is_grad_enabled() and q.size(2) == 1
    known = k.device.type == "cpu" and q.dtype == k.dtype in DTYPES
    return inference and known and k.size(3) % LANES == v.size(3) % LANES == 0


def attend_to_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T) v, where each query sees every key.

    Sums are accumulated in fp32. With bf16 inputs on a CPU that has bf16 product instructions, the softmax weights are
    rounded to bf16, as in PyTorch's kernel.

    Args:
        q: (B, H_kv, rows, D), fp32 or bf16, already scaled; the query heads that share a key head are its rows
        k: (B, H_kv, S, D), of the same dtype
        v: (B, H_kv, S, D_v), of the same dtype

    Returns:
        (B, H_kv, rows, D_v) fp32
    """
    return torch.ops.mla_lm.attend_to_all.default(q, k, v)


def _attend_to_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, out = q.contiguous(), _empty(q, k, v)
    batch, heads, rows, dim = q.shape
    sizes = Sizes(batch, heads, rows, k.size(2), dim, v.size(3), *k.stride()[:3], *v.stride()[:3])
    _functions()[k.dtype](q.data_ptr(), k.data_ptr(), v.data_ptr(), sizes, out.data_ptr())
    return out


def _empty(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(*q.shape[:3], v.size(3), dtype=torch.float32)


# `torch.library.custom_op` would add 10 microseconds to a call that takes 50.
OPERATORS = torch.library.Library("mla_lm", "DEF")
OPERATORS.define("attend_to_all(Tensor q, Tensor k, Tensor v) -> Tensor")
OPERATORS.impl("attend_to_all", _attend_to_all, "CPU")
torch.library.register_fake("mla_lm::attend_to_all", _empty, lib=OPERATORS)


@functools.cache
def _functions() -> dict[torch.dtype, Callable]:
    """The kernel function for each dtype of keys and values."""
    library = _library()
    functions = {torch.float32: library.attend_fp32, torch.bfloat16: library.attend_bf16}
    pointer = ctypes.c_void_p
    for function in functions.values():
        function.argtypes, function.restype = [pointer, pointer, pointer, Sizes, pointer], None
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
    key = hashlib.sha256(repr((cpp_compiler(), flags, _cpu_features())).encode() + SOURCE.read_bytes()).hexdigest()[:16]
    path = code_folder() / f"{key}.so"
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
