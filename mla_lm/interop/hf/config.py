"""Conversion of our configuration to config.json of transformers, and back."""

from typing import Any

from mla_lm.attention import KINDS, AttentionConfig, MLAConfig
from mla_lm.attention.gqa import kind_of_heads
from mla_lm.attention.kind import LayerConfig, TransformersForm
from mla_lm.errors import UserError
from mla_lm.interop.hf.rope import rope_from_json, rope_to_json
from mla_lm.model.config import TransformerConfig


def form_of(kind: str) -> TransformersForm:
    """How transformers stores attention of this kind.

    Raises:
        UserError: no model class of transformers can hold it.
    """
    form = KINDS[kind].transformers
    if form is None:
        raise UserError(f"no model class of transformers can hold model.attention.kind={kind}")
    return form


def to_json(config: TransformerConfig, end_of_text: int, dtype: str) -> dict[str, Any]:
    """Make config.json for the model class that can hold the attention: DeepseekV3ForCausalLM or LlamaForCausalLM.

    Args:
        end_of_text: id of the token that begins and ends a document
        dtype: dtype of the weights, float32 or bfloat16

    Raises:
        UserError: no class can hold the model, such as MLA with biases, without RoPE, or with frequencies of its own.
    """
    form, layer = form_of(config.attention.kind), config.layer_config()
    shared = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.ff_hidden,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.seq_len,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,  # transformers ignores it in latent norms, which have 1e-6 as ours do
        "attention_bias": config.use_bias,
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tie_embeddings,
        **rope_to_json(config, deepseek=form.architecture == "DeepseekV3ForCausalLM"),
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "pad_token_id": end_of_text,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,  # the name before transformers 5
    }
    model_type, rest = ARCHITECTURES[form.architecture]
    attention = {entry: getattr(layer, name) for entry, name in form.entries.items()}
    return {
        "architectures": [form.architecture],
        "model_type": model_type,
        **shared,
        **attention,
        **rest(config, layer),
    }


def _rest_of_llama(config: TransformerConfig, layer: LayerConfig) -> dict[str, Any]:
    return {"mlp_bias": config.use_bias}


def _rest_of_deepseek(config: TransformerConfig, layer: MLAConfig) -> dict[str, Any]:
    if config.use_bias:
        raise UserError(
            "model.use_bias=true: transformers' DeepseekV3 has no bias in q_proj, q_b_proj and the feed-forward, so "
            "this model cannot be written as one"
        )
    if layer.rope_dim == 0:
        raise UserError(
            "model.attention.rope_dim=0: transformers' DeepseekV3 cannot have heads without a rotated part, so this "
            "model cannot be written as one"
        )
    if layer.rope_frequencies is not None:
        raise UserError(
            "the model was converted from MHA with RoPE frequencies of its own, which transformers' DeepseekV3 cannot "
            "have: scripts.convert --plain-rope makes one without"
        )
    return {
        "rope_interleave": True,  # the only layout that vLLM and llama.cpp support
        # No layer is a mixture of experts, but the entries that describe one must be present and valid.
        "first_k_dense_replace": config.num_layers,
        "moe_layer_freq": 1,
        "moe_intermediate_size": config.ff_hidden,
        "n_routed_experts": 2,
        "n_shared_experts": 1,
        "num_experts_per_tok": 1,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,  # vLLM divides by it in fp16, in dense layers too
        "num_nextn_predict_layers": 0,
    }


# By architecture: model_type, and the function for entries that are neither shared nor the attention's.
ARCHITECTURES = {
    "DeepseekV3ForCausalLM": ("deepseek_v3", _rest_of_deepseek),
    "LlamaForCausalLM": ("llama", _rest_of_llama),
}


def from_json(json: dict[str, Any]) -> tuple[TransformerConfig, bool]:
    """Make our configuration from config.json, and tell whether the model's RoPE is interleaved.

    Raises:
        UserError: the architecture is another, or has a feature that our model lacks.
    """
    kind = json.get("model_type")
    if kind not in ("deepseek_v3", "deepseek_v2", "llama"):
        raise UserError(f"model_type={kind} is not supported: it must be deepseek_v3, deepseek_v2 or llama")
    for name, needed in (("hidden_act", "silu"), ("quantization_config", None)):
        _need(json, name, needed)
    config = TransformerConfig(
        num_layers=_size(json, "num_hidden_layers"),
        d_model=_size(json, "hidden_size"),
        num_heads=_size(json, "num_attention_heads"),
        seq_len=_size(json, "max_position_embeddings"),
        ff_hidden=_size(json, "intermediate_size"),
        vocab_size=_size(json, "vocab_size"),
        tie_embeddings=bool(json.get("tie_word_embeddings", False)),
        use_bias=bool(json.get("mlp_bias", False)),
        norm_eps=float(json.get("rms_norm_eps", 1e-6)),
    )
    fields = _llama_attention(json, config) if kind == "llama" else _deepseek_attention(json, config)
    config.attention = AttentionConfig(**fields, **rope_from_json(json, config.seq_len, kind != "llama"))
    config.layer_config()
    return config, kind == "deepseek_v2" or (kind == "deepseek_v3" and bool(json.get("rope_interleave", True)))


def _llama_attention(json: dict[str, Any], config: TransformerConfig) -> dict[str, Any]:
    if json.get("head_dim") is not None:
        _need(json, "head_dim", config.d_model // config.num_heads)
    _need(json, "attention_bias", config.use_bias)  # model.use_bias sets both biases
    heads = config.num_heads if json.get("num_key_value_heads") is None else _size(json, "num_key_value_heads")
    return {"kind": kind_of_heads(heads, config.num_heads), "num_kv_heads": heads}


def _deepseek_attention(json: dict[str, Any], config: TransformerConfig) -> dict[str, Any]:
    dense = json.get("first_k_dense_replace") or 0
    if dense < config.num_layers:
        raise UserError(
            f"first_k_dense_replace={dense} of {config.num_layers} layers: the others are mixtures of experts, which "
            "are not supported; all layers must be dense"
        )
    for name in ("attention_bias", "mlp_bias"):
        _need(json, name, False)
    if json.get("num_key_value_heads") is not None:
        _need(json, "num_key_value_heads", config.num_heads)
    sizes = {name: entry for entry, name in form_of("mla").entries.items() if name != "num_heads"}
    if json.get("q_lora_rank", 0) is None:
        del sizes["q_compressed_dim"]
    return {"kind": "mla", **{name: _size(json, entry) for name, entry in sizes.items()}}


def _need(json: dict[str, Any], name: str, value: Any) -> None:
    """Raise UserError if the entry is present with another value."""
    if (found := json.get(name, value)) != value:
        raise UserError(f"{name}={found} is not supported: it must be {value}")


def _size(json: dict[str, Any], name: str) -> int:
    value = json.get(name)
    if not isinstance(value, int) or value < 1:
        raise UserError(f"{name}={value} must be a whole number above 0")
    return value
