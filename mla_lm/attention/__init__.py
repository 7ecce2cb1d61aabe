"""The attention family: MLA and the multi-head, grouped-query and multi-query baselines, and their caches."""

from mla_lm.attention.gqa import MHA, MHAConfig
from mla_lm.attention.kv_cache import LayerCache
from mla_lm.attention.mla import MLA, MLAConfig
from mla_lm.attention.rope import RotaryEmbedding, YarnConfig, rotate

__all__ = ["MHA", "MLA", "LayerCache", "MHAConfig", "MLAConfig", "RotaryEmbedding", "YarnConfig", "rotate"]
