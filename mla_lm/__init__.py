"""Train small language models with Multi-head Latent Attention."""

from mla_lm.attention import MHA, MLA, MHAConfig, MLAConfig
from mla_lm.errors import UserError
from mla_lm.transformer import AttentionConfig, Transformer, TransformerConfig

__all__ = [
    "MHA",
    "MLA",
    "AttentionConfig",
    "MHAConfig",
    "MLAConfig",
    "Transformer",
    "TransformerConfig",
    "UserError",
]
