"""The presets of conf/model: kinds of one size are equal in parameters, and MLA's cache is small."""

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from mla_lm.config import register_schema
from mla_lm.model.config import TransformerConfig
from mla_lm.model.size import ModelSize, model_size
from tests.conftest import ROOT

KINDS = ("mla", "mha", "gqa", "mqa")
# Size: vocabulary it is meant for, and about how many parameters it has with it.
SIZES = {"tiny": (4096, 1e6), "small": (4096, 2.6e6), "medium": (50257, 124e6), "large": (50257, 350e6)}


def preset(name: str) -> TransformerConfig:
    register_schema()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return OmegaConf.to_object(compose("train", [f"model={name}"]).model)


def sizes_of(size: str) -> dict[str, ModelSize]:
    sizes = {}
    for kind in KINDS:
        config = preset(f"{kind}_{size}")
        config.vocab_size = SIZES[size][0]
        sizes[kind] = model_size(config)
        assert sizes[kind].attention == kind
    return sizes


@pytest.mark.parametrize("size", SIZES)
def test_parameters_are_matched(size):
    sizes = sizes_of(size)
    for kind in KINDS:
        assert sizes[kind].parameters == pytest.approx(sizes["mha"].parameters, rel=0.01)
        assert sizes[kind].parameters == pytest.approx(SIZES[size][1], rel=0.15)
        assert sizes[kind].flops_per_token == pytest.approx(sizes["mha"].flops_per_token, rel=0.01)


@pytest.mark.parametrize("size", SIZES)
def test_mla_caches_little_and_fits_fused_attention(size):
    sizes, attention = sizes_of(size), preset(f"mla_{size}").attention
    mla, mha = (sizes[kind].cache_elements_per_token_per_layer for kind in ("mla", "mha"))
    assert mla / mha <= 0.21
    assert attention.nope_dim + attention.rope_dim == attention.value_dim


@pytest.mark.parametrize("size", SIZES)
def test_kinds_differ_in_attention_and_feed_forward_only(size):
    def shared(config: TransformerConfig) -> dict:
        return {k: v for k, v in vars(config).items() if k not in ("attention", "ff_hidden")}

    assert all(shared(preset(f"{kind}_{size}")) == shared(preset(f"mha_{size}")) for kind in KINDS)


# Experiment: what else it needs on the command line, its vocabulary, and about how many parameters its head speaks of.
EXPERIMENTS = {
    "extend_context": (["init_from=run"], 4096, 2.59e6),
    "python_stdlib_small": ([], 4096, 2.59e6),
    "shakespeare_char": (["data.files=input.txt"], 66, 0.79e6),
    "tinystories_30m": ([], 8192, 29.4e6),
    "wikitext103_medium": ([], 16384, 97.5e6),
}


def test_every_experiment_is_known_here():
    assert sorted(EXPERIMENTS) == sorted(file.stem for file in (ROOT / "conf" / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments(name):
    overrides, vocab_size, parameters = EXPERIMENTS[name]
    register_schema()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = OmegaConf.to_object(compose("train", [f"experiment={name}", *overrides]))
    config.check()
    if config.data.tokenizer.kind == "bpe":
        assert config.data.tokenizer.vocab_size == vocab_size
    config.model.vocab_size = vocab_size
    assert model_size(config.model).parameters == pytest.approx(parameters, rel=0.01)
    assert config.model.attention_kind == "mla"
