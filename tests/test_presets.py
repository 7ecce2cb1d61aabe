"""MLA's presets have a small cache, and every experiment is what its head says. The rest of presets: test_kinds.py."""

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from mla_lm.config import register_schema
from mla_lm.model.size import model_size
from mla_lm.study.compose import train_config
from tests.conftest import ROOT
from tests.kinds import preset_of


@pytest.mark.parametrize("size", ["tiny", "small", "medium", "large"])
def test_mla_caches_little_and_fits_fused_attention(size):
    mla, mha = (preset_of(f"{kind}_{size}").layer_config() for kind in ("mla", "mha"))
    assert mla.cached_elements / mha.cached_elements <= 0.21
    attention = preset_of(f"mla_{size}").attention
    assert attention.nope_dim + attention.rope_dim == attention.value_dim


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
    assert config.model.attention.kind == "mla"


@pytest.mark.parametrize(
    ("overrides", "tokens"),
    [
        ([], 2048),
        (["trainer=cpu"], 2048),
        (["trainer=gpu"], None),
        (["trainer=gpu", "tokens_per_step=4096"], 4096),
        (["trainer=gpu", "experiment=tinystories_30m"], 65536),
        (["trainer=gpu", "debug=overfit"], 1024),
    ],
    ids=str,
)
def test_only_a_gpu_leaves_the_step_open(overrides, tokens):
    config = train_config(ROOT / "conf", overrides)
    assert config.tokens_per_step == tokens
    assert config.trainer.accelerator == {"trainer=cpu": "cpu", "trainer=gpu": "gpu"}.get(
        " ".join(overrides[:1]), "auto"
    )
