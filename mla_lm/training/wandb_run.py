"""Logging to Weights & Biases, online where the user has logged in, else into files that can be uploaded later."""

import os
import secrets
import shlex
import signal
from pathlib import Path
from typing import Any, Literal

import requests
import wandb
from wandb.errors import CommError, UsageError

from mla_lm.config import TrainConfig
from mla_lm.errors import Interrupted, UserError
from mla_lm.files import write_atomically
from mla_lm.runs.folder import RunFolder

Mode = Literal["online", "offline", "disabled"]
# What WANDB_MODE may say.
WANDB_MODES: dict[str, Mode] = {"online": "online", "offline": "offline", "dryrun": "offline", "disabled": "disabled"}
WANDB_PATIENCE = 20  # seconds for the service to answer before the run goes on offline
STEP = "trainer/global_step"


class WandbRun:
    """A run of wandb; its x axis is `trainer/global_step`, as wandb's own step cannot be taken back by a resume."""

    name = "wandb"

    def __init__(self, run: "wandb.Run"):
        self.run = run
        run.define_metric(STEP)
        run.define_metric("*", step_metric=STEP, step_sync=True)

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.run.log({**metrics, STEP: step})

    def log_samples(self, samples: list[tuple[str, str]], step: int) -> None:
        table = wandb.Table(columns=["prompt", "continuation"], data=[list(sample) for sample in samples])
        self.run.log({"samples": table, STEP: step})

    def finish(self, summary: dict[str, Any], error: BaseException | None) -> str | None:
        """Close it; return the command that uploads it, if it is offline.

        A run of wandb's own sweep that a signal other than Ctrl-C has stopped goes back into the sweep's queue, from
        which the next agent takes it, with the same id.
        """
        signum = error.signum if isinstance(error, Interrupted) else None
        offline, folder = self.run.offline, Path(self.run.dir).parent
        self.run.summary.update(summary)
        if signum not in (None, signal.SIGINT) and in_wandb_sweep():
            self.run.mark_preempting()
        self.run.finish(exit_code=128 + signum if signum else int(error is not None))
        if not offline:
            return None
        # A resumed run has a folder for each time that it was at work; wandb marks those that are uploaded.
        folders = sorted(folder.parent.glob(f"offline-run-*-{self.run.id}"))
        return shlex.join(["wandb", "sync", *(str(each) for each in folders if not list(each.glob("*.synced")))])


def open_wandb(config: TrainConfig, run: RunFolder) -> WandbRun | None:
    """Start or resume the wandb run of a run folder; None if WANDB_MODE=disabled."""
    if wandb_mode() == "disabled":
        return None
    run_id = _wandb_id(run)
    write_atomically(run.wandb_id_file, lambda file: file.write(run_id.encode() + b"\n"))
    return WandbRun(
        start_wandb(
            id=run_id,
            resume="allow",
            dir=str(run.path),
            project=config.logger.project,
            group=config.logger.group,
            name=config.logger.name,
            tags=config.tags or None,
        )
    )


def start_wandb(**arguments: Any) -> "wandb.Run":
    """A run of wandb, offline where the service cannot be reached.

    Args:
        arguments: of `wandb.init`, which has the mode from `wandb_mode`
    """
    quiet = wandb.Settings(silent=True, init_timeout=WANDB_PATIENCE)
    try:
        return wandb.init(mode=wandb_mode(), settings=quiet, **arguments)
    except (CommError, UsageError) as error:
        print(f"wandb cannot be reached ({str(error).splitlines()[0]}): this run is logged offline")
        wandb.teardown()
        return wandb.init(mode="offline", settings=quiet, **arguments)


def _wandb_id(run: RunFolder) -> str:
    """The id of the run in wandb: the one from wandb's agent, the one in the run folder, or a new one."""
    if in_wandb_sweep() and (given := os.environ.get("WANDB_RUN_ID")):
        return given  # wandb.init takes no other then
    return run.wandb_id_file.read_text().strip() if run.wandb_id_file.is_file() else secrets.token_hex(4)


def in_wandb_sweep() -> bool:
    """Whether an agent of wandb has started this process, as `wandb agent` does for conf/wandb_sweep.yaml."""
    return "WANDB_SWEEP_ID" in os.environ


def wandb_mode(host: str | None = None) -> Mode:
    """What WANDB_MODE says; otherwise online where this user has logged in to `host`, offline where not.

    wandb itself would ask on a terminal, and raise elsewhere.

    Args:
        host: default: the service that wandb is set to
    """
    if mode := os.environ.get("WANDB_MODE"):
        if mode not in WANDB_MODES:
            raise UserError(f"WANDB_MODE={mode} is unknown: one of {', '.join(WANDB_MODES)}")
        return WANDB_MODES[mode]
    older = "https://api.wandb.ai"  # where older releases saved their keys
    hosts = (host or wandb.Settings().base_url, older)
    logged_in = os.environ.get("WANDB_API_KEY") or any(requests.utils.get_netrc_auth(h) for h in hosts)
    return "online" if logged_in else "offline"
