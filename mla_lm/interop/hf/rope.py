"""Conversion of RoPE and YaRN settings to entries of transformers' config.json, and back."""

import math
from dataclasses import replace
from typing import Any

import torch

from mla_lm.attention.gqa import MHAConfig
from mla_lm.attention.rope import RotaryEmbedding, YarnConfig, sharpening
from mla_lm.errors import UserError
from mla_lm.model.config import TransformerConfig

STILL = 1e30  # divides the frequency of a pair that is not rotated; in fp32 its angle is then 0 at every position


def rope_to_json(config: TransformerConfig, deepseek: bool) -> dict[str, Any]:
    """Make RoPE's entries: rope_parameters for transformers 5, two more for older versions and some engines."""
    base, yarn, layer = config.attention.rope_base, config.attention.yarn, config.layer_config()
    if isinstance(layer, MHAConfig) and layer.rope_dim < layer.head_dim:
        scaling = _longrope(layer)
    elif yarn.factor == 1:
        plain = {"rope_type": "default", "rope_theta": base}
        return {"rope_parameters": plain, "rope_theta": base, "rope_scaling": None}
    else:
        scaling = _yarn_to_json(yarn, config.seq_len, deepseek)
    return {"rope_parameters": {**scaling, "rope_theta": base}, "rope_theta": base, "rope_scaling": scaling}


def _yarn_to_json(yarn: YarnConfig, seq_len: int, deepseek: bool) -> dict[str, Any]:
    scaling: dict[str, Any] = {
        "rope_type": "yarn",
        "type": "yarn",
        "factor": yarn.factor,
        "original_max_position_embeddings": _plain(yarn.trained_length(seq_len)),
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
    }
    if deepseek:
        scaling |= {"mscale": yarn.mscale, "mscale_all_dim": yarn.mscale_all_dim}
        if not (yarn.mscale and yarn.mscale_all_dim):  # transformers takes 0 for absent
            scaling["attention_factor"] = yarn.amplitude
    elif yarn.mscale != 1:  # Llama rotates whole heads, so the cosines and sines carry all of the sharpening
        scaling["attention_factor"] = sharpening(yarn.factor, yarn.mscale)
    return scaling


def _longrope(layer: MHAConfig) -> dict[str, Any]:
    """RoPE's entries for partly rotated heads. transformers' Llama rotates all pairs; a factor of STILL stops one."""
    factors = _factors(layer)
    return {
        "rope_type": "longrope",
        "type": "longrope",
        "short_factor": factors,
        "long_factor": factors,
        "factor": 1.0,
        "attention_factor": sharpening(layer.yarn.factor, layer.yarn.mscale),
        "original_max_position_embeddings": layer.seq_len,
    }


def _factors(layer: MHAConfig) -> list[float]:
    """What divides the frequencies of plain RoPE over the whole head to give those of the layer."""
    dim, base = layer.head_dim, layer.rope_base
    with torch.device("meta"):  # no tables
        rope = RotaryEmbedding(dim, layer.seq_len, base, layer.yarn, rotated=layer.rope_dim)
    turning = rope.frequency().tolist()[: layer.rope_dim // 2]
    still = (dim - layer.rope_dim) // 2
    return [base ** (-2 * i / dim) / frequency for i, frequency in enumerate(turning)] + [STILL] * still


def rope_from_json(json: dict[str, Any], seq_len: int, deepseek: bool) -> dict[str, Any]:
    """Make the RoPE fields of `AttentionConfig` from config.json.

    Raises:
        UserError: the scaling is neither YaRN's nor that of partly rotated heads without YaRN.
    """
    rope = json.get("rope_scaling") or json.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    base = float(rope.get("rope_theta", json.get("rope_theta", 10000.0)))
    if kind == "longrope" and not deepseek:
        return {"rope_base": base, "rope_dim": _dim_of_longrope(json, rope, seq_len, base)}
    if kind not in ("default", "yarn"):
        raise UserError(f"RoPE of type {kind} is not supported: it must be default or yarn")
    for name, needed in (("partial_rotary_factor", 1), ("truncate", True)):
        if (found := rope.get(name, json.get(name, needed))) != needed:
            raise UserError(f"{name}={found} of RoPE is not supported: it must be {needed}")
    fields: dict[str, Any] = {"rope_base": base}
    if kind == "yarn":
        fields["yarn"] = _yarn_from_json(rope, seq_len, deepseek)
    return fields


def _dim_of_longrope(json: dict[str, Any], rope: dict[str, Any], seq_len: int, base: float) -> int:
    """How much of each head is rotated, from the entries that `_longrope` writes without YaRN."""
    whole, factors = MHAConfig(json["hidden_size"], json["num_attention_heads"], seq_len), rope.get("short_factor")
    still = factors.count(STILL) if isinstance(factors, list) else 0
    layer = replace(whole, rope_base=base, rope_dim=whole.head_dim - 2 * still)
    if not still or any(rope.get(name) != value for name, value in _longrope(layer).items() if name != "type"):
        raise UserError(
            "RoPE of type longrope is only supported as scripts.export writes it for model.attention.rope_dim without "
            "YaRN"
        )
    return layer.rope_dim


def _yarn_from_json(rope: dict[str, Any], seq_len: int, deepseek: bool) -> YarnConfig:
    """Read YaRN as transformers does, in _compute_yarn_parameters and, for the scores, in DeepSeek's attention."""
    original = rope.get("original_max_position_embeddings", seq_len)
    factor = rope.get("factor") or seq_len / original
    mscale, mscale_all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    amplitude = rope.get("attention_factor")
    if amplitude is None and mscale and mscale_all_dim and deepseek:
        return _yarn(rope, factor, original, mscale, mscale_all_dim)
    if amplitude is None:
        amplitude = sharpening(factor)
        if mscale and mscale_all_dim:
            amplitude = sharpening(factor, mscale) / sharpening(factor, mscale_all_dim)
    # Our amplitude is divided by the sharpening of mscale_all_dim, which DeepSeek applies to scores and Llama does not.
    mscale_all_dim = (mscale_all_dim or 0.0) if deepseek else 1.0
    whole = amplitude * sharpening(factor, mscale_all_dim) if deepseek else amplitude
    mscale = round((whole - 1) / (0.1 * math.log(factor)), 9) if factor > 1 else 1.0
    return _yarn(rope, factor, original, mscale, mscale_all_dim)


def _yarn(rope: dict[str, Any], factor: float, original: int, mscale: float, mscale_all_dim: float) -> YarnConfig:
    return YarnConfig(
        factor=float(factor),
        original_seq_len=original,
        beta_fast=float(rope.get("beta_fast") or 32),
        beta_slow=float(rope.get("beta_slow") or 1),
        mscale=float(mscale),
        mscale_all_dim=float(mscale_all_dim),
    )


def _plain(value: float) -> float | int:
    """Turn a whole number into an int, so that JSON has it without a decimal point."""
    return int(value) if float(value).is_integer() else value
