"""Checkpoints on disk: plain data, checked for damage before anything in them is used."""

import os
from pathlib import Path
from typing import Any

import torch

from mla_lm.errors import UserError
from mla_lm.runs.archive import check_archive


def load_checkpoint(path: Path, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint as plain data: code in it is never run, and every byte is verified by checksum.

    Args:
        mmap: leave tensors on the disk until they are used

    Raises:
        UserError: there is no such file, or it is damaged or not a checkpoint.
    """
    return _load(path, mmap, tensors=True)


def steps_behind(path: Path) -> int | None:
    """Number of optimizer steps up to a checkpoint, read without its tensors; None if it holds only weights.

    Raises:
        UserError: it is damaged, as far as this shows without reading the tensors.
    """
    return _load(path, mmap=True, tensors=False).get("global_step")


def _load(path: Path, mmap: bool, tensors: bool) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    try:
        check_archive(path, tensors)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except UserError:
        raise
    except Exception as error:  # a damaged file can raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} is damaged or no checkpoint: {reason}") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UserError(f"{path} is no checkpoint of this project: it has no state_dict")
    return checkpoint


def put_in_front(temporary: Path, path: Path, keep: int) -> None:
    """Move a file to `path`, and keep the `keep` - 1 versions before it as path-1, path-2 and so on, the newest first.

    If the process is killed in between, `path` is missing and path-1 is its newest version.
    """
    versions = [path, *(numbered(path, number) for number in range(1, keep))]
    for older, newer in reversed(list(zip(versions[1:], versions, strict=False))):
        if newer.exists():
            os.replace(newer, older)
    os.replace(temporary, path)


def numbered(path: Path, number: int) -> Path:
    """The path of an older version: last-1.ckpt for last.ckpt and 1."""
    return path.with_name(f"{path.stem}-{number}{path.suffix}")


def set_aside(path: Path, why: str) -> Path:
    """Rename a file to path.why-1, or the next free number, where nothing looks for it; return the new path."""
    number = 1
    while (aside := path.with_name(f"{path.name}.{why}-{number}")).exists():
        number += 1
    os.rename(path, aside)
    return aside
