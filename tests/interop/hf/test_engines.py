"""Which engines take which shape: those of models that they are known to serve, and of the presets."""

from dataclasses import replace

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from mla_lm import AttentionConfig, TransformerConfig
from mla_lm.config import register_schema
from mla_lm.interop.hf.engines import engines_for
from mla_lm.model.size import model_size
from tests.conftest import ROOT


def takes(num_layers: int = 61, d_model: int = 7168, num_heads: int = 128, **attention: int | str | None) -> dict:
    config = TransformerConfig(num_layers, d_model, num_heads, attention=AttentionConfig(**attention), vocab_size=1000)
    return {verdict.engine: verdict.takes for verdict in engines_for(config)}


def preset(name: str) -> TransformerConfig:
    register_schema()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = OmegaConf.to_object(compose("train", [f"model={name}"]).model)
    config.vocab_size = 50257
    return config


ALL = {"transformers": True, "vLLM": True, "SGLang": True, "llama.cpp": True}
DEEPSEEK = {"kind": "mla", "kv_compressed_dim": 512, "rope_dim": 64, "nope_dim": 128, "value_dim": 128}


def test_deepseek():
    assert takes(**DEEPSEEK, q_compressed_dim=1536) == ALL
    assert takes(num_layers=27, d_model=2048, num_heads=16, **DEEPSEEK, q_compressed_dim=None) == ALL  # V2-Lite


def test_mistral_small_4():
    """vLLM takes its halved latent."""
    sizes = {
        "kind": "mla",
        "kv_compressed_dim": 256,
        "rope_dim": 64,
        "nope_dim": 64,
        "value_dim": 128,
        "q_compressed_dim": 1024,
    }
    assert takes(36, 4096, 32, **sizes)["vLLM"] is True


@pytest.mark.parametrize(
    ("change", "engine", "word"),
    [
        ({"kv_compressed_dim": 384}, "vLLM", "kv_compressed_dim + rope_dim is 448"),
        ({"nope_dim": 96}, "vLLM", "(96, 64, 128)"),
        ({"q_compressed_dim": None}, "llama.cpp", "set q_compressed_dim"),
        ({"num_layers": 27}, "llama.cpp", "27 layers"),
        ({"kv_compressed_dim": 256, "rope_dim": 72}, "SGLang", "kv_compressed_dim=256, rope_dim=72"),
    ],
)
def test_what_keeps_an_engine_from_it(change, engine, word):
    sizes = {"num_layers": 61, **DEEPSEEK, "q_compressed_dim": 1536, **change}
    assert takes(**sizes)[engine] is False
    config = TransformerConfig(sizes.pop("num_layers"), 7168, 128, attention=AttentionConfig(**sizes), vocab_size=1000)
    (verdict,) = (verdict for verdict in engines_for(config) if verdict.engine == engine)
    assert word in verdict.notes[0]


def test_the_kernel_of_sglang_that_reads_values_from_keys():
    """Its block of keys is 512 wide for 256 + 64, that of values 256: only FlashAttention 3 is left."""
    config = TransformerConfig(
        attention=AttentionConfig(kind="mla", kv_compressed_dim=256, rope_dim=64), vocab_size=1000
    )
    (verdict,) = (verdict for verdict in engines_for(config) if verdict.engine == "SGLang")
    assert verdict.takes
    assert "triton" not in verdict.notes[0]


def test_llamas():
    assert takes(4, 256, 4, kind="gqa", num_kv_heads=2) == {**ALL, "SGLang": None}
    assert takes(4, 20, 2, kind="mha", num_kv_heads=2)["vLLM"] is None  # heads of 10
    gqa = AttentionConfig(kind="gqa", num_kv_heads=2)
    for unchecked in (
        TransformerConfig(use_bias=True, attention=gqa, vocab_size=1000),
        TransformerConfig(attention=replace(gqa, rope_dim=16), vocab_size=1000),
    ):
        assert [verdict.takes for verdict in engines_for(unchecked)] == [True, None, None, None]


def test_the_serving_preset():
    config, reference = preset("mla_serving"), preset("mha_medium")
    assert takes(config.num_layers, config.d_model, config.num_heads, **vars_of(config)) == ALL
    size, mha = model_size(config), model_size(reference)
    assert size.parameters == pytest.approx(mha.parameters, rel=0.01)
    assert size.cache_elements_per_token_per_layer / mha.cache_elements_per_token_per_layer == 0.375


def vars_of(config: TransformerConfig) -> dict:
    names = ("kind", "kv_compressed_dim", "q_compressed_dim", "rope_dim", "nope_dim", "value_dim")
    return {name: getattr(config.attention, name) for name in names}
