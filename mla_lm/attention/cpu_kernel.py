"""Attention of one new token to a cache, by a C++ kernel of our own (cpu_kernel.cpp), for compiled steps on a CPU.

PyTorch's fused kernel has no use for a key that many query heads share, as in absorbed MLA.
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
LANES = 16  # what head sizes must be a multiple of
DTYPES = (torch.float32, torch.bfloat16)  # of q, k and v
Sizes = ctypes.c_long * 12  # batch, heads, rows, keys, dim, value_dim; strides of k, then of v, but for the last


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether this is for the kernel: a compiled step, whose compiler can make the kernel too, with one query."""
    inference = torch.compiler.is_compiling() and not torch.is_grad_enabled() and q.size(2) == 1
    known = k.device.type == "cpu" and q.dtype == k.dtype in DTYPES
    return inference and known and k.size(3) % LANES == v.size(3) % LANES == 0


def attend_to_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T) v, each query seeing every key.

    Sums are of fp32; in bf16 on a CPU with products of bf16 the weights are rounded to it, as PyTorch's kernel does.

    Args:
        q: (B, H_kv, rows, D) fp32 or bf16, scaled
        k: (B, H_kv, S, D) of the same dtype
        v: (B, H_kv, S, D_v) likewise

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


# Not by `torch.library.custom_op`, which adds 10 microseconds to a call that takes 50.
OPERATORS = torch.library.Library("mla_lm", "DEF")
OPERATORS.define("attend_to_all(Tensor q, Tensor k, Tensor v) -> Tensor")
OPERATORS.impl("attend_to_all", _attend_to_all, "CPU")
torch.library.register_fake("mla_lm::attend_to_all", _empty, lib=OPERATORS)


@functools.cache
def _functions() -> dict[torch.dtype, Callable]:
    """The kernel for either dtype of keys and values."""
    library = _library()
    functions = {torch.float32: library.attend_fp32, torch.bfloat16: library.attend_bf16}
    pointer = ctypes.c_void_p
    for function in functions.values():
        function.argtypes, function.restype = [pointer, pointer, pointer, Sizes, pointer], None
    return functions


def _library() -> ctypes.CDLL:
    """The kernel, compiled for this very CPU the first time and kept beside what else torch keeps.

    Raises:
        UserError: it cannot be compiled or kept, or others could have put theirs in its place.
    """
    # which not every system has all modules for
    from mla_lm.compiled_code import code_folder
    from mla_lm.files import check_private
    from mla_lm.hardware import cpp_compiler

    arm = platform.machine() in ("arm64", "aarch64")
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]  # Apple's compiler has none: one thread
    flags = ["-O3", "-std=c++17", "-shared", "-fPIC", "-mcpu=native" if arm else "-march=native", *openmp]
    key = hashlib.sha256(repr((cpp_compiler(), flags, _cpu_features())).encode() + SOURCE.read_bytes()).hexdigest()[:16]
    path = code_folder() / f"{key}.so"
    try:
        if not path.exists():
            with TemporaryDirectory(dir=path.parent) as temporary:  # of a name that nobody can guess
                built = Path(temporary) / path.name
                command = [cpp_compiler(), *flags, str(SOURCE), "-o", str(built)]
                subprocess.run(command, check=True, capture_output=True, text=True)
                built.chmod(0o700)  # whatever the umask
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
    """The instructions that this CPU has, as Linux names them: a folder may be shared by machines of several kinds."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
