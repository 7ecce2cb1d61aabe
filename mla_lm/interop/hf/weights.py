"""Conversion of weights to the names and layout of transformers' DeepseekV3 and Llama, and back."""

import torch
from torch import Tensor

from mla_lm.attention import MLAConfig
from mla_lm.attention.kind import TransformersForm
from mla_lm.errors import UserError
from mla_lm.interop.hf.config import form_of
from mla_lm.model.config import TransformerConfig
from mla_lm.model.transformer import Transformer

TOP = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
IN_BLOCK = {
    "attention_norm": "input_layernorm",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward.gate_proj": "mlp.gate_proj",
    "feed_forward.up_proj": "mlp.up_proj",
    "feed_forward.down_proj": "mlp.down_proj",
}
IDLE = 1e-6  # factor on latents whose norm must do nothing: it makes their squares 1e-12, against an eps of 1e-6


def their_name(name: str, form: TransformersForm) -> str:
    """Translate a name: `blocks.3.attention.q_up.weight` to `model.layers.3.self_attn.q_b_proj.weight`."""
    module, parameter = name.rsplit(".", 1)
    if module in TOP:
        return f"{TOP[module]}.{parameter}"
    _, layer, module = module.split(".", 2)
    theirs = IN_BLOCK.get(module) or f"self_attn.{form.projections[module.removeprefix('attention.')]}"
    return f"model.layers.{layer}.{theirs}.{parameter}"


def to_transformers(model: Transformer) -> dict[str, Tensor]:
    """Return the model's weights as transformers' model class reads them; DeepseekV3's RoPE is interleaved.

    For DeepseekV3 a tied head is written in addition to the embedding, since vLLM and SGLang do not tie it.
    """
    config, state = model.config, model.state_dict()
    form = form_of(config.attention.kind)
    if config.tie_embeddings and form.architecture != "DeepseekV3ForCausalLM":
        del state["head.weight"]
    layer = config.layer_config()
    if isinstance(layer, MLAConfig) and not layer.latent_norm:
        _add_idle_norms(state, layer, config.num_layers)
    if isinstance(layer, MLAConfig) and layer.latent_scale:
        _scale_norms(state, layer, config.num_layers)
    weights = {}
    for name, tensor in state.items():
        if (rows := _rotated_rows(name, config)) is not None:
            tensor = _move_rotated(tensor, *rows, _interleaving(rows[-1]))
        weights[their_name(name, form)] = tensor.clone()  # safetensors refuses tensors that share memory
    return weights


def _add_idle_norms(state: dict[str, Tensor], layer: MLAConfig, num_layers: int) -> None:
    """Add latent norms that do nothing to a converted model, which has none.

    RMSNorm divides by sqrt(mean of squares + eps). The latents are scaled down until eps outweighs their squares, so
    that the divisor is constant; the norm's weight undoes both factors. (fp16 has no numbers so small; fp32 and bf16
    do.)
    """
    latent = layer.kv_compressed_dim
    for i in range(num_layers):
        down = state[f"blocks.{i}.attention.kv_down.weight"].clone()
        down[:latent] *= IDLE
        state[f"blocks.{i}.attention.kv_down.weight"] = down
        state[f"blocks.{i}.attention.kv_norm.weight"] = down.new_full((latent,), 1e-6**0.5 / IDLE)


def _scale_norms(state: dict[str, Tensor], layer: MLAConfig, num_layers: int) -> None:
    """Put the factors of `latent_scale` into the weights of the latents' norms, which transformers does not scale."""
    for name, width in (("kv_norm", layer.kv_compressed_dim), ("q_norm", layer.q_compressed_dim)):
        if width is not None:
            for key in (f"blocks.{i}.attention.{name}.weight" for i in range(num_layers)):
                state[key] = state[key] * (layer.d_model / width) ** 0.5


def from_transformers(theirs: dict[str, Tensor], config: TransformerConfig, interleaved: bool) -> dict[str, Tensor]:
    """Make the `state_dict` of `Transformer(config)`, in fp32; the inverse of `to_transformers`.

    Args:
        theirs: all tensors of a model, by name
        interleaved: whether RoPE rotates the pairs (2i, 2i + 1), as in DeepSeek, instead of (i, i + rope_dim / 2)

    Raises:
        UserError: a tensor is missing, has another shape or no place in the model, or the head of a model with tied
            embeddings differs from its embedding.
    """
    shapes = _shapes(config, theirs)
    if config.tie_embeddings:
        if (embedding := theirs.get("model.embed_tokens.weight")) is None:
            raise UserError("model.embed_tokens.weight is missing")
        if not torch.equal(theirs.get("lm_head.weight", embedding), embedding):
            raise UserError("tie_word_embeddings is true, but lm_head.weight is not model.embed_tokens.weight")
        theirs = {**theirs, "lm_head.weight": embedding}
    form = form_of(config.attention.kind)
    names = {name: their_name(name, form) for name in shapes}
    if extra := sorted(set(theirs) - set(names.values())):
        raise UserError(f"{extra[0]} has no place in the model that config.json describes ({len(extra)} such tensors)")
    state = {}
    for name, their in names.items():
        tensor = theirs.get(their)
        if tensor is None:
            raise UserError(f"{their} is missing")
        if tensor.shape != shapes[name]:
            raise UserError(f"{their} is {list(tensor.shape)}, config.json makes it {list(shapes[name])}")
        if interleaved and (rows := _rotated_rows(name, config)) is not None:
            tensor = _move_rotated(tensor, *rows, _interleaving(rows[-1]).argsort())
        state[name] = tensor.float()
    return state


def _shapes(config: TransformerConfig, theirs: dict[str, Tensor]) -> dict[str, torch.Size]:
    """The shapes of our tensors by name. Nothing is allocated, and no layer is built that `theirs` lacks."""
    layers = len({name.split(".")[2] for name in theirs if name.startswith("model.layers.")})
    if layers < config.num_layers:
        raise UserError(f"model.layers.{layers}.* is missing, where num_hidden_layers={config.num_layers}")
    try:
        with torch.device("meta"):
            return {name: tensor.shape for name, tensor in Transformer(config).state_dict().items()}
    except (RuntimeError, TypeError, OverflowError) as error:  # torch raises these for sizes beyond 64 bits
        raise UserError("config.json describes a model of impossible sizes") from error


def _rotated_rows(name: str, config: TransformerConfig) -> tuple[int, int, int] | None:
    """The heads of a weight or bias, and per head the rows before the rotated ones and these; None if it has none."""
    module = name.split(".")[-2]
    rows = form_of(config.attention.kind).rotated.get(module) if ".attention." in name else None
    if rows is None:
        return None
    layer, (heads, before) = config.layer_config(), rows
    return getattr(layer, heads) if heads else 1, getattr(layer, before), layer.rotated_dim


def _interleaving(dim: int) -> Tensor:
    """The permutation that interleaves two halves: 0, dim / 2, 1, dim / 2 + 1, ..."""
    return torch.arange(dim).view(2, -1).T.flatten()


def _move_rotated(tensor: Tensor, heads: int, before: int, rotated: int, order: Tensor) -> Tensor:
    """Reorder the last `rotated` rows of each head in a weight or bias, those that RoPE rotates."""
    plain, turned = tensor.unflatten(0, (heads, -1)).split((before, rotated), dim=1)
    return torch.cat((plain, turned[:, order]), dim=1).flatten(0, 1)
