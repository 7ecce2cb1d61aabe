"""What sets configurations apart."""

from dataclasses import replace

from mla_lm.config import CheckpointConfig, TrainConfig, TrainerConfig, differing
from mla_lm.model.config import AttentionConfig, TransformerConfig
from mla_lm.optim.optimizer import OptimizerConfig


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
