"""Nothing in a checkpoint is ever run."""

import os

import pytest
import torch

from mla_lm.errors import UserError
from mla_lm.runs.checkpoint import load_checkpoint


class Harmful:
    def __reduce__(self):
        return os.system, ("touch harmed",)


def test_refuses_what_is_no_plain_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Harmful()}, "harmful.ckpt")
    torch.save({"weights": {}}, "other.ckpt")
    (tmp_path / "text.ckpt").write_text("not a checkpoint")
    for name in ("harmful.ckpt", "other.ckpt", "text.ckpt", "missing.ckpt"):
        with pytest.raises(UserError, match=name):
            load_checkpoint(tmp_path / name)
    assert not (tmp_path / "harmed").exists()
