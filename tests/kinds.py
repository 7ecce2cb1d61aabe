"""Every kind of attention, small: what the tests that hold for all of them run on.

They are read off the registry and the presets, so that a new kind is covered once it has both.
"""

from dataclasses import replace

import pytest
import torch
import yaml

from mla_lm import AttentionConfig, Transformer, TransformerConfig
from mla_lm.attention import KINDS
from tests.conftest import ROOT

SMALL = {"num_layers": 2, "seq_len": 16, "ff_hidden": 48, "vocab_size": 61}


def preset_of(name: str) -> TransformerConfig:
    """conf/model/NAME.yaml."""
    content = yaml.safe_load((ROOT / "conf" / "model" / f"{name}.yaml").read_text())
    return TransformerConfig(**{**content, "attention": AttentionConfig(**content["attention"])})


each_kind = pytest.mark.parametrize("kind", KINDS)


def config_of(kind: str, **changes) -> TransformerConfig:
    """The smallest preset of a kind with fewer layers, a shorter context and a small vocabulary."""
    return replace(preset_of(f"{kind}_tiny"), **{**SMALL, **changes})


def model_of(kind: str, **changes) -> Transformer:
    torch.manual_seed(0)
    return Transformer(config_of(kind, **changes))


def spread(model: Transformer, std: float = 0.1) -> Transformer:
    """Weights larger than they begin, so that every output depends on everything before it; in evaluation mode."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=std)
    return model.eval()
