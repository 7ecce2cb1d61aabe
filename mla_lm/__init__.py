"""Train small language models with Multi-head Latent Attention."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mla_lm.attention import MHA, MLA, AttentionConfig, MHAConfig, MLAConfig
from mla_lm.errors import UserError
from mla_lm.model.config import TransformerConfig
from mla_lm.model.transformer import Transformer

if TYPE_CHECKING:
    from mla_lm.inference.evaluate import evaluate
    from mla_lm.inference.generate import generate
    from mla_lm.runs.load import LoadedRun, load_run

__all__ = [
    "MHA",
    "MLA",
    "AttentionConfig",
    "LoadedRun",
    "MHAConfig",
    "MLAConfig",
    "Transformer",
    "TransformerConfig",
    "UserError",
    "evaluate",
    "generate",
    "load_run",
]

# These need packages that a program which only wants `MLA` should not have to wait for.
WHEN_ASKED_FOR = {
    "LoadedRun": "mla_lm.runs.load",
    "evaluate": "mla_lm.inference.evaluate",
    "generate": "mla_lm.inference.generate",
    "load_run": "mla_lm.runs.load",
}


def __getattr__(name: str) -> Any:
    if name in WHEN_ASKED_FOR:
        return getattr(import_module(WHEN_ASKED_FOR[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
