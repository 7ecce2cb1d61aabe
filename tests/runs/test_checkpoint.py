"""Files are written whole or not at all; nothing in a checkpoint is ever run."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from mla_lm.errors import UserError
from mla_lm.files import write_atomically
from mla_lm.runs.checkpoint import load_checkpoint


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, lambda file: file.write(b"old"))

    def fail(file) -> None:
        file.write(b"new, but")
        raise OSError("disk full")

    with pytest.raises(UserError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_kill_while_writing_leaves_a_whole_file(tmp_path):
    """A process that overwrites a checkpoint again and again is killed at an arbitrary moment."""
    script = textwrap.dedent("""
        import sys, torch
        from pathlib import Path
        from mla_lm.files import write_atomically
        number = 0
        while True:
            state = {"state_dict": {"w": torch.full((500_000,), float(number))}, "number": number}
            write_atomically(Path(sys.argv[1]), lambda file: torch.save(state, file))
            number += 1
    """)
    path = tmp_path / "last.ckpt"
    process = subprocess.Popen([sys.executable, "-c", script, str(path)])
    while not path.exists():
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    state = load_checkpoint(path)
    assert torch.equal(state["state_dict"]["w"], torch.full((500_000,), float(state["number"])))


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
