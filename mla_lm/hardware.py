"""What the machine offers: device, precision, whether compiling pays, and the speed of matrix products."""

import functools
import importlib.util
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from mla_lm.compiled_code import prepare_folder
from mla_lm.errors import UserError

DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16, "32-true": torch.float32}
COMPILE_SECONDS = {"cpu": 50.0, "cuda": 40.0}  # measured for a small model's training step; larger ones take more
COMPILE_WORTH = {"cpu": 8, "cuda": 3}  # longer runs than this many times that gain, 10 to 20% of a step on a CPU
UTILIZATION = 0.45  # share of the matrix-product peak that an eager step reaches; for estimates only


def choose_accelerator(wanted: str) -> tuple[str, str]:
    """Choose the device type to train on (cpu, cuda or mps); return it and the reason.

    Raises:
        UserError: the machine lacks the wanted one.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        best = next(device for device, is_there in there.items() if is_there)
        return best, "the best device there is"
    device = {"gpu": "cuda"}.get(wanted, wanted)
    if not there[device]:
        raise UserError(
            f"trainer.accelerator={wanted}: this machine has none; trainer.accelerator=auto takes what it has"
        )
    return device, "as configured"


def choose_precision(wanted: str, device: str) -> tuple[str, str]:
    """Choose the precision to train in; return Lightning's name for it and the reason.

    Raises:
        UserError: fp16 on a CPU, where there is no fast fp16.
    """
    if wanted == "16-mixed" and device == "cpu":
        raise UserError("trainer.precision=16-mixed needs a GPU; on a CPU take bf16-mixed or 32-true")
    if wanted != "auto":
        return wanted, "as configured"
    if device == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16-mixed", "this GPU has bf16 matrix units"
        return "16-mixed", "this GPU has no bf16; fp16 with loss scaling"
    if device == "mps":
        return "bf16-mixed", "Apple GPU"
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return "bf16-mixed", "this CPU has bf16 instructions"
    return "32-true", "this CPU has no bf16 instructions, and emulating them is slower"


def take_own_gpu() -> None:
    """Select the GPU that Lightning will give this process; by default, every process would use the first.

    Raises:
        UserError: there are more processes than GPUs.
    """
    rank, gpus = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0))), torch.cuda.device_count()
    if rank >= gpus:
        raise UserError(f"LOCAL_RANK={rank}, but this machine has {gpus} GPUs: start one process for each")
    torch.cuda.set_device(rank)


def choose_products(device: str, precision: str) -> str:
    """Use TF32 for the matrix products of an fp32 run where the GPU has it; return a note on that, or "".

    TF32 rounds factors to 10 bits, sums in fp32, and is several times as fast. NVIDIA_TF32_OVERRIDE=0 in the
    environment keeps NVIDIA's libraries from it.
    """
    tf32 = device == "cuda" and precision == "32-true" and torch.cuda.is_tf32_supported()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")  # always: an earlier job may have set it
    return "; products in training are TF32, which this GPU is fast in" if tf32 else ""


def runs_triton(device: torch.device) -> bool:
    """Whether our Triton kernels run on this device."""
    return device.type == "cuda" and triton_failure() is None


@functools.cache
def triton_failure() -> str | None:
    """Why our Triton kernels do not run on this machine's GPU; None: they do."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if torch.version.hip is not None:
        return "on AMD's GPUs they have not been tried"
    if torch.cuda.get_device_capability() < (8, 0):
        return "the GPU is older than Ampere"
    import triton

    try:
        _ = triton.runtime.driver.active.utils  # pyright: ignore[reportAttributeAccessIssue] - built by a C compiler
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        return f"Triton does not work here: {' '.join(str(error).split())}"
    return None


def choose_kernels(device: str) -> list[str]:
    """What a GPU runs in PyTorch's place: a line, or none on another device."""
    if device != "cuda":
        return []
    failure = triton_failure()
    return [f"kernels     {f'of PyTorch alone ({failure})' if failure else 'our own for the loss and for decoding'}"]


