"""Parameters, FLOPs and cache size of a configuration, without allocating its weights."""

from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import nn

from mla_lm.attention import AttentionConfig
from mla_lm.errors import UserError
from mla_lm.model.config import TransformerConfig
from mla_lm.model.transformer import Transformer


@dataclass
class ModelSize:
    """Sizes of one configuration; FLOPs count a multiply-add as two and leave out all but matrix products."""

    attention: str
    parameters: int
    non_embedding_parameters: int  # without the embedding table; with an untied head
    flops_per_token: float  # of a training step: forward and twice that for backward, causal, at seq_len
    cache_elements_per_token_per_layer: int

    def cache_bytes_per_token(self, num_layers: int, dtype: torch.dtype) -> int:
        """Bytes of the KV cache for each stored token, all layers."""
        return num_layers * self.cache_elements_per_token_per_layer * dtype.itemsize


def model_size(config: TransformerConfig) -> ModelSize:
    """Count what `Transformer(config)` holds and does.

    Raises:
        UserError (a ValueError): a configuration that cannot be.
    """
    with torch.device("meta"):
        model = Transformer(config)
    parameters = sum(p.numel() for p in model.parameters())
    matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    layer = config.layer_config()
    keys_seen = (config.seq_len + 1) / 2  # by a query, on average
    attention = config.num_layers * keys_seen * layer.macs_per_key
    return ModelSize(
        attention=config.attention.kind,
        parameters=parameters,
        non_embedding_parameters=parameters - model.embedding.weight.numel(),
        flops_per_token=3 * 2 * (matrices + attention),
        cache_elements_per_token_per_layer=layer.cached_elements,
    )


def same_size_as(config: TransformerConfig) -> list[ModelSize]:
    """This configuration, then those of MHA, GQA and MQA that it is not, of equal num_layers, num_heads, d_model.

    GQA has num_heads / 4 key heads, or the next smaller divisor of num_heads; 2 where there are fewer than 8 heads.
    """
    sizes = [model_size(config)]
    heads = config.num_heads
    grouped = max(d for d in range(1, max(2, heads // 4) + 1) if heads % d == 0)
    for kind, num_kv_heads in (("mha", heads), ("gqa", grouped), ("mqa", 1)):
        other = replace(config, attention=AttentionConfig(kind=kind, num_kv_heads=num_kv_heads))
        if kind != config.attention.kind:
            with suppress(UserError):  # few heads have no groups, and heads of an odd size cannot be rotated whole
                sizes.append(model_size(other))
    return sizes
