"""What a configuration may say, and what sets configurations apart."""

from dataclasses import replace

import pytest
from omegaconf import OmegaConf

from mla_lm import UserError
from mla_lm.config import CheckpointConfig, TrainConfig, TrainerConfig, differing
from mla_lm.model.config import AttentionConfig, TransformerConfig
from mla_lm.optim.optimizer import OptimizerConfig


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainer.max_steps=0", ["trainer.max_steps=0 must be at least 1"]),
        ("trainer.devices=0", ["trainer.devices=0 must be at least 1"]),
        ("trainer.overfit_batches=0", ["trainer.overfit_batches=0 must be at least 1"]),
        ("trainer.precision=fp8", ["trainer.precision=fp8", "bf16-mixed"]),
        ("trainer.accelerator=tpu", ["trainer.accelerator=tpu", "gpu"]),
        ("trainer.profiler=deep", ["trainer.profiler=deep", "advanced"]),
        ("logger.kind=paper", ["logger.kind=paper", "tensorboard"]),
        ("kv_cache_dtype=int4", ["kv_cache_dtype=int4", "int8"]),
        ("on_nonfinite=pray", ["on_nonfinite=pray", "skip"]),
        ("run.resume=never", ["run.resume=never", "auto"]),
        ("tokens_per_step=100", ["tokens_per_step=100", "model.seq_len x devices = 256"]),
        ("trainer.devices=3", ["tokens_per_step=2048", "model.seq_len x devices = 768"]),
        ("model.attention.yarn.factor=4", ["yarn.factor=4.0", "init_from=RUN"]),
        ("checkpoint.keep_last=101", ["checkpoint.keep_last=101", "at most 100"]),
        ("step_timeout=-1", ["step_timeout=-1"]),
        ("samples.temperature=-1", ["samples.temperature"]),
        ("samples.temperature=nan", ["samples.temperature"]),
        ("seed=-1", ["seed=-1"]),
        ("seed=4294967296", ["seed=4294967296"]),
    ],
)
def test_a_mistake_names_the_key_and_what_would_be_right(override, words):
    config = OmegaConf.merge(TrainConfig, OmegaConf.from_dotlist(["model.seq_len=256", override]))
    with pytest.raises(UserError) as error:
        OmegaConf.to_object(config).check()
    assert all(word in str(error.value) for word in words), str(error.value)


def test_the_defaults_are_in_order():
    TrainConfig().check()


def test_differing_names_the_keys_in_the_order_of_the_fields():
    configs = [
        TrainConfig(optimizer=OptimizerConfig(lr=lr), model=TransformerConfig(attention=AttentionConfig(rope_dim=dim)))
        for lr, dim in ((1e-3, 8), (2e-3, 8), (1e-3, 16))
    ]
    assert differing(configs) == ["model.attention.rope_dim", "optimizer.lr"]
    assert differing(configs[:2]) == ["optimizer.lr"]
    assert differing(configs[:1]) == []


def test_differing_leaves_out_what_says_nothing_of_the_result():
    config = TrainConfig()
    assert differing([config, replace(config, tags=["a"], checkpoint=CheckpointConfig(every_n_steps=7))]) == []
    assert differing([config, replace(config, trainer=TrainerConfig(devices=2))]) == []
    longer = replace(config, trainer=TrainerConfig(max_steps=7, precision="32-true"), seed=9)
    assert differing([config, longer]) == ["seed", "trainer.max_steps", "trainer.precision"]
    filled_in = replace(config, model=TransformerConfig(vocab_size=300, document_token=2))
    assert differing([config, filled_in]) == []
