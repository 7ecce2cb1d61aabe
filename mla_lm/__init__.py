"""Train small language models with Multi-head Latent Attention."""

from typing import TYPE_CHECKING, Any

from mla_lm.attention import MHA, MLA, MHAConfig, MLAConfig
from mla_lm.errors import UserError
from mla_lm.transformer import AttentionConfig, Transformer, TransformerConfig

if TYPE_CHECKING:
    from mla_lm.loading import load_run

__all__ = [
    "MHA",
    "MLA",
    "AttentionConfig",
    "MHAConfig",
    "MLAConfig",
    "Transformer",
    "TransformerConfig",
    "UserError",
    "load_run",
]


def __getattr__(name: str) -> Any:
    """`load_run` needs the training packages, which a program that only wants `MLA` should not have to wait for."""
    if name == "load_run":
        from mla_lm.loading import load_run

        return load_run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
