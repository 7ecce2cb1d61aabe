"""The weights of a model under the names and in the layout of transformers' DeepseekV3 and Llama, and back."""

import torch
from torch import Tensor

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
IDLE = 1e-6  # factor of latents whose norm should do nothing: their squares are then 1e-12, against an eps of 1e-6


def their_name(name: str, form: TransformersForm) -> str:
    """`blocks.3.attention.q_up.weight` is `model.layers.3.self_attn.q_b_proj.weight`."""
    module, parameter = name.rsplit(".", 1)
    if module in TOP:
        return f"{TOP[module]}.{parameter}"
    _, layer, module = module.split(".", 2)
    theirs = IN_BLOCK.get(module) or f"self_attn.{form.projections[module.removeprefix('attention.')]}"
    return f"model.layers.{layer}.{theirs}.{parameter}"


def to_transformers(model: Transformer) -> dict[str, Tensor]:
    """The model's weights as the model class of transformers reads them, DeepseekV3's RoPE interleaved.

    A tied head is written out beside the embedding for DeepSeek: vLLM and SGLang do not tie it there.
    """
    config, state = model.config, model.state_dict()
    form = form_of(config)
    if config.tie_embeddings and form.architecture != "DeepseekV3ForCausalLM":
        del state["head.weight"]
    if not config.attention.latent_norm:
        _add_idle_norms(state, config)
    weights = {}
    for name, tensor in state.items():
        if (rows := _rotated_rows(name, config)) is not None:
            tensor = _move_rotated(tensor, *rows, _interleaving(config.attention.rope_dim))
        weights[their_name(name, form)] = tensor.clone()  # safetensors refuses two names for one memory
    return weights


def _add_idle_norms(state: dict[str, Tensor], config: TransformerConfig) -> None:
    """Give a converted model, which has no norm of the latent, ones that do nothing.

    RMSNorm divides by sqrt(mean of squares + eps): with latents so small that eps is all there is, by a constant. (fp16
    has no numbers so small; fp32 and bf16 do.)
    """
    latent = config.attention.kv_compressed_dim
    for i in range(config.num_layers):
        down = state[f"blocks.{i}.attention.kv_down.weight"].clone()
        down[:latent] *= IDLE
        state[f"blocks.{i}.attention.kv_down.weight"] = down
        state[f"blocks.{i}.attention.kv_norm.weight"] = down.new_full((latent,), 1e-6**0.5 / IDLE)


def from_transformers(theirs: dict[str, Tensor], config: TransformerConfig, interleaved: bool) -> dict[str, Tensor]:
    """The `state_dict` of `Transformer(config)`, in fp32; the inverse of `to_transformers`.

    Args:
        theirs: all tensors of a model, by name
        interleaved: whether RoPE rotates the pairs (2i, 2i + 1), as DeepSeek has it, or (i, i + rope_dim / 2)

    Raises:
        UserError: a tensor is missing, has another shape or no place in the model, or a tied head is not tied.
    """
    shapes = _shapes(config, theirs)
    if config.tie_embeddings:
        embedding = theirs.get("model.embed_tokens.weight")
        head = theirs.get("lm_head.weight", embedding)
        if embedding is not None and not torch.equal(head, embedding):
            raise UserError("tie_word_embeddings is true, but lm_head.weight is not model.embed_tokens.weight")
        theirs = {**theirs, "lm_head.weight": head}
    form = form_of(config)
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
            tensor = _move_rotated(tensor, *rows, _interleaving(config.attention.rope_dim).argsort())
        state[name] = tensor.float()
    return state


def _shapes(config: TransformerConfig, theirs: dict[str, Tensor]) -> dict[str, torch.Size]:
    """Of our tensors, by name; nothing is allocated, nor is there a step for each layer that config.json makes up."""
    layers = len({name.split(".")[2] for name in theirs if name.startswith("model.layers.")})
    if layers < config.num_layers:
        raise UserError(f"model.layers.{layers}.* is missing, where num_hidden_layers={config.num_layers}")
    try:
        with torch.device("meta"):
            return {name: tensor.shape for name, tensor in Transformer(config).state_dict().items()}
    except (RuntimeError, TypeError, OverflowError) as error:  # torch's words for sizes beyond 64 bits
        raise UserError("config.json describes a model of impossible sizes") from error


def _rotated_rows(name: str, config: TransformerConfig) -> tuple[int, int, int] | None:
    """The heads of a weight or bias, and in each the rows before those that RoPE rotates, and these; None without."""
    module = name.split(".")[-2]
    rows = form_of(config).rotated.get(module) if ".attention." in name else None
    if rows is None:
        return None
    layer, (heads, before) = config.layer_config(), rows
    return getattr(layer, heads) if heads else 1, getattr(layer, before), layer.rotated_dim


def _interleaving(dim: int) -> Tensor:
    """The places from which the halves' entries come to lie in pairs: 0, dim / 2, 1, dim / 2 + 1, ..."""
    return torch.arange(dim).view(2, -1).T.flatten()


def _move_rotated(tensor: Tensor, heads: int, before: int, rotated: int, order: Tensor) -> Tensor:
    """Put the rows of a weight or bias that RoPE rotates, the last of each head, in this order."""
    plain, turned = tensor.unflatten(0, (heads, -1)).split((before, rotated), dim=1)
    return torch.cat((plain, turned[:, order]), dim=1).flatten(0, 1)
