"""Where metrics go: metrics.jsonl always, wandb or TensorBoard beside it."""

import errno
import json
import math
import os
import secrets
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from mla_lm.config import TrainConfig
from mla_lm.errors import Interrupted, UserError
from mla_lm.files import write_atomically
from mla_lm.runs.folder import RunFolder
from mla_lm.terminal.plain_text import say

WANDB_MODES = ("online", "offline", "dryrun", "disabled")
WANDB_PATIENCE = 20  # seconds for the service to answer before the run goes on offline


class MetricsFile(Logger):
    """metrics.jsonl: one JSON object per logging step, the source of truth of what a run measured.

    Args:
        path: the file; rows of it past `start_step` are cut, those of a run that got further before it was resumed
        tokens_per_step: for the `tokens` of each row
        start_step: optimizer steps already done
        began: `time.monotonic()` when this process began to work on the run
    """

    name, version = "metrics", ""

    def __init__(self, path: Path, tokens_per_step: int, start_step: int, began: float):
        super().__init__()
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
        """Since the run began, pauses between a stop and a resume left out."""
        return time.monotonic() - self.began

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
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

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """config.yaml has them."""


@contextmanager
def never_fatal(logger: Logger) -> Iterator[None]:
    """Within, whatever a logger raises is told once, and training goes on."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - of any of several libraries, and never worth a run
        if not getattr(logger, "has_failed", False):
            logger.has_failed = True
            name = {"MetricsFile": "metrics.jsonl"}.get(type(logger).__name__, type(logger).__name__)
            say(f"warning: {name} could not log ({error}): training goes on", file=sys.stderr)


def build_loggers(config: TrainConfig, run: RunFolder, start_step: int, began: float) -> list[Logger]:
    """metrics.jsonl first, then the one that `logger=` names."""
    loggers: list[Logger] = [MetricsFile(run.metrics_file, config.tokens_per_step, start_step, began)]
    if config.logger.kind == "wandb" and rank_zero_only.rank == 0:
        loggers += _wandb_loggers(config, run)
    elif config.logger.kind == "tensorboard":
        from lightning.pytorch.loggers import TensorBoardLogger

        loggers.append(TensorBoardLogger(run.path, name="tensorboard", version=""))
    return loggers


def _wandb_loggers(config: TrainConfig, run: RunFolder) -> list[Logger]:
    """One logger, or none where WANDB_MODE=disabled."""
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    # The mode is handed over here: WandbLogger(offline=True) would set it for the whole process, later jobs included.
    mode = wandb_mode(wandb.Settings().base_url)
    if mode == "disabled":
        return []

    run_id = _wandb_id(run)
    write_atomically(run.wandb_id_file, lambda file: file.write(run_id.encode() + b"\n"))
    settings = {
        "id": run_id,
        "resume": "allow",
        "dir": str(run.path),
        "project": config.logger.project,
        "group": config.logger.group,
        "name": config.logger.name,
        "tags": config.tags or None,
    }
    quiet = wandb.Settings(silent=True, init_timeout=WANDB_PATIENCE)
    try:
        experiment = wandb.init(mode=mode, settings=quiet, **settings)
    except (wandb.errors.CommError, wandb.errors.UsageError) as error:
        print(f"wandb cannot be reached ({str(error).splitlines()[0]}): this run is logged offline")
        wandb.teardown()
        experiment = wandb.init(mode="offline", settings=quiet, **settings)
    experiment.define_metric("trainer/global_step")
    experiment.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    return [WandbLogger(experiment=experiment, project=config.logger.project, save_dir=str(run.path))]


def _wandb_id(run: RunFolder) -> str:
    """Of the run in wandb: what wandb's agent gave to a run of its sweep, what the folder has, or a new one."""
    if in_wandb_sweep() and (given := os.environ.get("WANDB_RUN_ID")):
        return given  # wandb.init takes no other then
    return run.wandb_id_file.read_text().strip() if run.wandb_id_file.is_file() else secrets.token_hex(4)


def in_wandb_sweep() -> bool:
    """Whether an agent of wandb has started this process, as `wandb agent` does for conf/wandb_sweep.yaml."""
    return "WANDB_SWEEP_ID" in os.environ


def wandb_mode(host: str) -> str:
    """What WANDB_MODE says; otherwise online where this user has logged in to `host`, offline where not.

    wandb itself would ask on a terminal, and raise elsewhere.
    """
    if mode := os.environ.get("WANDB_MODE"):
        if mode not in WANDB_MODES:
            raise UserError(f"WANDB_MODE={mode} is unknown: one of {', '.join(WANDB_MODES)}")
        return {"dryrun": "offline"}.get(mode, mode)
    import requests

    hosts = (host, "https://api.wandb.ai")  # where keys lie that were saved by older releases
    logged_in = os.environ.get("WANDB_API_KEY") or any(requests.utils.get_netrc_auth(h) for h in hosts)
    return "online" if logged_in else "offline"


def finish_wandb(
    loggers: list[Logger], summary: dict[str, Any] | None = None, error: BaseException | None = None
) -> str | None:
    """Close wandb's run before anything else is printed; return the command that uploads it, if it is offline.

    A run of wandb's own sweep that a signal other than Ctrl-C has stopped goes back into the sweep's queue, from which
    the next agent takes it, with the same id.

    Args:
        summary: figures of the run, to be its summary
        error: what ended the run before its time
    """
    signum = error.signum if isinstance(error, Interrupted) else None
    upload = None
    for logger in loggers:
        if type(logger).__name__ == "WandbLogger":
            with never_fatal(logger):
                experiment = logger.experiment
                offline, folder = experiment.offline, Path(experiment.dir).parent
                experiment.summary.update(summary or {})
                if signum not in (None, signal.SIGINT) and in_wandb_sweep():
                    experiment.mark_preempting()
                experiment.finish(exit_code=128 + signum if signum else int(error is not None))
                upload = f"wandb sync {folder}" if offline else None
    return upload
