"""The run folder: which files it holds, and how they are read and written."""

import fcntl
import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar

import torch
from tokenizers import Tokenizer

from mla_lm.config import TrainConfig
from mla_lm.errors import UserError
from mla_lm.files import whole_folder, write_atomically
from mla_lm.runs.config_file import read_config, to_yaml
from mla_lm.terminal.plain_text import say

# Keys of a finished run's summary that the tools read, by the types that they may have.
FIGURES = {
    (str,): ("attention", "data_fingerprint"),
    (int, float): ("parameters", "tokens_seen", "val_loss", "test_loss", "kv_cache_bytes_per_token"),
    (int, float, NoneType): (
        *(f"{split}_{name}" for split in ("val", "test") for name in ("perplexity", "bits_per_byte")),
        *("kv_cache_bytes_at_seq_len", "kv_cache_vs_mha", "tokens_per_second"),
    ),
}


@dataclass(frozen=True)
class RunFolder:
    """The files of one run."""

    LAST: ClassVar[str] = "last.ckpt"
    path: Path

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def tokenizer_file(self) -> Path:
        return self.path / "tokenizer.json"

    @property
    def last(self) -> Path:
        return self.path / "checkpoints" / self.LAST

    @property
    def best(self) -> Path:
        return self.path / "checkpoints" / "best.ckpt"

    def lasts(self) -> list[Path]:
        """The existing ones of last.ckpt and its older versions, the newest first."""
        older = sorted(self.last.parent.glob("last-*.ckpt"), key=lambda path: (len(path.name), path.name))
        return [path for path in (self.last, *older) if path.is_file()]

    def checkpoints(self) -> list[Path]:
        """All checkpoints from which the run can be resumed."""
        return self.lasts() + [self.best] * self.best.is_file()

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def summary_file(self) -> Path:
        return self.path / "summary.json"

    @property
    def wandb_id_file(self) -> Path:
        return self.path / "wandb_id"

    @property
    def origin_file(self) -> Path:
        """The signature that marks the configuration's paths as this user's own; see `mla_lm.runs.trust`."""
        return self.path / "origin"

    def config(self) -> TrainConfig:
        """Read the run's configuration.

        Raises:
            UserError: config.yaml is damaged or of another version.
        """
        return read_config(self.config_file)

    def write_config(self, config: TrainConfig) -> None:
        self._write_text(self.config_file, to_yaml(config))

    def write_tokenizer(self, tokenizer: Tokenizer) -> None:
        self._write_text(self.tokenizer_file, tokenizer.to_str(pretty=True))

    def write_summary(self, summary: dict[str, Any]) -> None:
        self._write_text(self.summary_file, json.dumps(summary, indent=2, allow_nan=False) + "\n")

    def summary(self) -> dict[str, Any]:
        """Read the figures of the run, including `finished`; empty if there are none yet.

        Raises:
            UserError: summary.json is damaged.
        """
        if not self.summary_file.is_file():
            return {}
        try:
            summary = json.loads(self.summary_file.read_text())
        except ValueError as error:
            raise UserError(f"{self.summary_file} is damaged: {error}") from error
        if not isinstance(summary, dict):
            raise UserError(f"{self.summary_file} is damaged: it is no JSON object")
        if lost := [name for name, value in summary.items() if isinstance(value, float) and not math.isfinite(value)]:
            raise UserError(f"{self.summary_file} is damaged: {lost[0]} is {summary[lost[0]]}")
        if summary.get("finished"):
            for kind, names in FIGURES.items():
                for name in names:
                    if name not in summary or type(summary[name]) not in kind:
                        raise UserError(f"{self.summary_file} is damaged: {name} is {summary.get(name, 'missing')}")
        return summary

    @property
    def is_finished(self) -> bool:
        """Whether the run has finished; False if summary.json is damaged, since a run can be resumed without it."""
        try:
            return bool(self.summary().get("finished"))
        except UserError:
            return False

    def reopen(self) -> None:
        """Mark the run as unfinished in summary.json. A damaged one is deleted, as it can be made again."""
        try:
            if summary := self.summary():
                self.write_summary({**summary, "finished": False, "diverged": False})
        except UserError as error:
            say(f"warning: {error}; it is written anew at the end", file=sys.stderr)
            self.summary_file.unlink()

    @property
    def is_begun(self) -> bool:
        """Whether there is a configuration and a checkpoint to resume from."""
        return self.config_file.is_file() and bool(self.checkpoints())

    def foreign_files(self) -> list[str]:
        """Names of files that a run would overwrite, if the folder is not a run's already."""
        files = (self.tokenizer_file, self.last.parent, self.metrics_file, self.summary_file, self.wandb_id_file)
        files += (self.origin_file,)
        return [] if self.config_file.exists() else [file.name for file in files if file.exists()]

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the lock of the one process that works on the run. It is on the folder, so it leaves no file behind.

        Raises:
            UserError: another process holds it.
        """
        folder = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError as error:
            raise UserError(
                f"another process is at work on {self.path}: wait for it, or choose another folder"
            ) from error
        finally:
            os.close(folder)  # and release the lock

    @staticmethod
    def _write_text(path: Path, text: str) -> None:
        write_atomically(path, lambda file: file.write(text.encode()))


def find_run(path: str | Path) -> tuple[RunFolder, Path | None]:
    """Find a run by its folder or by a checkpoint in it; return the run and the checkpoint, None for a folder.

    Raises:
        UserError: there is no run at `path`.
    """
    path = Path(path).expanduser().absolute()
    if not path.exists():
        raise UserError(f"{path} does not exist: give a run folder, or a checkpoint in one")
    run = RunFolder(path if path.is_dir() else path.parent.parent)
    if not run.config_file.is_file():
        raise UserError(f"{run.path} is no run folder: it has no config.yaml")
    return run, None if path.is_dir() else path


def find_best(path: str | Path) -> tuple[RunFolder, Path]:
    """Like `find_run`, but for a folder return its best checkpoint, or its last if there is no best."""
    run, checkpoint = find_run(path)
    if checkpoint is None:
        checkpoint = run.best if run.best.is_file() else next(iter(run.lasts()), run.last)
    return run, checkpoint


def write_model(path: Path, config: TrainConfig, tokenizer: Tokenizer, checkpoint: dict[str, Any]) -> None:
    """Write a run folder for a model that was not trained in it; `init_from` and the tools accept it like any other.

    Args:
        checkpoint: the weights under `state_dict`, without a training state to resume from

    Raises:
        UserError: `path` is not empty, or cannot be written.
    """
    with whole_folder(path) as draft:
        run = RunFolder(draft)
        write_atomically(run.last, lambda file: torch.save(checkpoint, file))
        run.write_tokenizer(tokenizer)
        run.write_config(config)
