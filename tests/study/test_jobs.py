"""Which jobs of a study are missing, by what lies in its folder."""

import functools
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla_lm.config import with_absolute_paths
from mla_lm.errors import UserError
from mla_lm.study.declaration import StudyConfig, declared
from mla_lm.study.jobs import Job, Plan
from mla_lm.study.manifest import manifest
from mla_lm.study.planned_rows import PlannedRow, Planner
from tests.conftest import ROOT, TWO_KINDS

CONF = ROOT / "conf"
FIGURES = {
    "attention": "mla", "data_fingerprint": "", "parameters": 1, "tokens_seen": 1, "test_loss": 1.0,
    "kv_cache_bytes_per_token": 1, "val_perplexity": None, "val_bits_per_byte": None, "test_perplexity": None,
    "test_bits_per_byte": None, "kv_cache_bytes_at_seq_len": None, "kv_cache_vs_mha": None, "tokens_per_second": None,
    "accelerator": "cpu", "threads": 1,
}  # fmt: skip


def plan_of(folder: Path, *overrides: str) -> Plan:
    return Plan(*planned(overrides), "smoke", folder)


@functools.cache
def planned(overrides: tuple[str, ...]) -> tuple[StudyConfig, list[PlannedRow]]:
    study = declared(CONF, "smoke", [*TWO_KINDS, *overrides])
    return study, Planner(study, CONF).rows()


def finish(plan: Plan, job: Job, loss: float, processor: str = "A", **figures) -> None:
    """Leave what a run leaves that has finished."""
    run = plan.run(job)
    run.path.mkdir(parents=True)
    summary = {**FIGURES, "finished": True, "val_loss": loss, "processor": processor, **figures}
    run.summary_file.write_text(json.dumps(summary))


def test_jobs_follow_from_what_is_finished(tmp_path):
    """Tuning, then a rate beyond the end where the best lies, then the seeds; a new process sees the same."""
    plan = plan_of(tmp_path)
    assert [(job.row, job.role, job.lr, job.seed) for job in plan.ready()] == [
        (f"{kind}_tiny", "tuning", lr, 1000) for kind in ("mla", "mha") for lr in (3e-3, 6e-3)
    ]
    assert plan.still_unknown() == 4
    first, second, *_ = plan.ready()
    assert second in plan.ready(running=[first])
    assert first not in plan.ready(running=[first])
    finish(plan, first, 3.0)
    finish(plan, second, 2.0)
    beyond = Job("mla_tiny", "tuning", 1.2e-2, 1000)
    assert [job for job in plan.ready() if job.row == "mla_tiny"] == [beyond]

    finish(plan, beyond, 2.5)
    of_mla = [job for job in plan_of(tmp_path).ready() if job.row == "mla_tiny"]
    assert of_mla == [Job("mla_tiny", "seed", 6e-3, 1), Job("mla_tiny", "seed", 6e-3, 2)]
    assert plan.still_unknown() == 2
    row = manifest(plan)["rows"][0]
    assert row["lr"] == 6e-3
    assert row["tried"] == {"0.003": 3.0, "0.006": 2.0, "0.012": 2.5}
    assert [run["status"] for run in row["runs"]] == ["finished"] * 3 + ["missing"] * 2


def test_a_diverged_run_is_a_result_and_a_failed_one_is_not(tmp_path):
    plan = plan_of(tmp_path)
    low, high, *_ = plan.ready()
    finish(plan, low, 3.0)
    plan.run(high).path.mkdir(parents=True)
    plan.run(high).summary_file.write_text(json.dumps({"finished": False, "diverged": True}))
    assert plan.search(plan.rows["mla_tiny"]).tried == {3e-3: 3.0, 6e-3: float("inf")}
    (lower,) = [job for job in plan.ready() if job.row == "mla_tiny"]
    assert lower.lr == 1.5e-3

    plan.given_up.add(lower)
    assert not [job for job in plan.ready() if job.row == "mla_tiny"]  # no seeds at a rate that is not the best
    assert plan.lr(plan.rows["mla_tiny"]) is None
    assert plan_of(tmp_path).ready()[0] == lower  # the next command runs it again


def test_one_learning_rate_needs_no_tuning(tmp_path):
    plan = plan_of(tmp_path, "tuning.learning_rates=[5e-3]", "seeds=[1,1000]")
    assert {(job.role, job.lr) for job in plan.jobs()} == {("seed", 5e-3)}
    assert [job.seed for job in plan.jobs()] == [1, 1, 1000, 1000]  # seed by seed, over all rows


@given(st.sets(st.integers(0, 3)), st.permutations([1, 2]))
def test_finished_jobs_are_never_ready(tmp_path_factory, done, seeds):
    plan = plan_of(tmp_path_factory.mktemp("study"), "tuning.learning_rates=[5e-3]", f"seeds={seeds}".replace(" ", ""))
    jobs = plan.jobs()
    for number in done:
        finish(plan, jobs[number], 1.0)
    assert plan.ready() == [job for number, job in enumerate(jobs) if number not in done]
    assert plan.jobs() == jobs


def test_runs_of_another_declaration_are_refused(tmp_path):
    plan = plan_of(tmp_path, "tuning.learning_rates=[5e-3]")
    job = plan.jobs()[0]
    finish(plan, job, 1.0)
    plan.run(job).write_config(with_absolute_paths(plan.rows[job.row].config))
    plan.check_runs()
    plan_of(tmp_path, "tuning.learning_rates=[5e-3]", "seeds=[1,2,3]").check_runs()  # more seeds are no other runs
    for change in ("tokens=4096", "data.val_tokens=512", "data=python_stdlib"):
        with pytest.raises(UserError, match="--out"):
            plan_of(tmp_path, "tuning.learning_rates=[5e-3]", change).check_runs()


def test_runs_of_two_corpora_are_refused(tmp_path):
    plan = plan_of(tmp_path, "tuning.learning_rates=[5e-3]")
    first, second, *_ = plan.jobs()
    finish(plan, first, 1.0, data_fingerprint="one text")
    plan.check_runs()
    finish(plan, second, 1.0, data_fingerprint="another")
    with pytest.raises(UserError, match="different texts"):
        plan.check_runs()


def test_pairs_of_two_machines_are_marked(tmp_path):
    plan = plan_of(tmp_path, "tuning.learning_rates=[5e-3]")
    machines = {("mha_tiny", 1): "A", ("mha_tiny", 2): "B", ("mla_tiny", 1): "A", ("mla_tiny", 2): "A"}
    for job in plan.jobs():
        finish(plan, job, 1.0, processor=machines[job.row, job.seed])
    mla, mha = manifest(plan)["rows"]
    assert any("seeds 2 ran on another" in note for note in mla["notes"])
    assert not any("another" in note for note in mha["notes"])
    assert [run["processor"] for run in mha["runs"]] == ["A", "B"]
