"""Checkpoints on disk: plain data, whole or not at all."""

import contextlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from mla_lm.errors import UserError


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call `write(file)` on a binary temporary file beside `path`, then put it in the place of `path` at once.

    Whoever reads `path`, whenever the process is killed, finds the old content or the new, never a part.

    Raises:
        UserError: it cannot be written, for want of room or rights; the old content is still there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)  # the new name is on disk only when the folder is
        os.fsync(folder)
        os.close(folder)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch.save's word for a full disk
        raise UserError(f"{path} cannot be written: {str(error).splitlines()[0]}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint as plain data (no code in it is ever run).

    Raises:
        UserError: there is no such file, or it is damaged, or it is no checkpoint.
    """
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} is damaged or no checkpoint: {str(error).splitlines()[0]}") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UserError(f"{path} is no checkpoint of this project: it has no state_dict")
    return checkpoint
