"""scripts/slurm.sbatch, with `srun` and `scontrol` that do here what Slurm would have them do."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, SMALL, rows_of, summary_of
from tests.runs.test_resume import ACCUMULATING, wait_for_step

# What Slurm sets for a task; Lightning reads it, and would save and requeue by itself.
TASK = {
    "SLURM_NTASKS": "1",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}
JOB = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "mla-lm", "SLURM_NODELIST": "localhost"}


@pytest.fixture
def cluster(tmp_path, monkeypatch) -> Path:
    """srun runs its command with the environment of a task, scontrol notes what it is asked."""
    for name, text in {
        "srun": f'#!/bin/sh\n{" ".join(f"{k}={v}" for k, v in TASK.items())} exec "$@"\n',
        "scontrol": f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n',
    }.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    for name, value in {**JOB, "SLURM_SUBMIT_DIR": str(ROOT), "PYTHON": sys.executable}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return tmp_path


def start(train, run: Path) -> subprocess.Popen:
    options = (*SMALL, *train.data, *ACCUMULATING, f"hydra.run.dir={run}")
    return subprocess.Popen(
        ["bash", str(ROOT / "scripts" / "slurm.sbatch"), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_job_goes_on_after_its_time_limit(train, cluster):
    run = cluster / "run"
    job = start(train, run)
    wait_for_step(run, 5, job)
    (task,) = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    os.kill(int(task), signal.SIGUSR1)
    _, errors = job.communicate(timeout=300)
    assert job.returncode == 138, errors
    assert (cluster / "asked").read_text() == "requeue 4711\n"
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoints", "config.yaml", "metrics.jsonl", "origin", "summary.json", "tokenizer.json",
    ]  # fmt: skip
    job = start(train, run)  # as Slurm starts it again
    output, errors = job.communicate(timeout=300)
    assert job.returncode == 0, errors
    assert "resumed     after step" in output
    assert summary_of(run)["finished"]
    assert [row["step"] for row in rows_of(run) if "train/loss" in row] == list(range(1, 41))
    assert (cluster / "asked").read_text() == "requeue 4711\n"
