"""Checkpoints on disk: plain data."""

import pickle
from pathlib import Path
from typing import Any

import torch

from mla_lm.errors import UserError


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
