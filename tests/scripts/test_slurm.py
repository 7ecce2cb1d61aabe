"""scripts/slurm.sbatch, with `srun` and `scontrol` that do here what Slurm would have them do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ACCUMULATING, ROOT, SMALL, rows_of, summary_of

# What Slurm sets for a task; Lightning reads it, and would save and requeue by itself.
TASK = {
    "SLURM_NTASKS": "1",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}
# Slurm's signal before the time limit, which train.py sends itself here within a step.
WARNED = f"""
import os, runpy, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from scripts.soak.programs import before
before("training_step", lambda module: module.global_step == 5 and os.kill(os.getpid(), signal.SIGUSR1))
del sys.argv[0]
runpy.run_path("train.py", run_name="__main__")
"""
JOB = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "mla-lm", "SLURM_NODELIST": "localhost"}


@pytest.fixture
def cluster(tmp_path, monkeypatch) -> Path:
    """srun runs its command with the environment of a task, scontrol notes what it is asked."""
    (tmp_path / "warned.py").write_text(WARNED)
    for name, text in {
        "warned": f'#!/bin/sh\nexec {sys.executable} {tmp_path}/warned.py "$@"\n',
        "srun": f'#!/bin/sh\n{" ".join(f"{k}={v}" for k, v in TASK.items())} exec "$@"\n',
        "scontrol": f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n',
    }.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    for name, value in {**JOB, "SLURM_SUBMIT_DIR": str(ROOT), "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return tmp_path


def run_job(train, run: Path, python: str) -> subprocess.CompletedProcess:
    command = ["bash", str(ROOT / "scripts" / "slurm.sbatch"), *SMALL, *train.data, *ACCUMULATING]
    return subprocess.run(
        [*command, f"hydra.run.dir={run}"], env={**os.environ, "PYTHON": python}, capture_output=True, text=True
    )


def test_a_job_goes_on_after_its_time_limit(train, cluster):
    run = cluster / "run"
    job = run_job(train, run, "warned")
    assert job.returncode == 138, job.stderr
    assert (cluster / "asked").read_text() == "requeue 4711\n"
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoints", "config.yaml", "metrics.jsonl", "origin", "summary.json", "tokenizer.json",
    ]  # fmt: skip
    job = run_job(train, run, sys.executable)  # as Slurm starts it again
    assert job.returncode == 0, job.stderr
    assert "resumed     after step 6" in job.stdout
    assert summary_of(run)["finished"]
    assert [row["step"] for row in rows_of(run) if "train/loss" in row] == list(range(1, 17))
    assert (cluster / "asked").read_text() == "requeue 4711\n"
