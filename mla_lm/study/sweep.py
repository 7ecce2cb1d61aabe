"""Multiruns: the record of their trials, going on with a stopped one, and the table at their end.

Each job leaves in trials/ of the sweep's folder what it was asked for, and how it failed. With the run folders beside
it this is all there is to know of a sweep: the same whether its jobs ran in this process or on a cluster, at once or
in several goes.
"""

import json
import os
import shlex
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.conf import HydraConf
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, read_write

from mla_lm.config import SweepJob
from mla_lm.errors import Interrupted, UserError
from mla_lm.files import write_atomically
from mla_lm.runs.folder import RunFolder
from mla_lm.study.seed_means import seed_means
from mla_lm.terminal import cli
from mla_lm.terminal.plain_text import say
from mla_lm.terminal.tables import table

# key of summary.json, heading, format
COLUMNS = (
    ("val_loss", "val loss", "{:.4f}"),
    ("val_bits_per_byte", "val bits/byte", "{:.4f}"),
    ("test_bits_per_byte", "test bits/byte", "{:.4f}"),
    ("kv_cache_bytes_per_token", "cache B/token", "{:,.0f}"),
)


@dataclass
class Trial:
    """One job of a multirun.

    Args:
        sweep: folder of the multirun
        name: of the run folder within it; a job that failed before it began leaves none
        overrides: the command line that makes this run by itself
        error: why it failed
    """

    sweep: Path
    name: str
    overrides: list[str]
    error: str | None = None

    @classmethod
    def of_job(cls, hydra_config: HydraConf) -> "Trial":
        sweep = Path(hydra_config.sweep.dir)
        return cls(sweep, os.path.relpath(hydra_config.runtime.output_dir, sweep), run_overrides(hydra_config))

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.sweep / self.name)

    @property
    def status(self) -> str:
        if self.error is not None:
            return "failed"
        return "finished" if self.run.summary().get("finished") else "interrupted"

    def write(self, error: str | None = None) -> None:
        """Record it, or how it failed."""
        record = {"name": self.name, "overrides": self.overrides, "error": error}
        path = self.sweep / "trials" / f"{self.name.replace('/', '_')}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: file.write(json.dumps(record, indent=1).encode() + b"\n"))


def trials_of(sweep: Path) -> list[Trial]:
    """All trials of a sweep: the finished ones by validation loss, then the others, by name."""
    trials = [Trial(sweep, **json.loads(path.read_text())) for path in (sweep / "trials").glob("*.json")]

    def rank(trial: Trial) -> tuple:
        finished = trial.status == "finished"
        return (not finished, trial.run.summary()["val_loss"] if finished else 0.0, len(trial.name), trial.name)

    return sorted(trials, key=rank)


def run_overrides(hydra_config: HydraConf) -> list[str]:
    """The command line of a job without `sweep=...`, which only tells Hydra how to make the jobs."""
    overrides: Any = OmegaConf.to_container(hydra_config.overrides, resolve=False)  # as typed: `\${` stays what it is
    return [override for override in overrides["task"] if not override.startswith("sweep=")]


def job_of(hydra_config: HydraConf) -> SweepJob:
    """What this job is told of its sweep."""
    name = hydra_config.runtime.choices.get("sweep")
    group = "/".join(Path(hydra_config.sweep.dir).parts[-2:])
    return SweepJob(run_overrides(hydra_config), group, [name] if name else [])


