"""What holds for runs of every kind of attention: measured as counted, resumed bit-equal, compared in one table."""

import json
import shutil

import pytest
import torch

from mla_lm.attention import KINDS
from mla_lm.runs.checkpoint import load_checkpoint
from mla_lm.runs.folder import RunFolder
from mla_lm.terminal import cli
from scripts import compare
from tests.conftest import call_main, succeeded, summary_of
from tests.kinds import each_kind

LITTLE = (
    "model.seq_len=32",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "trainer.max_steps=4",
    "tokens_per_step=128",
    "val_every_n_steps=2",
    "checkpoint.every_n_steps=2",
    "log_every_n_steps=1",
    "samples.max_tokens=0",
    "logger=none",
    "compile=false",
)


@pytest.fixture
def trained(train, tmp_path):
    """A run of a kind's smallest preset, by its name."""

    def trained(kind: str):
        succeeded(train.bare(f"model={kind}_tiny", *LITTLE, *train.data, f"hydra.run.dir={kind}"))
        return RunFolder(tmp_path / kind)

    return trained


@each_kind
def test_a_run_says_its_kind_and_cache_and_resumes_bit_equal(train, tmp_path, trained, kind):
    run = trained(kind)
    config, summary = run.config(), summary_of(run.path)
    elements = config.model.layer_config().cached_elements
    assert (summary["attention"], config.model.attention.kind) == (kind, kind)
    assert summary["kv_cache_elements_per_token_per_layer"] == elements
    assert summary["kv_cache_bytes_per_token"] == elements * 3 * 4  # three layers, fp32
    assert summary["kv_cache_vs_mha"] == elements / (2 * 128)
    again = RunFolder(tmp_path / "again")
    shutil.copytree(run.path, again.path)
    succeeded(train.bare("ckpt_path=again/checkpoints/last-1.ckpt"))
    whole, resumed = (load_checkpoint(folder.last) for folder in (run, again))
    assert resumed["global_step"] == 4
    assert all(torch.equal(tensor, whole["state_dict"][name]) for name, tensor in resumed["state_dict"].items())


def test_runs_of_all_kinds_in_one_table(tmp_path, trained):
    for kind in KINDS:
        trained(kind)
    arguments = ["scripts.compare", *KINDS, "--out", "comparison"]
    table = succeeded(call_main(lambda: cli.run(compare.main), arguments, tmp_path)).stdout
    assert [line.split("|")[2].strip() for line in table.splitlines()[2:]] == list(KINDS)
    assert json.dumps(table).count("1.000") == 1  # MHA's share of MHA's cache
    assert (tmp_path / "comparison" / "comparison.png").stat().st_size > 10_000
