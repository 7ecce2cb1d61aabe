"""What a configuration may say, what its keys are to a run, and what sets configurations apart."""

import os
from dataclasses import asdict, replace

import pytest
from omegaconf import OmegaConf

from mla_lm.config import (
    MARKS,
    CheckpointConfig,
    TrainConfig,
    TrainerConfig,
    config_hash,
    differing,
    is_left_open,
    may_change,
    with_absolute_paths,
)
from mla_lm.data.config import PartConfig
from mla_lm.errors import UserError
from mla_lm.model.config import AttentionConfig, TransformerConfig
from mla_lm.optim.optimizer import OptimizerConfig
from mla_lm.optim.schedule import ScheduleConfig
from mla_lm.runs.config_file import changed

MAY_CHANGE = [
    "compile", "ckpt_path", "trust", "micro_batch_tokens", "val_every_n_steps", "log_every_n_steps",
    "kv_cache_dtype", "loss_by_position", "on_nonfinite", "step_timeout", "tags", "run.resume",
    "checkpoint.every_n_steps", "checkpoint.keep_last", "samples.max_tokens", "samples.temperature",
    "model.activation_checkpointing", "data.cache_dir", "data.num_workers", "data.prompts", "trainer.max_steps",
    "trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.precision", "trainer.fp8",
    "trainer.profiler", "logger.kind", "logger.project", "logger.group", "logger.name",
]  # fmt: skip


def test_what_a_run_may_go_on_with():
    assert [key for key in MARKS if may_change(key)] == sorted(MAY_CHANGE, key=list(MARKS).index)


def test_what_is_filled_in_is_left_open_as_null_or_auto_alone():
    open_keys = ["compile", "micro_batch_tokens", "model.vocab_size", "model.document_token"]
    open_keys += ["tokens_per_step", "trainer.accelerator", "trainer.precision"]
    default = {key: "auto" if key.startswith("trainer.") else None for key in open_keys}
    assert all(is_left_open(key, value) for key, value in default.items())
    assert not is_left_open("compile", False)
    assert not is_left_open("tokens_per_step", 2048)
    assert not is_left_open("trainer.precision", "32-true")
    assert not is_left_open("kv_cache_dtype", None)


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


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("seed", 2), ("trainer.max_steps", 7), ("trainer.overfit_batches", 1), ("trainer.fp8", True)),
        *(("model.vocab_size", 300), ("model.document_token", 2), ("data.path", "org/name")),
        ("data.tokenizer.path", "org/name"),
    ],
)
def test_what_decides_the_result_is_hashed(key, value):
    assert config_hash(changed(TrainConfig(), {key: value})) != config_hash(TrainConfig())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("compile", True), ("trainer.precision", "32-true"), ("trainer.devices", 2), ("logger.project", "other")),
        *(("data.files", ["a", "/b"]), ("data.cache_dir", "/c"), ("data.tokenizer.file", "d"), ("init_from", "e")),
    ],
)
def test_paths_logging_and_hardware_are_not_hashed(key, value):
    assert config_hash(changed(TrainConfig(), {key: value})) == config_hash(TrainConfig())


def test_where_a_folder_lies_is_not_hashed():
    """A name of the Hub is, and a folder laid out like one stands for itself."""
    here, there = (config_hash(changed(TrainConfig(), {"data.path": path})) for path in ("/here/set", "/there/set"))
    assert here == there != config_hash(TrainConfig(data=replace(TrainConfig().data, path="org/set")))


def test_absolute_paths_are_those_of_a_copy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    config = TrainConfig(init_from="run")
    config.data.files, config.data.path, config.data.tokenizer.path = 2024, "org/set", "set"
    config.data.parts = [PartConfig(files=["a", "~/b"]), PartConfig(path="set")]
    before = asdict(config)
    data = with_absolute_paths(config).data
    assert asdict(config) == before
    assert (data.files, data.path, data.tokenizer.path) == (f"{tmp_path}/2024", "org/set", f"{tmp_path}/set")
    assert (data.cache_dir, data.tokenizer.file) == (f"{tmp_path}/data/cache", None)
    assert data.parts[0].files == [f"{tmp_path}/a", os.path.expanduser("~/b")]
    assert data.parts[1].path == f"{tmp_path}/set"


def test_windows_are_short_in_the_first_steps():
    config = TrainConfig(schedule=ScheduleConfig(short_seq_len=32, short_fraction=0.5))
    assert (config.window_length(0), config.window_length(3599)) == (32, 256)
    assert config.mean_window_length == (32 + 256) / 2


def test_a_model_is_evaluated_in_batches_that_any_device_holds():
    config = TrainConfig(tokens_per_step=2**19, micro_batch_tokens=2**18, model=TransformerConfig(seq_len=1024))
    assert (config.micro_batch_size, config.evaluation_batch_size) == (256, 8)
    for tokens, size in ((None, 8), (2048, 2), (100, 1)):
        config.micro_batch_tokens = tokens
        assert config.micro_batch_size == config.evaluation_batch_size == size
