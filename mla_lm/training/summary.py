"""summary.json: what a run was, and its figures."""

from typing import Any

import torch

from mla_lm.config import TrainConfig, config_hash
from mla_lm.hardware import peak_memory_bytes, processor
from mla_lm.model.config import TransformerConfig
from mla_lm.model.size import ModelSize
from mla_lm.runs.report import finite_or_none, git_commit
from mla_lm.training.callbacks import CacheSize, Metrics


def summary(
    config: TrainConfig,
    size: ModelSize,
    metrics: Metrics,
    cache: CacheSize | None,
    *,
    steps: int,
    best: dict[str, float],
    tested: dict[str, float],
    diverged: bool,
    total_seconds: float,
    device: str,
    data_fingerprint: str,
) -> dict[str, Any]:
    """The content of summary.json; what was not measured is None.

    Args:
        cache: None before the first validation
        steps: optimizer steps that the run has behind it
        best: `val/...` of the best validation; empty before the first
        tested: `test/...` of the best checkpoint; empty where the run did not come to its end
        diverged: whether the run ended because its loss was not finite
    """
    return {
        "finished": bool(tested),
        "diverged": diverged,
        **_network(config.model, size),
        "seed": config.seed,
        "steps": steps,
        "tokens_seen": steps * config.step_tokens,
        "train_loss": finite_or_none(metrics.train_loss),
        **_quality("val", best),
        **_quality("test", tested),
        "kv_cache_elements_per_token_per_layer": size.cache_elements_per_token_per_layer,
        "kv_cache_bytes_per_token": cache.bytes_per_token if cache else None,
        "kv_cache_bytes_at_seq_len": cache.bytes_at_seq_len if cache else None,
        "kv_cache_vs_mha": cache.vs_mha if cache else None,
        "tokens_per_second": metrics.tokens_per_second,
        "model_flops_utilization": metrics.mfu,
        "peak_memory_bytes": peak_memory_bytes(device),
        "train_seconds": metrics.train_seconds,
        "total_seconds": total_seconds,
        "precision": config.trainer.precision,
        "accelerator": config.trainer.accelerator,
        "processor": processor(device),
        "threads": torch.get_num_threads(),
        "torch_version": torch.__version__,
        "git_commit": git_commit(),
        "data_fingerprint": data_fingerprint,
        "config_hash": config_hash(config),
    }


def _network(config: TransformerConfig, size: ModelSize) -> dict[str, Any]:
    return {
        "attention": size.attention,
        "num_layers": config.num_layers,
        "d_model": config.d_model,
        "num_heads": config.num_heads,
        "parameters": size.parameters,
        "non_embedding_parameters": size.non_embedding_parameters,
        "seq_len": config.seq_len,
    }


def _quality(split: str, values: dict[str, float]) -> dict[str, float | None]:
    return {f"{split}_{name}": values.get(f"{split}/{name}") for name in ("loss", "perplexity", "bits_per_byte")}
