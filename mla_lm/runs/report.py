"""The text that a run prints before training and at its end."""

import math
import shlex
import subprocess
from pathlib import Path

import torch

from mla_lm.config import TrainConfig
from mla_lm.data.store import TokenStore
from mla_lm.hardware import DTYPES, memory_bytes
from mla_lm.model.memory import training_memory
from mla_lm.model.size import ModelSize, same_size_as
from mla_lm.runs.folder import RunFolder
from mla_lm.terminal.tables import table


def size_table(config: TrainConfig, dtype: torch.dtype) -> str:
    """Format a table of parameters, FLOPs and cache: the model, and MHA, GQA and MQA of the same dimensions."""
    headings = ("", "parameters", "FLOPs/token", "cache B/token", f"cache at {config.model.seq_len}", "vs MHA")
    mha = 2 * config.model.d_model
    sizes = same_size_as(config.model, config.mean_window_length)
    return table([headings, *(_size_row(size, config, dtype, mha) for size in sizes)])


def _size_row(size: ModelSize, config: TrainConfig, dtype: torch.dtype, mha_elements: int) -> tuple[str, ...]:
    cache = size.cache_bytes_per_token(config.model.num_layers, dtype)
    return (
        ("> " if size.attention == config.model.attention.kind else "  ") + size.attention,
        f"{size.parameters:,}",
        f"{size.flops_per_token / 1e6:,.1f}M",
        f"{cache:,}",
        human_bytes(cache * config.model.seq_len),
        f"{size.cache_elements_per_token_per_layer / mha_elements:.3f}",
    )


def data_lines(store: TokenStore) -> list[str]:
    """Describe the data: tokens of each split, and for a mixture also those of each part."""
    lines = [f"data        {store.description}{_skipped(store)}"]
    if store.mixed:
        lines = [f"data        a mixture of {len(store.mixed)} parts"]
        for weight, part in store.mixed:
            lines += [f"  {weight:<10g}{part.description}{_skipped(part)}", f"            {_counts(part)}"]
        lines.append("  all")
    return [*lines, f"            {_counts(store)}"]


def _skipped(store: TokenStore) -> str:
    return f"; {len(store.skipped)} could not be decoded" if store.skipped else ""


def _counts(store: TokenStore) -> str:
    return ", ".join(
        f"{split} {count:,} tokens ({human_bytes(store.text_bytes[split])})" for split, count in store.counts.items()
    )


def human_bytes(count: float) -> str:
    """Format a number of bytes: 1536 as "1.5 KiB"."""
    power = min(4, int(math.log(count, 1024))) if count >= 1 else 0
    return f"{count / 1024**power:,.1f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def out_of_memory(config: TrainConfig, device: str) -> str:
    """Explain a run that ran out of memory: what it needed, what the device has, and what to change."""
    dtype, batch = DTYPES[config.trainer.precision], config.micro_batch_size
    memory = training_memory(config.model, batch, dtype, device, config.optimizer.kind)
    checkpointing = config.model.activation_checkpointing
    need = human_bytes(memory.peak(checkpointing, config.accumulation))
    smaller = f"micro_batch_tokens={max(1, batch // 2) * config.model.seq_len}" if batch > 1 else "a smaller model"
    also = "" if checkpointing else " or model.activation_checkpointing=true"
    return (
        f"out of memory with {batch} x {config.model.seq_len:,} tokens at once on each device. scripts.plan says that "
        f"such a step takes {need}; there are {human_bytes(memory_bytes(device))} in all.\n  Try {smaller}{also}; "
        "ckpt_path=RUN goes on with the run from its last checkpoint."
    )


def finite_or_none(value: float | None) -> float | None:
    """Replace NaN and infinity, which JSON lacks, by None."""
    return value if value is not None and math.isfinite(value) else None


def end_report(run: RunFolder, summary: dict, wandb_sync: str | None) -> str:
    """Format the run's figures, the place of its folder, and the commands to use it."""
    lines = [""]
    if summary["finished"]:
        lines += [
            f"validation  {_quality(summary, 'val')} (best checkpoint)",
            f"test        {_quality(summary, 'test')}",
            f"KV cache    {summary['kv_cache_bytes_per_token']:,.0f} bytes per token, "
            f"{human_bytes(summary['kv_cache_bytes_at_seq_len'])} at {summary['seq_len']} tokens: "
            f"{summary['kv_cache_vs_mha']:.3f} of MHA's",
        ]
    else:
        lines.append(f"stopped at step {summary['steps']}")
    path = shlex.quote(_shown(run.path))
    lines.append(f"run         {path}")
    if run.is_begun:
        longer = f" trainer.max_steps={2 * summary['steps']}" if summary["finished"] else ""
        lines.append(f"resume      python train.py ckpt_path={path}{longer}")
    if summary["finished"]:
        lines += [
            f'sample      python -m scripts.generate {path} --prompt "..."',
            f"compare     python -m scripts.compare {path} OTHER_RUN",
        ]
    if wandb_sync:
        lines.append(f"upload      {wandb_sync}")
    return "\n".join(lines)


def _quality(summary: dict, stage: str) -> str:
    return f"perplexity {summary[f'{stage}_perplexity']:.2f}, {summary[f'{stage}_bits_per_byte']:.4f} bits per byte"


def _shown(path: Path) -> str:
    """The path as a user would type it: relative if it lies below the working directory."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def git_commit() -> str | None:
    """The commit of this code, with "-dirty" if files differ from it; None outside a repository."""
    here = Path(__file__).parent
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude", "*"],
            cwd=here, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
