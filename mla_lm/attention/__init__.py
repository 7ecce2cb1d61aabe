"""Attention and KV caches: one file per kind, the parts they share, and the registry of kinds."""

from mla_lm.attention.gqa import MHA, MHAConfig
from mla_lm.attention.kinds import KINDS, AttentionConfig
from mla_lm.attention.kv_cache import LayerCache, ModelCache
from mla_lm.attention.mla import MLA
from mla_lm.attention.mla_config import MLAConfig
from mla_lm.attention.rope import RotaryEmbedding, YarnConfig, rotate

__all__ = [
    "KINDS",
    "MHA",
    "MLA",
    "AttentionConfig",
    "LayerCache",
    "MHAConfig",
    "MLAConfig",
    "ModelCache",
    "RotaryEmbedding",
    "YarnConfig",
    "rotate",
]
