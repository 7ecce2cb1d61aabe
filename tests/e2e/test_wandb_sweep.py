"""conf/wandb_sweep.yaml, with wandb's own agent: all but its server, which chooses the values and keeps the queue."""

import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from wandb.proto.wandb_internal_pb2 import Record
from wandb.wandb_agent import Agent

from tests.conftest import ROOT, SMALL, TrainCommand, rows_of, summary_of

SWEEP = yaml.safe_load((ROOT / "conf" / "wandb_sweep.yaml").read_text())
RUN = {
    "run_id": "a1b2c3d4",
    "program": str(ROOT / SWEEP["program"]),
    "args": {"optimizer.lr": {"value": 0.002128045895124354}, "optimizer.weight_decay": {"value": 0.25}},
}


@pytest.fixture
def agent(train: TrainCommand, monkeypatch) -> Agent:
    """As `wandb agent` makes it of the sweep's configuration, with a small model on little text."""
    monkeypatch.chdir(train.folder)
    for name, value in {
        "WANDB_SWEEP_ID": "sweep123", "WANDB_RUN_ID": "", "WANDB_SWEEP_PARAM_PATH": "", "WANDB_DIR": str(train.folder),
        "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    agent = Agent(api=None, queue=None, sweep_id="sweep123")
    *words, logger, resume, folder, arguments = SWEEP["command"]
    agent._sweep_command = [*words, *SMALL, *train.data, logger, resume, folder, "trainer.max_steps=100", arguments]
    return agent


def records(run: Path) -> list[list[Record]]:
    """What each process has told wandb, which keeps it in LevelDB's log format."""
    return [
        [Record.FromString(record) for record in log_entries(file.read_bytes())]
        for file in sorted((run / "wandb").glob("offline-run-*/*.wandb"), key=os.path.getmtime)
    ]


def log_entries(content: bytes) -> Iterator[bytes]:
    place, entry, block = 7, b"", 2**15
    while place + 7 <= len(content):
        length, kind = struct.unpack_from("<HB", content, place + 4)
        entry += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part of one
            yield entry
            entry = b""
        if block - place % block < 7:  # what is left of a block is filled up
            place += block - place % block


def kind_of(record: Record) -> str:
    return record.WhichOneof("record_type")


def test_a_run_of_an_agent_is_stopped_and_resumed(agent, tmp_path):
    run = tmp_path / "outputs" / "wandb" / RUN["run_id"]
    assert agent._process_command({"type": "run", **RUN}).get("exception") is None
    process = agent._run_processes[RUN["run_id"]]
    while not (run / "checkpoints" / "last.ckpt").is_file():
        with contextlib.suppress(subprocess.TimeoutExpired):
            pytest.fail(f"ended with status {process.wait(timeout=0.1)}")
    agent._process_command({"type": "stop", "run_id": RUN["run_id"]})
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    begun = rows_of(run)
    assert summary_of(run)["steps"] < 100

    agent._process_command({"type": "resume", **RUN})  # what its server sends the next agent
    assert agent._run_processes[RUN["run_id"]].wait(timeout=120) == 0
    assert summary_of(run)["finished"]
    assert rows_of(run)[0] == begun[0]  # its time too: not run again
    assert [row["step"] for row in rows_of(run) if "train/loss" in row] == list(range(1, 101))

    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["optimizer"]["lr"] == RUN["args"]["optimizer.lr"]["value"]
    assert config["optimizer"]["weight_decay"] == 0.25
    assert (run / "wandb_id").read_text().strip() == RUN["run_id"]
    first, second = records(run)
    for told in (first, second):
        started = next(record.run for record in told if kind_of(record) == "run")
        assert (started.run_id, started.sweep_id) == (RUN["run_id"], "sweep123")
        values = {item.key: json.loads(item.value_json) for item in started.config.update}
        assert values["optimizer.lr"] == RUN["args"]["optimizer.lr"]["value"]
        assert [SWEEP["metric"]["name"]] in [item.nested_key for record in told for item in record.history.item]
    assert [kind for kind in map(kind_of, first) if kind in ("preempting", "exit")] == ["preempting", "exit"]
    assert [kind for kind in map(kind_of, second) if kind in ("preempting", "exit")] == ["exit"]
    assert [record.exit.exit_code for record in (first[-1], second[-1])] == [128 + signal.SIGTERM, 0]
