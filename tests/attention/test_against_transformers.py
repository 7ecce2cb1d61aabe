"""The same weights in transformers' models give the same logits."""

import math

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM

from mla_lm import AttentionConfig, Transformer, TransformerConfig
from mla_lm.attention import YarnConfig
from mla_lm.attention.gqa import kind_of_heads

SIZES = {"num_layers": 2, "d_model": 64, "num_heads": 4, "seq_len": 32, "ff_hidden": 96, "vocab_size": 101}
SHARED = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "intermediate_size": 96,
    "vocab_size": 101,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
BLOCK_NAMES = {
    "attention_norm": "input_layernorm",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward.gate_proj": "mlp.gate_proj",
    "feed_forward.up_proj": "mlp.up_proj",
    "feed_forward.down_proj": "mlp.down_proj",
    "attention.out_proj": "self_attn.o_proj",
}
MLA_NAMES = {
    "attention.q_proj": "self_attn.q_proj",
    "attention.q_down": "self_attn.q_a_proj",
    "attention.q_norm": "self_attn.q_a_layernorm",
    "attention.q_up": "self_attn.q_b_proj",
    "attention.kv_down": "self_attn.kv_a_proj_with_mqa",
    "attention.kv_norm": "self_attn.kv_a_layernorm",
    "attention.kv_up": "self_attn.kv_b_proj",
}
MHA_NAMES = {f"attention.{name}": f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")}


def model_with_random_weights(attention: AttentionConfig) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(**SIZES, attention=attention, tie_embeddings=False)).eval()
    for parameter in model.parameters():  # larger than at initialisation, and norms away from 1
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    return model


def their_names(model: Transformer, layer_names: dict[str, str]) -> dict[str, torch.Tensor]:
    top = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
    state = {}
    for name, tensor in model.state_dict().items():
        module = name.removesuffix(".weight")
        if module in top:
            state[f"{top[module]}.weight"] = tensor
        else:
            _, layer, module = module.split(".", 2)
            state[f"model.layers.{layer}.{(BLOCK_NAMES | layer_names)[module]}.weight"] = tensor
    return state


def assert_equal_logits(ours: Transformer, theirs, layer_names: dict[str, str]) -> None:
    theirs.load_state_dict(their_names(ours, layer_names), strict=True)
    tokens = torch.randint(101, (2, 32))
    with torch.no_grad():
        expected, logits = theirs.eval()(tokens).logits, ours(tokens)
    assert expected.std() > 0.5
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("q_compressed_dim", [None, 20])
@pytest.mark.parametrize(("nope_dim", "value_dim"), [(8, 16), (16, 16), (12, 24)])
def test_mla_is_deepseek_v3(q_compressed_dim, nope_dim, value_dim):
    ours = model_with_random_weights(
        AttentionConfig(
            kind="mla",
            kv_compressed_dim=24,
            q_compressed_dim=q_compressed_dim,
            rope_dim=8,
            nope_dim=nope_dim,
            value_dim=value_dim,
        )
    )
    config = DeepseekV3Config(
        **SHARED,
        num_key_value_heads=4,
        kv_lora_rank=24,
        q_lora_rank=q_compressed_dim,
        qk_rope_head_dim=8,
        qk_nope_head_dim=nope_dim,
        v_head_dim=value_dim,
        first_k_dense_replace=2,
        rope_interleave=False,
        num_nextn_predict_layers=0,
    )
    assert_equal_logits(ours, DeepseekV3ForCausalLM(config), MLA_NAMES)


@pytest.mark.parametrize(("mscale", "mscale_all_dim"), [(1.0, 1.0), (0.707, 0.707), (1.0, 0.5)])
@pytest.mark.parametrize("original_seq_len", [8, 200])
def test_mla_with_yarn_is_deepseek_v3(mscale, mscale_all_dim, original_seq_len):
    yarn = YarnConfig(4.0, original_seq_len, beta_fast=16.0, mscale=mscale, mscale_all_dim=mscale_all_dim)
    ours = model_with_random_weights(
        AttentionConfig(kind="mla", kv_compressed_dim=24, rope_dim=16, nope_dim=8, yarn=yarn)
    )
    scaling = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": original_seq_len,
        "beta_fast": 16.0,
        "beta_slow": 1.0,
        "mscale": mscale,
        "mscale_all_dim": mscale_all_dim,
    }
    config = DeepseekV3Config(
        **{**SHARED, "rope_parameters": scaling},
        num_key_value_heads=4,
        kv_lora_rank=24,
        q_lora_rank=None,
        qk_rope_head_dim=16,
        qk_nope_head_dim=8,
        v_head_dim=16,
        first_k_dense_replace=2,
        rope_interleave=False,
        num_nextn_predict_layers=0,
    )
    assert_equal_logits(ours, DeepseekV3ForCausalLM(config), MLA_NAMES)


@pytest.mark.parametrize("num_kv_heads", [4, 1])
def test_mha_with_yarn_is_llama(num_kv_heads):
    """Its scores are sharpened through the cosines and sines alone, which all of its dimensions go through."""
    yarn = YarnConfig(4.0, 8, mscale=0.8, mscale_all_dim=0.3)
    ours = model_with_random_weights(
        AttentionConfig(kind=kind_of_heads(num_kv_heads, 4), num_kv_heads=num_kv_heads, yarn=yarn)
    )
    scaling = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 8}
    scaling["attention_factor"] = 0.1 * 0.8 * math.log(4.0) + 1
    theirs = LlamaForCausalLM(LlamaConfig(**{**SHARED, "rope_parameters": scaling}, num_key_value_heads=num_kv_heads))
    assert_equal_logits(ours, theirs, MHA_NAMES)


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_mha_gqa_and_mqa_are_llama(num_kv_heads):
    ours = model_with_random_weights(AttentionConfig(kind=kind_of_heads(num_kv_heads, 4), num_kv_heads=num_kv_heads))
    theirs = LlamaForCausalLM(LlamaConfig(**SHARED, num_key_value_heads=num_kv_heads))
    assert_equal_logits(ours, theirs, MHA_NAMES)
