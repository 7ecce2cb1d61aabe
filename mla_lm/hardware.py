"""What the machine offers: device, precision, whether compiling pays, and how fast its matrix products are."""

import os
import resource
import shutil
import sys
import time
from contextlib import AbstractContextManager, nullcontext

import torch

from mla_lm.compiled_code import prepare_folder
from mla_lm.errors import UserError

DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16, "32-true": torch.float32}
COMPILE_SECONDS = {"cpu": 50.0, "cuda": 40.0}  # of the training step of a small model, measured; larger ones take more
COMPILE_WORTH = {"cpu": 8, "cuda": 3}  # runs longer than this many times that gain: 10 to 20% of a step on a CPU
UTILIZATION = 0.45  # of the matrix-product peak that an eager step reaches, for estimates only


def choose_accelerator(wanted: str) -> tuple[str, str]:
    """The device type to train on (cpu, cuda or mps), and why.

    Raises:
        UserError: the wanted one is not there.
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
    return device, "as asked"


def choose_precision(wanted: str, device: str) -> tuple[str, str]:
    """Lightning's name of the precision to train in, and why.

    Raises:
        UserError: fp16 on a CPU, where there is no fast fp16.
    """
    if wanted == "16-mixed" and device == "cpu":
        raise UserError("trainer.precision=16-mixed needs a GPU; on a CPU take bf16-mixed or 32-true")
    if wanted != "auto":
        return wanted, "as asked"
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
    """Work on the GPU that Lightning will give this process, and not on the first, as every process would.

    Raises:
        UserError: there are more processes than GPUs.
    """
    rank, gpus = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0))), torch.cuda.device_count()
    if rank >= gpus:
        raise UserError(f"LOCAL_RANK={rank}, but this machine has {gpus} GPUs: start one process for each")
    torch.cuda.set_device(rank)


def choose_products(device: str, precision: str) -> str:
    """Let a run in fp32 multiply in TF32 where a GPU can: factors of 10 bits, sums in fp32, several times the rate.

    NVIDIA_TF32_OVERRIDE=0 in the environment keeps NVIDIA's libraries from it. Returns what to say of it, "" of fp32.
    """
    tf32 = device == "cuda" and precision == "32-true" and torch.cuda.is_tf32_supported()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")  # said in full: another job may have come before
    return "; products in training are TF32, which this GPU is fast in" if tf32 else ""


def choose_compile(
    wanted: bool | None, device: str, seconds_at_peak: float, document_mask: bool = False
) -> tuple[bool, str]:
    """Whether to compile the network, and why.

    Args:
        seconds_at_peak: what the run's FLOPs take at the rate of a large matrix product
        document_mask: attention takes the documents of each batch apart, which have other lengths every time

    Raises:
        UserError: it is wanted together with document_mask, or where torch.compile does not work.
    """
    if document_mask and wanted:
        raise UserError(
            "compile=true does not go with data.document_mask, whose documents have other lengths in every "
            "batch: leave compile out"
        )
    if document_mask:
        return False, "documents have other lengths in every batch"
    if wanted:
        check_compiler(device, "compile=true")
    if wanted is not None:
        return wanted, "as asked"
    if device not in COMPILE_SECONDS:
        return False, "not tried on this device"
    cost, estimated_seconds = COMPILE_SECONDS[device], seconds_at_peak / UTILIZATION
    if estimated_seconds < COMPILE_WORTH[device] * cost:
        return False, f"compiling takes about {cost:.0f} s, the run about {estimated_seconds:.0f} s"
    if failure := compiler_failure(device):
        return False, f"it would pay, but torch.compile does not work: {failure}"
    return True, f"the run takes about {estimated_seconds / 60:.0f} minutes"


def cpp_compiler() -> str:
    """The program that torch compiles C++ with, be it there or not."""
    return os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")


def compiler_failure(device: str) -> str | None:
    """Why torch.compile does not work here, in a line, found by compiling one operation; None where it does.

    A compiler that is there may still lack Python's headers, or a folder for what it makes. (Where torch has kept what
    it made of this operation before, that is found and not the compiler.)
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
    """Raises UserError where the option asks for compiling and torch.compile does not work."""
    if failure := compiler_failure(device):
        compiler = " a C++ compiler by CXX=," if device == "cpu" else ""
        raise UserError(
            f"{option}, but torch.compile does not work here: {failure}\n"
            f"  Leave the option out, or name{compiler} a folder for its work by TORCHINDUCTOR_CACHE_DIR="
        )


def matmul_flops_per_second(device: str, precision: str) -> float:
    """Rate of a large matrix product in the run's precision: the peak that utilisation is measured against."""
    size = {"cuda": 8192, "mps": 4096}.get(device, 1024)
    a, b = (torch.randn(size, size, device=device).to(DTYPES[precision]) for _ in range(2))
    best = float("inf")
    for _ in range(6):  # the first warms up
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def inference_autocast(device: str, precision: str) -> AbstractContextManager:
    """The context to run the network in, outside of Lightning, as it runs within."""
    if precision == "32-true":
        return nullcontext()
    return torch.autocast(device, dtype=DTYPES[precision])


def peak_memory_bytes(device: str) -> int:
    """Peak of the GPU's allocated memory, or the process's peak resident size on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kibibytes


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or this machine had no memory left."""
    of_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return of_cpu or isinstance(error, torch.OutOfMemoryError | MemoryError)


def memory_bytes(device: str = "cpu") -> int:
    """Memory of one GPU, or of the machine."""
    if device == "cuda":
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def synchronize(device: str) -> None:
    """Wait for what was started on the device."""
    if device == "cuda":
        torch.cuda.synchronize()
    elif device == "mps":
        torch.mps.synchronize()
