"""The weights of a model under the names and in the layout of transformers' DeepseekV3 and Llama, and back."""

import torch
from torch import Tensor

from mla_lm.errors import UserError
from mla_lm.model.config import TransformerConfig
from mla_lm.model.transformer import Transformer

TOP = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
IN_BLOCK = {
    "attention_norm": "input_layernorm",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward.gate_proj": "mlp.gate_proj",
    "feed_forward.up_proj": "mlp.up_proj",
    "feed_forward.down_proj": "mlp.down_proj",
    "attention.q_proj": "self_attn.q_proj",
    "attention.k_proj": "self_attn.k_proj",
    "attention.v_proj": "self_attn.v_proj",
    "attention.out_proj": "self_attn.o_proj",
    "attention.q_down": "self_attn.q_a_proj",
    "attention.q_norm": "self_attn.q_a_layernorm",
    "attention.q_up": "self_attn.q_b_proj",
    "attention.kv_down": "self_attn.kv_a_proj_with_mqa",
    "attention.kv_norm": "self_attn.kv_a_layernorm",
    "attention.kv_up": "self_attn.kv_b_proj",
}
IDLE = 1e-6  # factor of latents whose norm should do nothing: their squares are then 1e-12, against an eps of 1e-6
ROTATED = (".attention.q_proj.", ".attention.q_up.", ".attention.kv_down.")  # of MLA


def their_name(name: str) -> str:
    """`blocks.3.attention.q_up.weight` is `model.layers.3.self_attn.q_b_proj.weight`."""
    module, parameter = name.rsplit(".", 1)
    if module in TOP:
        return f"{TOP[module]}.{parameter}"
    _, layer, module = module.split(".", 2)
    return f"model.layers.{layer}.{IN_BLOCK[module]}.{parameter}"


def to_transformers(model: Transformer) -> dict[str, Tensor]:
    """The model's weights as DeepseekV3ForCausalLM (MLA, with interleaved RoPE) or LlamaForCausalLM reads them.

    A tied head is written out beside the embedding for DeepSeek: vLLM and SGLang do not tie it there.
    """
    config, state = model.config, model.state_dict()
    if config.tie_embeddings and config.attention_kind != "mla":
        del state["head.weight"]
    if config.attention_kind == "mla" and not config.attention.latent_norm:
        _add_idle_norms(state, config)
    weights = {}
    for name, tensor in state.items():
        if _is_rotated(name, config):
            tensor = _move_rotated_rows(name, tensor, config, _interleaving(config.attention.rope_dim))
        weights[their_name(name)] = tensor.clone()  # safetensors refuses two names for one memory
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
    names = {name: their_name(name) for name in shapes}
    if extra := sorted(set(theirs) - set(names.values())):
        raise UserError(f"{extra[0]} has no place in the model that config.json describes ({len(extra)} such tensors)")
    state = {}
    for name, their in names.items():
        tensor = theirs.get(their)
        if tensor is None:
            raise UserError(f"{their} is missing")
        if tensor.shape != shapes[name]:
            raise UserError(f"{their} is {list(tensor.shape)}, config.json makes it {list(shapes[name])}")
        if interleaved and _is_rotated(name, config):
            order = _interleaving(config.attention.rope_dim).argsort()
            tensor = _move_rotated_rows(name, tensor, config, order)
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


def _is_rotated(name: str, config: TransformerConfig) -> bool:
    return config.attention_kind == "mla" and any(part in name for part in ROTATED)


def _interleaving(dim: int) -> Tensor:
    """The places from which the halves' entries come to lie in pairs: 0, dim / 2, 1, dim / 2 + 1, ..."""
    return torch.arange(dim).view(2, -1).T.flatten()


def _move_rotated_rows(name: str, tensor: Tensor, config: TransformerConfig, order: Tensor) -> Tensor:
    """Put the rows of a weight or bias that RoPE rotates, the last of each head, in this order."""
    layer = config.layer_config()
    if ".kv_down." in name:
        heads, others = 1, layer.kv_compressed_dim
    else:
        heads, others = layer.num_heads, layer.nope_dim
    plain, rotated = tensor.unflatten(0, (heads, -1)).split((others, layer.rope_dim), dim=1)
    return torch.cat((plain, rotated[:, order]), dim=1).flatten(0, 1)
