"""Fills in, once, what a configuration leaves to the machine, the data, and the run's sweep."""

import math
from typing import Any, NamedTuple

import torch

from mla_lm.attention.documents import takes_all_at_once
from mla_lm.attention.fp8 import check_fp8
from mla_lm.config import MICRO_BATCH_TOKENS, SweepJob, TrainConfig, TrainerConfig
from mla_lm.data.store import TokenStore
from mla_lm.data.tokenizer import vocabulary_size
from mla_lm.errors import UserError
from mla_lm.hardware import (
    DTYPES,
    choose_accelerator,
    choose_compile,
    choose_kernels,
    choose_precision,
    choose_products,
    matmul_flops_per_second,
    memory_bytes,
    take_own_gpu,
)
from mla_lm.model.memory import largest_batch
from mla_lm.model.size import ModelSize, model_size
from mla_lm.runs.config_file import changed
from mla_lm.runs.report import human_bytes

ROOM = 0.85  # share of a GPU's memory that training is planned to take; the allocator leaves gaps
CONTEXT_BYTES = 2**30  # that CUDA and its libraries take of it
PARAMETERS_PER_TOKEN = 250  # of a step: nanoGPT trains 124M parameters on half a million tokens at once
LEAST_TOKENS = 2048


class Machine(NamedTuple):
    """What a run computes on."""

    device: str  # cpu, cuda or mps
    precision: str  # by Lightning's name
    memory: int  # of the device in all, in bytes
    reasons: list[str]  # a line for each choice


class Resolved(NamedTuple):
    """A configuration that leaves nothing open; nothing changes it from here on."""

    config: TrainConfig
    size: ModelSize
    device: str  # cpu, cuda or mps
    peak_flops: float  # of all devices together, per second: matrix products, measured in the run's precision
    reasons: list[str]  # a line for each choice


def choose_machine(wanted: TrainerConfig) -> Machine:
    """Take a device and a precision, and prepare this process for them.

    Raises:
        UserError: the device or its precision is not there.
    """
    device, why = choose_accelerator(wanted.accelerator)
    reasons = [f"device      {device} ({why})"]
    if device == "cuda":
        take_own_gpu()
    precision, why = choose_precision(wanted.precision, device)
    reasons.append(f"precision   {precision} ({why}{choose_products(device, precision)})")
    if wanted.fp8:
        check_fp8(device, precision)
    return Machine(device, precision, memory_bytes(device), reasons + choose_kernels(device))


def resolve(config: TrainConfig, machine: Machine, store: TokenStore, job: SweepJob | None = None) -> Resolved:
    """Return a copy of the configuration with everything filled in, and the reasons.

    Args:
        config: checked
        job: of a sweep, where the run is one

    Raises:
        UserError: it contradicts the tokenizer, or asks for a compilation that does not work.
    """
    accelerator = {"cuda": "gpu"}.get(machine.device, machine.device)
    of_machine = {"trainer.accelerator": accelerator, "trainer.precision": machine.precision}
    config = changed(config, of_machine | _of_tokenizer(config, store) | _of_sweep(config, job))
    reasons = list(machine.reasons)
    if config.tokens_per_step is None:
        tokens, why = choose_tokens_per_step(config)
        config = changed(config, {"tokens_per_step": tokens})
        reasons.append(f"step        {tokens:,} tokens ({why})")
    micro_batch_tokens, fits = choose_micro_batch(config, machine.device, machine.precision, machine.memory)
    peak_flops = matmul_flops_per_second(machine.device, machine.precision) * config.world_size
    size = model_size(config.model, config.mean_window_length)
    flops = size.flops_per_token * config.step_tokens * config.trainer.max_steps
    compiled, why = choose_compile(config.compile, machine.device, flops / peak_flops, _by_document(config, machine))
    reasons += [f"micro-batch {fits}", f"compile     {compiled} ({why})"]
    config = changed(config, {"micro_batch_tokens": micro_batch_tokens, "compile": compiled})
    return Resolved(config, size, machine.device, peak_flops, reasons)


def choose_tokens_per_step(config: TrainConfig) -> tuple[int, str]:
    """Choose the tokens of an optimizer step by the size of the model; return them and the reason.

    They are the power of two nearest to the parameters over PARAMETERS_PER_TOKEN, then the nearest multiple of what a
    step must be a multiple of.

    Args:
        config: `model.vocab_size` is set
    """
    parameters, unit = model_size(config.model).parameters, config.model.seq_len * config.world_size
    tokens = max(LEAST_TOKENS, 2 ** round(math.log2(parameters / PARAMETERS_PER_TOKEN)))
    return max(1, round(tokens / unit)) * unit, f"for {parameters:,} parameters"


def choose_micro_batch(config: TrainConfig, device: str, precision: str, memory: int) -> tuple[int, str]:
    """Choose how many tokens at most go through a device at once; return that and a description with the reason.

    On a GPU it is the largest divisor of the device's share of a step for which `training_memory` fits.

    Args:
        config: `model.vocab_size` is set
        memory: of the device in all, in bytes
    """
    if config.micro_batch_tokens is not None:
        return config.micro_batch_tokens, f"at most {config.micro_batch_tokens:,} tokens (as configured)"
    if device != "cuda":
        return MICRO_BATCH_TOKENS, f"at most {MICRO_BATCH_TOKENS:,} tokens (the default on {device})"
    share, seq_len = config.sequences_per_step // config.world_size, config.model.seq_len
    room = int(ROOM * (memory - CONTEXT_BYTES))
    windows = largest_batch(config.model, share, room, DTYPES[precision], device, config.optimizer.kind)
    part = "the whole" if windows == share else f"1/{share // windows}"
    why = f"{part} of a step{' on each GPU' * (config.world_size > 1)}, by the GPU's {human_bytes(memory)}"
    return windows * seq_len, f"{windows * seq_len:,} tokens ({why})"


def _by_document(config: TrainConfig, machine: Machine) -> bool:
    """Whether attention is called for each document separately."""
    device, dtype = torch.device(machine.device), DTYPES[machine.precision]
    head_dim = config.model.layer_config().head_dim
    return config.data.document_mask and not takes_all_at_once(device, dtype, head_dim)


def _of_tokenizer(config: TrainConfig, store: TokenStore) -> dict[str, Any]:
    """The model's keys that follow from the tokenizer; UserError if the configuration gives other values."""
    found = {
        "vocab_size": vocabulary_size(store.tokenizer),
        "document_token": store.end_of_text_id if config.data.document_mask else None,
    }
    for name, value in found.items():
        if (given := getattr(config.model, name)) not in (None, value):
            raise UserError(
                f"model.{name}={given}, but with this tokenizer and data.document_mask it is {value}: leave it out"
            )
    return {f"model.{name}": value for name, value in found.items()}


def _of_sweep(config: TrainConfig, job: SweepJob | None) -> dict[str, Any]:
    """The sweep's wandb group and tags; a group that the user gives takes precedence."""
    if job is None:
        return {}
    group = job.group if config.logger.group is None else config.logger.group
    return {"logger.group": group, "tags": [*config.tags, *job.tags]}
