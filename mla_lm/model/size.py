"""Parameters, FLOPs and cache size of a configuration, without allocating its weights."""

from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import nn

from mla_lm.attention import KINDS, AttentionConfig
from mla_lm.errors import UserError
from mla_lm.model.config import TransformerConfig
from mla_lm.model.transformer import Transformer


@dataclass
class ModelSize:
    """Sizes of one configuration. FLOPs are those of matrix products only; a multiply-add counts as two."""

    attention: str
    parameters: int
    non_embedding_parameters: int  # without the embedding table, but with an untied head
    flops_per_token: float  # a training step: forward, and twice that for backward; causal
    cache_elements_per_token_per_layer: float  # the mean over layers; a whole number where every layer has a cache

    def cache_bytes_per_token(self, num_layers: int, dtype: torch.dtype) -> int:
        """Bytes of the KV cache per stored token, over all layers."""
        return round(num_layers * self.cache_elements_per_token_per_layer) * dtype.itemsize


def model_size(config: TransformerConfig, window: float | None = None) -> ModelSize:
    """Count the parameters, FLOPs and cache elements of `Transformer(config)`.

    Args:
        window: tokens of a training window, on average over the run; None: seq_len

    Raises:
        UserError (a ValueError): the configuration is invalid.
    """
    with torch.device("meta"):
        model = Transformer(config)
    parameters = sum(p.numel() for p in model.parameters())
    matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    layer = config.layer_config()
    keys_seen = ((window or config.seq_len) + 1) / 2  # by the average query
    attention = config.num_layers * (layer.macs_per_token + keys_seen * layer.macs_per_key)
    cached = KINDS[config.attention.kind].caches(config.num_layers) * layer.cached_elements
    return ModelSize(
        attention=config.attention.kind,
        parameters=parameters,
        non_embedding_parameters=parameters - model.embedding.weight.numel(),
        flops_per_token=3 * 2 * (matrices + attention),
        cache_elements_per_token_per_layer=_mean(cached, config.num_layers),
    )


def _mean(total: int, count: int) -> float:
    return total / count if total % count else total // count


def same_size_as(config: TransformerConfig, window: float | None = None) -> list[ModelSize]:
    """The sizes of this configuration, then of the other kinds among MHA, GQA and MQA, with all else equal.

    GQA has num_heads / 4 key heads, or the next smaller divisor of num_heads, and 2 if there are fewer than 8 heads.
    `window` is that of `model_size`.
    """
    sizes = [model_size(config, window)]
    heads = config.num_heads
    grouped = max(d for d in range(1, max(2, heads // 4) + 1) if heads % d == 0)
    for kind, num_kv_heads in (("mha", heads), ("gqa", grouped), ("mqa", 1)):
        other = replace(config, attention=AttentionConfig(kind=kind, num_kv_heads=num_kv_heads))
        if kind != config.attention.kind:
            with suppress(UserError):  # too few heads for groups, or heads of an odd size, which RoPE cannot rotate
                sizes.append(model_size(other, window))
    return sizes
