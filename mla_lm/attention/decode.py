"""Attention of one new token to a cache, by a C++ kernel of our own (decode.cpp), for compiled steps on a CPU.

PyTorch's fused kernel has no use for a key that many query heads share: with six rows of queries over one key, as in
absorbed MLA, it takes about twice as long.
"""

import ctypes
import functools
import hashlib
import platform
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from mla_lm.errors import UserError

SOURCE = Path(__file__).with_suffix(".cpp")
LANES = 16  # what head sizes must be a multiple of
FUNCTIONS = {torch.float32: "attend_fp32", torch.bfloat16: "attend_bf16"}


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether this is for the kernel: a compiled step, whose compiler can make the kernel too, with one query."""
    inference = torch.compiler.is_compiling() and not torch.is_grad_enabled() and q.size(2) == 1
    known = k.device.type == "cpu" and k.dtype in FUNCTIONS
    return inference and known and k.size(3) % LANES == v.size(3) % LANES == 0


@torch.library.custom_op("mla_lm::attend_to_all", mutates_args=())
def attend_to_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T) v, each query seeing every key.

    Args:
        q: (B, H_kv, rows, D) fp32, scaled
        k: (B, H_kv, S, D) fp32 or bf16
        v: (B, H_kv, S, D_v) of the same dtype

    Returns:
        (B, H_kv, rows, D_v) fp32
    """
    q, out = q.contiguous(), q.new_empty(*q.shape[:3], v.size(3))
    sizes = (ctypes.c_long * 12)(*q.shape[:3], *k.shape[2:], v.size(3), *k.stride()[:3], *v.stride()[:3])
    q_data, k_data, v_data, out_data = (ctypes.c_void_p(t.data_ptr()) for t in (q, k, v, out))
    getattr(_library(), FUNCTIONS[k.dtype])(q_data, k_data, v_data, sizes, out_data)
    return out


@attend_to_all.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(*q.shape[:3], v.size(3))


@functools.cache
def _library() -> ctypes.CDLL:
    """The kernel, compiled for this very CPU the first time and kept beside what else torch keeps.

    Raises:
        UserError: it cannot be compiled or kept.
    """
    from mla_lm.hardware import cpp_compiler  # which not every system has all modules for

    arm = platform.machine() in ("arm64", "aarch64")
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]  # Apple's compiler has none: one thread
    flags = ["-O3", "-std=c++17", "-shared", "-fPIC", "-mcpu=native" if arm else "-march=native", *openmp]
    info = Path("/proc/cpuinfo")
    features = [s for s in (info.read_text().splitlines() if info.exists() else []) if s.lower().startswith("f")][:1]
    key = hashlib.sha256(repr((cpp_compiler(), flags, features)).encode() + SOURCE.read_bytes()).hexdigest()[:16]
    path = Path(torch.hub.get_dir()).with_name("mla_lm") / f"{key}.so"
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=path.parent) as temporary:
                built = Path(temporary) / path.name
                command = [cpp_compiler(), *flags, str(SOURCE), "-o", str(built)]
                subprocess.run(command, check=True, capture_output=True, text=True)
                built.replace(path)
        return ctypes.CDLL(str(path))
    except subprocess.CalledProcessError as error:
        raise UserError(
            f"{cpp_compiler()} does not compile {SOURCE}: {error.stderr.strip().splitlines()[0]}"
        ) from error
    except OSError as error:
        raise UserError(f"{path} cannot be made: {error}; TORCH_HOME names another folder") from error
