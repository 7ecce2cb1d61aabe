"""A run folder that somebody else made: what its config.yaml claims is held against its weights first."""

import resource
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from mla_lm.errors import UserError
from mla_lm.files import write_atomically
from mla_lm.runs.load import load_run
from tests.interop.hf.models import MODELS, make_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for name in ("mla-low-rank-query", "gqa"):
        attention, others = MODELS[name]
        make_run(folder / name, attention, **others)
    return folder


@pytest.mark.parametrize("size", [10**9, 10**15, 10**30])
@pytest.mark.parametrize(
    "key",
    ["num_layers", "d_model", "num_heads", "vocab_size", "ff_hidden", "attention.kv_compressed_dim",
     "attention.q_compressed_dim", "attention.rope_dim", "attention.nope_dim", "attention.value_dim"],
)  # fmt: skip
def test_sizes_that_are_not_those_of_the_weights(runs, tmp_path, key, size):
    refused_at_once(runs / "mla-low-rank-query", tmp_path, "holds another model|must|divis|too large", **{key: size})


@pytest.mark.parametrize("size", [10**12, 10**15, 10**30])
@pytest.mark.parametrize("name", ["mla-low-rank-query", "gqa"])
def test_a_context_that_no_memory_holds(runs, tmp_path, name, size):
    """It is in no weight."""
    refused_at_once(runs / name, tmp_path, "seq_len|impossible sizes", seq_len=size)


def refused_at_once(run: Path, tmp_path: Path, words: str, **model: int) -> None:
    run = shutil.copytree(run, tmp_path / "run")
    config = OmegaConf.load(run / "config.yaml")
    for key, value in model.items():
        OmegaConf.update(config.model, key, value)
    OmegaConf.save(config, run / "config.yaml")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=words):
        load_run(run)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 100_000 * 1024


@pytest.mark.parametrize("state", [None, [], [1], {"embedding.weight": 3}, {3: torch.ones(2)}, "text"])
def test_a_state_dict_that_is_none(runs, tmp_path, state):
    run = shutil.copytree(runs / "gqa", tmp_path / "run")
    write_atomically(run / "checkpoints" / "best.ckpt", lambda file: torch.save({"state_dict": state}, file))
    with pytest.raises(UserError, match=r"best\.ckpt"):
        load_run(run)


def test_what_fits_is_loaded(runs):
    for run in runs.iterdir():
        assert load_run(run)[0](torch.zeros(1, 4, dtype=torch.long)).shape == (1, 4, 257)
