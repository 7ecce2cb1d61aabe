"""metrics.jsonl, and when wandb is online."""

import json
import time

import pytest

from mla_lm.errors import UserError
from mla_lm.training.loggers import MetricsFile, wandb_mode

HOST = "https://wandb.example"


def test_rows_past_the_checkpoint_are_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    logger = MetricsFile(path, 100, 0, time.monotonic() - 50)
    for step in (1, 2, 3):
        logger.log_metrics({"loss": 1.0 / step}, step)
    with open(path, "a") as file:
        file.write('{"step": 4, "lo')  # a kill while writing
    logger = MetricsFile(path, 100, 2, time.monotonic())
    logger.log_metrics({"loss": float("inf")}, 3)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["tokens"] for row in rows] == [100, 200, 300]
    assert rows[2]["loss"] is None
    assert rows[2]["seconds"] >= rows[1]["seconds"] >= 50


def test_wandb_is_online_where_the_user_is_logged_in(tmp_path, monkeypatch):
    netrc = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert wandb_mode(HOST) == "offline"
    netrc.write_text(f"machine wandb.example login user password {'0' * 40}\n")
    assert wandb_mode(HOST) == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_mode(HOST) == "offline"
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    with pytest.raises(UserError, match="sometimes"):
        wandb_mode(HOST)