def choose_compile(
    wanted: bool | None, device: str, seconds_at_peak: float, by_document: bool = False
) -> tuple[bool, str]:
    """Decide whether to compile the network; return that and the reason.

    Args:
        seconds_at_peak: time that the run's FLOPs would take at the rate of a large matrix product
        by_document: whether attention is called for each document separately; their lengths differ in every batch

    Raises:
        UserError: compiling is wanted together with such calls, or torch.compile does not work here.
    """
    if by_document and wanted:
        raise UserError(
            "compile=true can be combined with data.document_mask only in half precision on a GPU from Ampere on, "
            "with heads of at most 192. Elsewhere attention is called for each document, and their lengths change "
            "with every batch: leave compile out"
        )
    if by_document:
        return False, "attention is called for each document, and they have other lengths in every batch"
    if wanted:
        check_compiler(device, "compile=true")
    if wanted is not None:
        return wanted, "as configured"
    if device not in COMPILE_SECONDS:
        return False, "not tried on this device"
    cost, estimated_seconds = COMPILE_SECONDS[device], seconds_at_peak / UTILIZATION
    if estimated_seconds < COMPILE_WORTH[device] * cost:
        return False, f"compiling takes about {cost:.0f} s, the run about {estimated_seconds:.0f} s"
    if failure := compiler_failure(device):
        return False, f"it would pay, but torch.compile does not work: {failure}"
    return True, f"the run takes about {estimated_seconds / 60:.0f} minutes"


def cpp_compiler() -> str:
    """The program with which torch compiles C++; it may be missing."""
    return os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")


def compiler_failure(device: str) -> str | None:
    """Compile one operation, and return in one line why torch.compile does not work here; None if it does.

    A compiler that exists may still lack Python's headers, or a folder for its output. (If torch has this operation in
    its cache, the compiler is not run.)
    """
    if device == "cpu" and shutil.which(cpp_compiler()) is None:
        return f"there is no C++ compiler {cpp_compiler()}"
    try:
        prepare_folder()
        torch.compile(torch.neg)(torch.ones(8, device=device))
    except (RuntimeError, OSError, UserError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return next((line for line in lines if "error:" in line), " ".join(lines))
    return None


def check_compiler(device: str, option: str) -> None:
    """Raise UserError, naming the option that asks for compiling, if torch.compile does not work."""
    if failure := compiler_failure(device):
        compiler = " a C++ compiler by CXX=," if device == "cpu" else ""
        raise UserError(
            f"{option}, but torch.compile does not work here: {failure}\n"
            f"  Leave the option out, or name{compiler} a folder for its work by TORCHINDUCTOR_CACHE_DIR="
        )


def matmul_flops_per_second(device: str, precision: str) -> float:
    """Measure the FLOP/s of a large matrix product in the run's precision, the peak for model FLOPs utilisation."""
    size = {"cuda": 8192, "mps": 4096}.get(device, 1024)
    a, b = (torch.randn(size, size, device=device).to(DTYPES[precision]) for _ in range(2))
    best = float("inf")
    for _ in range(6):  # the first one warms up
        synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def inference_autocast(device: str, precision: str) -> AbstractContextManager:
    """A context in which the network runs in the same precision as inside Lightning."""
    if precision == "32-true":
        return nullcontext()
    return torch.autocast(device, dtype=DTYPES[precision])


def peak_memory_bytes(device: str) -> int:
    """Peak memory in bytes: allocated on the GPU, or the process's peak resident size on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kibibytes


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a device or the machine ran out of memory."""
    of_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return of_cpu or isinstance(error, torch.OutOfMemoryError | MemoryError)


def memory_bytes(device: str = "cpu") -> int:
    """Total memory of the current GPU or of the machine, in bytes."""
    if device == "cuda":
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def processor(device: str) -> str:
    """Name the processor that a run computes on: the GPU, or the CPU with its family, model and vector instructions.

    On two kinds of CPU the same seed ends in different losses. Virtual machines call several kinds by one name, which
    family and model tell apart.
    """
    if device == "cuda":
        return torch.cuda.get_device_name()
    numbers = [f"{key.split()[-1]} {value}" for key in ("cpu family", "model") if (value := _cpu_info(key))]
    return f"{cpu_name()} ({', '.join([*numbers, torch.backends.cpu.get_cpu_capability()])})"


def cpu_name() -> str:
    """The CPU's name as the system gives it."""
    return _cpu_info("model name") or platform.processor() or platform.machine()


def _cpu_info(key: str) -> str | None:
    """The first value of a key in Linux's /proc/cpuinfo; None where there is none."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (value.strip() for name, _, value in (line.partition(":") for line in lines) if name.strip() == key), None
    )


def synchronize(device: str) -> None:
    """Wait for the work that was started on the device."""
    if device == "cuda":
        torch.cuda.synchronize()
    elif device == "mps":
        torch.mps.synchronize()
