"""How the rows of a comparison are named."""

from dataclasses import replace
from pathlib import Path

from mla_lm.config import TrainConfig, TrainerConfig
from mla_lm.model.config import AttentionConfig, TransformerConfig
from mla_lm.optim.optimizer import OptimizerConfig
from mla_lm.runs.folder import RunFolder
from mla_lm.study.compare import Run, named_rows


def names(*configs: TrainConfig) -> list[str]:
    """Of the rows of runs in folders a, b, c, ..."""
    folders = "abcdef"[: len(configs)]
    groups = [
        [Run(RunFolder(Path("/runs") / folder), config, {})] for folder, config in zip(folders, configs, strict=True)
    ]
    return list(named_rows(groups))


def mla(kv_compressed_dim: int, **sizes: int) -> TrainConfig:
    return TrainConfig(
        model=TransformerConfig(
            attention=AttentionConfig(kind="mla", kv_compressed_dim=kv_compressed_dim, rope_dim=16), **sizes
        )
    )


def test_names_leave_out_what_columns_tell():
    mha = TrainConfig(model=TransformerConfig(ff_hidden=688), trainer=TrainerConfig(max_steps=7), seed=3)
    assert names(mla(64), mha) == ["a", "b"]
    assert names(mla(64), mla(64, d_model=512, ff_hidden=900)) == ["a, model.d_model=256", "b, model.d_model=512"]
    key = "model.attention.kv_compressed_dim"
    assert names(mla(64), mla(80), mha) == [f"a, {key}=64", f"b, {key}=80", "c"]
    rates = [replace(config, optimizer=OptimizerConfig(lr=lr)) for config in (mla(64), mha) for lr in (1e-3, 3e-4)]
    assert names(*rates) == [f"{name}, optimizer.lr={lr}" for name, lr in zip("abcd", [0.001, 0.0003] * 2, strict=True)]


def test_names_of_long_values_keep_their_ends():
    paths = [f"/home/someone/projects/language/models/{name}" for name in ("first", "second")]
    for path, name in zip(paths, names(*(TrainConfig(init_from=path) for path in paths)), strict=True):
        value = name.partition("=")[2]
        assert len(value) == 40
        assert value.startswith("...")
        assert path.endswith(value[3:])


def test_folders_of_one_name_are_named_with_the_one_above():
    runs = [Run(RunFolder(Path(f"/runs/{sweep}/0")), TrainConfig(), {}) for sweep in ("first", "second")]
    assert list(named_rows([[run] for run in runs])) == ["first/0", "second/0"]
    assert list(named_rows([runs])) == ["0 (2 runs)"]  # of the same seed
