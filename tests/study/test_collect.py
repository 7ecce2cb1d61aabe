"""Which runs make a row, and how the rows are named."""

from dataclasses import replace
from pathlib import Path

from mla_lm.config import TrainConfig, TrainerConfig
from mla_lm.model.config import AttentionConfig, TransformerConfig
from mla_lm.optim.optimizer import OptimizerConfig
from mla_lm.runs.folder import RunFolder
from mla_lm.study.collect import Run, named_rows, same_but_for_seed


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


def run_in(folder: str, fingerprint: str | None = "text", **keys) -> Run:
    figures = {} if fingerprint is None else {"data_fingerprint": fingerprint}
    return Run(RunFolder(Path("/runs") / folder), TrainConfig(**keys), figures)


def test_jobs_of_a_sweep_are_named_by_what_sets_them_apart():
    """Their folders are numbers. Where nothing sets two apart, the folder does."""
    jobs = [run_in(f"sweep/{job}", optimizer=OptimizerConfig(lr=lr)) for job, lr in enumerate((0.001, 0.002))]
    assert list(named_rows([[job] for job in jobs])) == ["mha, optimizer.lr=0.001", "mha, optimizer.lr=0.002"]
    assert list(named_rows([jobs[:1]])) == ["mha"]
    others = [run_in(f"{sweep}/0", fingerprint=sweep) for sweep in ("first", "second")]
    assert list(named_rows([[run] for run in others])) == ["first/0", "second/0"]


def test_several_seeds_are_named_by_their_kind():
    runs = [run_in(f"my_run_{seed}", seed=seed) for seed in (1, 2)]
    assert list(named_rows([runs])) == ["mha"]
    assert list(named_rows([runs[:1]])) == ["my_run_1"]
    other = [run_in("mha", fingerprint="another text")]
    assert list(named_rows([runs, other])) == ["my_run_1", "mha"]


def test_runs_that_differ_in_their_seed_alone_are_one_group():
    """A run without a summary does not say what its data were: it goes with those of its configuration."""
    one, two = run_in("a", seed=1), run_in("b", seed=2)
    text = run_in("c", fingerprint="another text", seed=3)
    faster = run_in("d", seed=1, optimizer=OptimizerConfig(lr=1.0))
    killed, alone = run_in("e", None, seed=4), run_in("f", None, seed=1, tokens_per_step=4096)
    groups = same_but_for_seed([killed, one, faster, two, alone, text])
    assert groups == [[one, two, killed], [faster], [text], [alone]]