class Multirun:
    """The multirun that this process starts, if the command turns out to be one."""

    def __init__(self) -> None:
        self.folder: Path | None = None  # None: it has not begun
        self.plugins: list[str] = []  # sweeper and launcher, as far as they are not Hydra's own
        self.lock = ExitStack()  # of the folder, from the beginning to the end

    def begin(self, hydra_config: HydraConf) -> None:
        """Take its folder; UserError where another process is at work on it."""
        folder = Path(hydra_config.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.lock.enter_context(RunFolder(folder).lock())
        self.folder = folder
        choices = {kind: hydra_config.runtime.choices[kind] for kind in ("hydra/sweeper", "hydra/launcher")}
        self.plugins = [f"{kind}={name}" for kind, name in choices.items() if name != "basic"]


# Hydra makes the callback by the name in conf/train.yaml, and hands it nothing of ours: this is where they meet.
RUNNING: ContextVar[Multirun] = ContextVar("the multirun of the command that is running")


class SweepCallback(Callback):
    """What Hydra calls in the process that starts the jobs, when it knows the configuration."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        try:
            RUNNING.get().begin(config.hydra)
        except (UserError, OSError) as error:  # Hydra would make a warning of it, and go on
            sys.exit(cli.report(error))
        if config.hydra.sweeper.get("storage"):
            with read_write(config.hydra):
                continue_study(config.hydra.sweeper)


def continue_study(sweeper: DictConfig) -> None:
    """Count earlier processes' trials towards n_trials, and run stopped ones again; Optuna's sweeper does not."""
    import optuna
    from optuna.trial import TrialState

    storage = optuna.storages.get_storage(sweeper.storage)
    try:
        study = storage.get_study_id_from_name(sweeper.study_name)
    except KeyError:  # a new one
        return
    trials = storage.get_all_trials(study)
    for trial in trials:
        if trial.state == TrialState.RUNNING:  # stopped: the next to be run, with the values that it has
            identity = storage.get_trial_id_from_study_id_trial_number(study, trial.number)
            storage.set_trial_state(identity, TrialState.WAITING)
    sweeper.n_trials -= sum(trial.state.is_finished() for trial in trials)
    if sweeper.sampler.get("seed") is not None:
        sweeper.sampler.seed += len(trials)  # the same seed again would draw the same values again


@contextmanager
def reported(arguments: list[str]) -> Iterator[None]:
    """At the end of a multirun, print the table of its trials and what to type next; nothing of a single run.

    Args:
        arguments: the command line

    Raises:
        UserError: jobs failed, or the sweeper or launcher did.
    """
    multirun = Multirun()
    token = RUNNING.set(multirun)
    problem = None
    try:
        with multirun.lock:
            yield
    except (Interrupted, KeyboardInterrupt):
        if multirun.folder:
            say(end_report(multirun.folder, arguments, stopped=True))
        raise
    except Exception as error:
        if not multirun.plugins or isinstance(error, (*cli.EXPLAINED, OSError)):
            raise
        # train.py takes whatever a job raises, so this was raised around the jobs.
        problem = f"{', '.join(multirun.plugins)}: {traceback.format_exception_only(error)[0].partition(chr(10))[0]}"
    finally:
        RUNNING.reset(token)
    if multirun.folder:
        say(end_report(multirun.folder, arguments))
        raise_for_failed(multirun.folder)
    if problem:
        raise UserError(problem)


def raise_for_failed(sweep: Path) -> None:
    """Raises UserError that names the trials which failed, and why."""
    failed = [trial for trial in trials_of(sweep) if trial.status == "failed"]
    if failed:
        reasons = [f"  {trial.run.path}: {(trial.error or '').partition(chr(10))[0]}" for trial in failed]
        more = [f"  {len(failed) - 1} more, in the table above"] if len(failed) > 2 else reasons[1:]
        jobs = "job" if len(failed) == 1 else "jobs"
        raise UserError("\n".join([f"{len(failed)} {jobs} failed:", reasons[0], *more]))


def end_report(sweep: Path, arguments: list[str], stopped: bool = False) -> str:
    """The table of a sweep's trials, the command that makes the best again, and those that go on or compare."""
    trials = trials_of(sweep)
    finished = [trial for trial in trials if trial.status == "finished"]
    lines = ["", trial_table(trials), ""] if trials else []
    if means := seed_means([trial.run for trial in finished]):
        lines += [means, ""]
    if finished:
        lines.append(f"best        python train.py {shlex.join(finished[0].overrides)}")
    if len(finished) > 1:
        begun = [trial for trial in trials if trial.run.config_file.is_file()]
        runs = [sweep] if begun == finished else [trial.run.path for trial in finished]
        lines.append(f"compare all python -m scripts.compare {shlex.join(map(str, runs))}")
    if stopped or any(trial.status == "interrupted" for trial in trials):
        rest = [argument for argument in arguments if not argument.startswith("hydra.sweep.dir=")]
        lines.append(f"go on       python train.py {shlex.join([*rest, f'hydra.sweep.dir={sweep}'])}")
    return "\n".join(lines)


def trial_table(trials: list[Trial]) -> str:
    """One row per trial: the overrides in which trials differ, and the figures of those that have finished."""
    overrides = [{key: value for key, _, value in (o.partition("=") for o in trial.overrides)} for trial in trials]
    named = dict.fromkeys(key for own in overrides for key in own)
    keys = [key for key in named if len({own.get(key) for own in overrides}) > 1]
    summaries = [trial.run.summary() if trial.status == "finished" else {} for trial in trials]
    caches = {summary["kv_cache_bytes_per_token"] for summary in summaries if summary}
    columns = COLUMNS if len(caches) > 1 else COLUMNS[:-1]
    rows = [["run", *keys, "status", *(heading for _, heading, _ in columns)]]
    for trial, own, summary in zip(trials, overrides, summaries, strict=True):
        figures = [form.format(summary[key]) if summary else "-" for key, _, form in columns]
        rows.append([trial.name, *(_short(own.get(key, "-")) for key in keys), trial.status, *figures])
    return table(rows, left=len(keys) + 2)


def _short(value: str) -> str:
    """A number of many decimals to four digits."""
    try:
        return f"{float(value):.4g}" if "." in value and len(value) > 8 else value
    except ValueError:
        return value


# For conf/sweep/optuna.yaml. Registered here and not in train.py's main(), which a job on a cluster does not run.
OmegaConf.register_new_resolver("short", lambda value: _short(str(value)), replace=True)
