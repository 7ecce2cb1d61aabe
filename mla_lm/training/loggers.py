"""Where metrics go: metrics.jsonl always, wandb or TensorBoard beside it."""

import errno
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from mla_lm.config import TrainConfig
from mla_lm.files import write_atomically
from mla_lm.runs.folder import RunFolder
from mla_lm.terminal.plain_text import say

Sample = tuple[str, str]  # a prompt, and how the model continues it


class Service(Protocol):
    """What shows the metrics of a run: wandb or TensorBoard."""

    name: str

    def log_metrics(self, metrics: dict[str, float], step: int) -> None: ...

    def log_samples(self, samples: list[Sample], step: int) -> None: ...

    def finish(self, summary: dict[str, Any], error: BaseException | None) -> str | None:
        """Close it; see `RunLogger.finish`."""


class MetricsFile:
    """metrics.jsonl: one JSON object per logging step, the source of truth of what a run measured.

    Args:
        path: the file; rows of it past `start_step` are cut, those of a run that got further before it was resumed
        tokens_per_step: for the `tokens` of each row
        start_step: optimizer steps already done
        began: `time.monotonic()` when this process began to work on the run
    """

    def __init__(self, path: Path, tokens_per_step: int, start_step: int, began: float):
        self.path, self.tokens_per_step = path, tokens_per_step
        self.unwritten = ""  # rows that could not be written
        kept = self._kept_rows(start_step)
        if rank_zero_only.rank == 0:
            write_atomically(path, lambda file: file.writelines(json.dumps(row).encode() + b"\n" for row in kept))
        self.began = began - (kept[-1]["seconds"] if kept else 0.0)

    def _kept_rows(self, start_step: int) -> list[dict]:
        if not start_step or not self.path.is_file():
            return []
        rows = []
        for line in self.path.read_text(errors="replace").splitlines():
            try:
                row = json.loads(line)
                if row["seconds"] >= 0 and row["step"] <= start_step and "test/loss" not in row:
                    rows.append(row)  # without the test, which is made again at the end
            except (ValueError, TypeError, KeyError):  # cut short by a kill, or damaged
                continue
        return rows

    @property
    def seconds(self) -> float:
        """Seconds since the run began, without the time between a stop and a resume."""
        return time.monotonic() - self.began

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Append a row, after those that could not be written before.

        Raises:
            OSError: the disk is full; the file ends with a whole row.
        """
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}  # JSON has no inf
        row = {"step": step, "tokens": step * self.tokens_per_step, "seconds": round(self.seconds, 3), **finite}
        self.unwritten += json.dumps(row) + "\n"
        with open(self.path, "ab", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            try:
                written = file.write(self.unwritten.encode())
                if written < len(self.unwritten):  # the disk was full in the middle of a row
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(size)
                raise
        self.unwritten = ""


class TensorBoard:
    """Event files in the run folder, for `tensorboard --logdir`."""

    name = "TensorBoard"

    def __init__(self, run: RunFolder):
        from torch.utils.tensorboard import SummaryWriter  # only a run that asks for it waits for TensorBoard

        self.writer = SummaryWriter(run.path / "tensorboard")

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        for key, value in metrics.items():
            self.writer.add_scalar(key, value, step)

    def log_samples(self, samples: list[Sample], step: int) -> None:
        indented = ("    " + (prompt + text).replace("\n", "\n    ") for prompt, text in samples)  # code, in Markdown
        self.writer.add_text("samples", "\n\n".join(indented), step)

    def finish(self, summary: dict[str, Any], error: BaseException | None) -> None:
        self.writer.close()


class RunLogger(Logger):
    """Logs to metrics.jsonl and, if there is one, to a service. Only the first process logs.

    Whatever they raise is told once, and training goes on.
    """

    def __init__(self, file: MetricsFile, service: Service | None):
        super().__init__()
        self.file, self.service = file, service
        self.failed: set[str] = set()  # names of those that have

    @property
    def name(self) -> str:  # which Lightning asks for, as the version
        return "run"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        with self._never_fatal("metrics.jsonl"):
            self.file.log_metrics(metrics, step)
        if self.service:
            with self._never_fatal(self.service.name):
                self.service.log_metrics(metrics, step)

    @rank_zero_only
    def log_samples(self, samples: list[Sample], step: int) -> None:
        """Texts go to the service only."""
        if self.service:
            with self._never_fatal(self.service.name):
                self.service.log_samples(samples, step)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """config.yaml has them."""

    def finish(self, summary: dict[str, Any], error: BaseException | None) -> str | None:
        """Close the service before anything else is printed; return the command that uploads what it has, if any.

        Args:
            summary: figures of the run; empty where it has none
            error: what ended the run before its time
        """
        if self.service:
            with self._never_fatal(self.service.name):
                return self.service.finish(summary, error)
        return None

    @contextmanager
    def _never_fatal(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 - of any of several libraries, and never worth a run
            if name not in self.failed:
                self.failed.add(name)
                say(f"warning: {name} could not log ({error}): training goes on", file=sys.stderr)


def open_logger(config: TrainConfig, run: RunFolder, start_step: int, began: float) -> RunLogger:
    """Open metrics.jsonl and the service that `logger=` names.

    Args:
        start_step: optimizer steps already done
        began: `time.monotonic()` when this process began to work on the run
    """
    file = MetricsFile(run.metrics_file, config.step_tokens, start_step, began)
    return RunLogger(file, _open_service(config, run) if rank_zero_only.rank == 0 else None)


def _open_service(config: TrainConfig, run: RunFolder) -> Service | None:
    if config.logger.kind == "wandb":
        from mla_lm.training.wandb_run import open_wandb  # takes a second, which only a run that asks for it spends

        return open_wandb(config, run)
    return TensorBoard(run) if config.logger.kind == "tensorboard" else None
