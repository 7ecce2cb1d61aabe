"""The run folder: what lies where in it."""

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

# What the tools read of the summary of a run that has finished, by what it must be.
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
        """last.ckpt and the versions before it that are kept, the newest first; what there is of them."""
        older = sorted(self.last.parent.glob("last-*.ckpt"), key=lambda path: (len(path.name), path.name))
        return [path for path in (self.last, *older) if path.is_file()]

    def checkpoints(self) -> list[Path]:
        """All that a run can go on from."""
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
        """That the paths in the configuration are this user's own: `mla_lm.runs.trust`."""
        return self.path / "origin"

    def config(self) -> TrainConfig:
        """The run's configuration.

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
        """The figures of the run, `finished` among them; empty where it has none yet.

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
        """Whether it has come to its end, as far as summary.json can be read: a run goes on without it."""
        try:
            return bool(self.summary().get("finished"))
        except UserError:
            return False

    def reopen(self) -> None:
        """Let summary.json say that the run is not at its end (any more). It is derived, so a damaged one goes."""
        try:
            if summary := self.summary():
                self.write_summary({**summary, "finished": False})
        except UserError as error:
            say(f"warning: {error}; it is written anew at the end", file=sys.stderr)
            self.summary_file.unlink()

    @property
    def is_begun(self) -> bool:
        """Whether there is something in it to go on from."""
        return self.config_file.is_file() and bool(self.checkpoints())

    def foreign_files(self) -> list[str]:
        """Names that a run would write over, where they are no run's."""
        files = (self.tokenizer_file, self.last.parent, self.metrics_file, self.summary_file, self.wandb_id_file)
        files += (self.origin_file,)
        return [] if self.config_file.exists() else [file.name for file in files if file.exists()]

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Held by the one process that works on the run; on the folder itself, so that it leaves no file behind.

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
            os.close(folder)  # and with it the lock

    @staticmethod
    def _write_text(path: Path, text: str) -> None:
        write_atomically(path, lambda file: file.write(text.encode()))


def find_run(path: str | Path) -> tuple[RunFolder, Path | None]:
    """The run that a user names by its folder or by a checkpoint in it, and that checkpoint; None for a folder.

    Raises:
        UserError: there is no run.
    """
    path = Path(path).expanduser().absolute()
    if not path.exists():
        raise UserError(f"{path} does not exist: give a run folder, or a checkpoint in one")
    run = RunFolder(path if path.is_dir() else path.parent.parent)
    if not run.config_file.is_file():
        raise UserError(f"{run.path} is no run folder: it has no config.yaml")
    return run, None if path.is_dir() else path


def find_best(path: str | Path) -> tuple[RunFolder, Path]:
    """As `find_run`, but of a folder the best checkpoint, or where there is none the last."""
    run, checkpoint = find_run(path)
    if checkpoint is None:
        checkpoint = run.best if run.best.is_file() else next(iter(run.lasts()), run.last)
    return run, checkpoint


def write_model(path: Path, config: TrainConfig, tokenizer: Tokenizer, checkpoint: dict[str, Any]) -> None:
    """A run of a model that was not trained in it: `init_from` and the tools take it like any other.

    Args:
        checkpoint: the weights under `state_dict`; there is no training to go on with in it

    Raises:
        UserError: `path` has something in it, or cannot be written.
    """
    with whole_folder(path) as draft:
        run = RunFolder(draft)
        write_atomically(run.last, lambda file: torch.save(checkpoint, file))
        run.write_tokenizer(tokenizer)
        run.write_config(config)
