"""The configuration that a command line of train.py stands for, without its data."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from mla_lm.config import TrainConfig, register_schema
from mla_lm.data.config import SMALLEST_BPE, DataConfig
from mla_lm.data.tokenizer import load_tokenizer, vocabulary_size
from mla_lm.errors import UserError
from mla_lm.terminal import cli


def train_config(conf: Path, overrides: Sequence[str]) -> TrainConfig:
    """Compose what train.py would train with.

    Args:
        conf: the folder of train.yaml

    Raises:
        UserError and Hydra's errors: what train.py would refuse, and a vocabulary that only the data could tell.
    """
    register_schema()
    with initialize_config_dir(str(conf), version_base="1.3"):
        settings = compose("train", list(overrides))
    cli.check_keys(settings, TrainConfig)
    config: TrainConfig = OmegaConf.to_object(settings)  # type: ignore[assignment]
    config.model.layer_config()
    config.model.vocab_size = vocabulary(config)
    return config


def check_without_data(config: TrainConfig) -> None:
    """Raises UserError for what `TrainConfig.check` refuses, the keys of the data apart."""
    replace(config, data=DataConfig()).check()


def vocabulary(config: TrainConfig) -> int:
    """Entries of the tokenizer, as far as the configuration tells; UserError where it does not."""
    size, tokenizer = config.model.vocab_size, config.data.tokenizer
    if size is None:
        tokenizer.check()
        if tokenizer.kind == "bpe":
            return tokenizer.vocab_size
        if tokenizer.kind == "bytes":
            return SMALLEST_BPE
        if tokenizer.kind == "file":
            return vocabulary_size(load_tokenizer(Path(str(tokenizer.file)).expanduser()))
        raise UserError(
            f"how many entries data.tokenizer.kind={tokenizer.kind} has is not in the configuration: "
            "give model.vocab_size, for example model.vocab_size=50257"
        )
    if size < 1:
        raise UserError(f"model.vocab_size={size} must be at least 1")
    return size
