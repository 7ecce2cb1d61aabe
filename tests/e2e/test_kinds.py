"""What holds for runs of every kind of attention: measured as counted, resumed bit-equal, compared in one table."""

import shutil
from pathlib import Path

import torch

from mla_lm.attention import KINDS
from mla_lm.model.size import model_size
from mla_lm.runs.checkpoint import load_checkpoint
from mla_lm.runs.folder import RunFolder
from mla_lm.terminal import cli
from scripts import compare
from tests.conftest import call_main, succeeded, summary_of
from tests.kinds import each_kind


@each_kind
def test_a_run_says_its_kind_and_cache_and_resumes_bit_equal(train, tmp_path, runs, kind):
    run = RunFolder(runs / kind)
    config, summary = run.config(), summary_of(run.path)
    elements = model_size(config.model).cache_elements_per_token_per_layer
    assert (summary["attention"], config.model.attention.kind) == (kind, kind)
    assert summary["kv_cache_elements_per_token_per_layer"] == elements
    assert summary["kv_cache_bytes_per_token"] == elements * 2 * 4  # two layers, fp32
    assert summary["kv_cache_vs_mha"] == elements / (2 * 64)
    again = RunFolder(Path(shutil.copytree(run.path, tmp_path / "again")))
    succeeded(train.bare("ckpt_path=again/checkpoints/last-1.ckpt"))
    whole, resumed = (load_checkpoint(folder.last) for folder in (run, again))
    assert resumed["global_step"] == 6
    assert all(torch.equal(tensor, whole["state_dict"][name]) for name, tensor in resumed["state_dict"].items())


def test_runs_of_all_kinds_in_one_table(tmp_path, runs):
    arguments = ["scripts.compare", *(str(runs / kind) for kind in KINDS), "--out", "comparison"]
    succeeded(call_main(lambda: cli.run(compare.main), arguments, tmp_path))
    lines = (tmp_path / "comparison" / "comparison.md").read_text().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert [line.split("|")[2].strip() for line in table[2:]] == list(KINDS)
    assert "".join(table).count("1.000") == 1  # MHA's share of MHA's cache
    assert (tmp_path / "comparison" / "comparison.png").stat().st_size > 10_000
