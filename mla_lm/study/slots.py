"""What a study's runs share this machine by: how many at once, on which devices, with how many threads."""

import os
from dataclasses import dataclass

import torch

from mla_lm.hardware import (
    DTYPES,
    choose_accelerator,
    choose_precision,
    matmul_flops_per_second,
    memory_bytes,
    processor,
)
from mla_lm.model.memory import training_memory
from mla_lm.study.declaration import StudyConfig
from mla_lm.study.planned_rows import PlannedRow

PROCESS_BYTES = 2**30  # that a run takes besides what `training_memory` counts


@dataclass
class Slots:
    """The places for runs at work at once.

    Attributes:
        environments: of each place, the variables that its process gets
        threads: of each process
        device: cpu, cuda or mps
        precision: by Lightning's name
    """

    environments: list[dict[str, str]]
    threads: int
    device: str
    precision: str

    def __len__(self) -> int:
        return len(self.environments)

    def __str__(self) -> str:
        processes = f"{len(self)} {'run' if len(self) == 1 else 'runs'} at once"
        threads = f"{self.threads} {'thread' if self.threads == 1 else 'threads'} each"
        return f"{processes} on {self.device} in {self.precision}, {threads}"

    def machine(self) -> tuple[str, int | None]:
        """Processor and threads, by which results may differ; on a GPU threads change nothing."""
        return processor(self.device), self.threads if self.device == "cpu" else None

    def flops_per_second(self) -> float:
        """Of matrix products with the threads of one place."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            return matmul_flops_per_second(self.device, self.precision)
        finally:
            torch.set_num_threads(before)


def slots_here(study: StudyConfig, rows: list[PlannedRow]) -> Slots:
    """One place for each GPU, else as many as the cores and the memory allow.

    Runs on a CPU get one thread each: a second thread makes a small model's run less than twice as fast.

    Raises:
        UserError: the device that the study asks for is not there.
    """
    trainer = rows[0].config.trainer
    device, _ = choose_accelerator(trainer.accelerator)
    precision, _ = choose_precision(trainer.precision, device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpus = visible_gpus() if device == "cuda" else []
    if gpus:
        used = gpus[: study.processes]
        threads = study.threads or max(1, cores // len(used))
        places = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in used]
    else:
        threads = study.threads or 1
        places = [{} for _ in range(study.processes or max(1, min(cores // threads, _fitting(rows, precision))))]
    threads_of = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    return Slots([{**place, **threads_of} for place in places], threads, device, precision)


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may name one by one."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


def _fitting(rows: list[PlannedRow], precision: str) -> int:
    """How many runs of the largest row the machine's memory holds."""
    peaks = []
    for row in rows:
        config = row.config
        memory = training_memory(config.model, config.micro_batch_size, DTYPES[precision], "cpu", config.optimizer.kind)
        peaks.append(memory.peak(config.model.activation_checkpointing, config.accumulation))
    return int(memory_bytes() // (max(peaks) + PROCESS_BYTES))
