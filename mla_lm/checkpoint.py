"""Checkpoints on disk: plain data, whole or not at all."""

import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import torch

from mla_lm.errors import UserError


def write_atomically(path: Path, write) -> None:
    """Call `write(file)` on a binary temporary file beside `path`, then put it in the place of `path` at once.

    Whoever reads `path`, whenever the process is killed, finds the old content or the new, never a part.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)  # the new name is on disk only when the folder is
    os.fsync(folder)
    os.close(folder)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


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
