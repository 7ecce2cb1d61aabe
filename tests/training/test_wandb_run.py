"""When wandb is online."""

import pytest

from mla_lm.errors import UserError
from mla_lm.training.wandb_run import wandb_mode

HOST = "https://wandb.example"


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
