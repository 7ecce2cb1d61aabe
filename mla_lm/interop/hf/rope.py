"""RoPE and YaRN as config.json of transformers says them."""

import math
from typing import Any

from mla_lm.attention.rope import YarnConfig, sharpening
from mla_lm.errors import UserError
from mla_lm.model.config import TransformerConfig


def rope_to_json(config: TransformerConfig, deepseek: bool) -> dict[str, Any]:
    """For transformers 5 under rope_parameters, for earlier versions and some engines under the other two names."""
    base, yarn = config.attention.rope_base, config.attention.yarn
    if yarn.factor == 1:
        plain = {"rope_type": "default", "rope_theta": base}
        return {"rope_parameters": plain, "rope_theta": base, "rope_scaling": None}
    scaling: dict[str, Any] = {
        "rope_type": "yarn",
        "type": "yarn",
        "factor": yarn.factor,
        "original_max_position_embeddings": _plain(yarn.trained_length(config.seq_len)),
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
    }
    if deepseek:
        scaling |= {"mscale": yarn.mscale, "mscale_all_dim": yarn.mscale_all_dim}
        if not (yarn.mscale and yarn.mscale_all_dim):  # which transformers would take for absent
            scaling["attention_factor"] = yarn.amplitude
    elif yarn.mscale != 1:  # Llama rotates all of a head, so all sharpening goes through the cosines and sines
        scaling["attention_factor"] = sharpening(yarn.factor, yarn.mscale)
    return {"rope_parameters": {**scaling, "rope_theta": base}, "rope_theta": base, "rope_scaling": scaling}


def rope_from_json(json: dict[str, Any], seq_len: int, deepseek: bool) -> dict[str, Any]:
    """The fields of `AttentionConfig` that say the same.

    Raises:
        UserError: another kind of scaling than YaRN's, or RoPE on a part of a head.
    """
    rope = json.get("rope_scaling") or json.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "yarn"):
        raise UserError(f"RoPE of type {kind} is not supported: it must be default or yarn")
    for name, needed in (("partial_rotary_factor", 1), ("truncate", True)):
        if (found := rope.get(name, json.get(name, needed))) != needed:
            raise UserError(f"{name}={found} of RoPE is not supported: it must be {needed}")
    fields = {"rope_base": float(rope.get("rope_theta", json.get("rope_theta", 10000.0)))}
    if kind == "yarn":
        fields["yarn"] = _yarn_from_json(rope, seq_len, deepseek)
    return fields


def _yarn_from_json(rope: dict[str, Any], seq_len: int, deepseek: bool) -> YarnConfig:
    """As _compute_yarn_parameters of transformers reads it, and DeepSeek's attention the factor of the scores."""
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
    # Ours divides by the sharpening of mscale_all_dim, which multiplies DeepSeek's scores and is nothing to Llama's.
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
    """A whole number without the point that would make it a float for others."""
    return int(value) if float(value).is_integer() else value
