"""Parameters, FLOPs and cache size of a configuration, without allocating its weights."""

from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import nn

from mla_lm.attention import MLAConfig
from mla_lm.errors import UserError
from mla_lm.model.config import AttentionConfig, TransformerConfig
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
    if isinstance(layer, MLAConfig):
        qk_dim, value_dim = layer.nope_dim + layer.rope_dim, layer.value_dim
        cached = layer.kv_compressed_dim + layer.rope_dim
    else:
        qk_dim = value_dim = config.d_model // config.num_heads
        cached = 2 * layer.num_kv_heads * qk_dim
    keys_seen = (config.seq_len + 1) / 2  # by a query, on average
    attention = config.num_layers * config.num_heads * keys_seen * (qk_dim + value_dim)
    return ModelSize(
        attention=config.attention_kind,
        parameters=parameters,
        non_embedding_parameters=parameters - model.embedding.weight.numel(),
        flops_per_token=3 * 2 * (matrices + attention),
        cache_elements_per_token_per_layer=cached,
    )


def same_size_as(config: TransformerConfig) -> list[ModelSize]:
    """This configuration, then those of MHA, GQA and MQA that it is not, of equal num_layers, num_heads, d_model.

    GQA has num_heads / 4 key heads, or the next smaller divisor of num_heads; 2 where there are fewer than 8 heads.
    """
    sizes = [model_size(config)]
    heads = config.num_heads
    grouped = max(d for d in range(1, max(2, heads // 4) + 1) if heads % d == 0)
    for num_kv_heads in (heads, grouped, 1):
        other = replace(config, attention=AttentionConfig(num_kv_heads=num_kv_heads))
        with suppress(UserError):  # heads of an odd size serve MLA, whose rotated part is apart, but not the others
            if other.attention_kind not in [s.attention for s in sizes]:
                sizes.append(model_size(other))
    return sizes
