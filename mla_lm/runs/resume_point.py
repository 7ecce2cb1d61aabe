"""Finds the checkpoint to resume from: the newest intact one, or the one that the user names."""

import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

from mla_lm.errors import UserError
from mla_lm.files import write_atomically
from mla_lm.runs.checkpoint import load_checkpoint, put_in_front, set_aside, steps_behind
from mla_lm.runs.folder import RunFolder
from mla_lm.terminal.plain_text import say

# What a checkpoint of training has beside the weights.
OF_TRAINING = ("global_step", "loops", "optimizer_states", "callbacks", "data_fingerprint", "random_state")


class ResumePoint(NamedTuple):
    """A checkpoint to go on from."""

    path: Path
    state: dict[str, Any]
    damaged: dict[Path, str]  # files that were to be taken first, and what is wrong with them
    named: bool = False  # by the user: what lies after it is given up

    @property
    def step(self) -> int:
        """Optimizer steps that it has behind it."""
        return self.state["global_step"]

    @property
    def best(self) -> dict[str, float]:
        """Figures of the best validation up to it, and its step."""
        return self.state["callbacks"]["Checkpoints"]["best"]


def named_resume_point(path: Path) -> ResumePoint:
    """The checkpoint at a path; UserError if it is missing, damaged, or not from training."""
    return ResumePoint(path, _load(path), {}, named=True)


def newest_resume_point(run: RunFolder, max_steps: int) -> ResumePoint | None:
    """The checkpoint with the most steps of all that are whole; None where the run has none at all yet.

    Without a whole best.ckpt, which is what is tested at the end, it must leave a step to do: a validation makes one.

    Raises:
        UserError: all are damaged, or they hold weights alone.
    """
    has_best = bool(best_of(run))
    steps: dict[Path, int] = {}
    damaged: dict[Path, str] = {}
    for path in run.checkpoints():
        try:
            steps[path] = _needed(steps_behind(path), "global_step", path)
        except UserError as error:
            damaged[path] = str(error)
    if run.lasts() and not run.last.exists():
        damaged[run.last] = f"{run.last} is missing"
    for path in sorted(steps, key=steps.__getitem__, reverse=True):  # of equal ones the last before the best
        try:
            point = ResumePoint(path, _load(path), damaged)
        except UserError as error:
            damaged[path] = str(error)
            continue
        if has_best or point.step < max_steps or point.best.get("step") == point.step:
            return point
    if steps.keys() - damaged.keys():
        raise UserError(
            f"{run.path} has made all its {max_steps} steps, but has no whole best.ckpt: a larger trainer.max_steps "
            "trains on, and makes one"
        )
    if damaged:
        raise UserError(
            f"{run.path} has no checkpoint to go on from: {next(iter(damaged.values()))}\n"
            f"  Of {len(damaged)} none can be used. Restore one, or begin another run with another hydra.run.dir"
        )
    return None


def _load(path: Path) -> dict[str, Any]:
    state = load_checkpoint(path)
    for key in OF_TRAINING:
        _needed(state.get(key), key, path)
    if not isinstance(state["callbacks"].get("Checkpoints", {}).get("best"), dict):
        raise UserError(f"{path} is no checkpoint of training: it does not say which validation was the best")
    return state


def _needed(value: Any, key: str, path: Path) -> Any:
    if value is None:
        raise UserError(f"{path} has no {key}, so a run cannot go on from it: init_from takes its weights")
    return value


def prepare_checkpoints(run: RunFolder, point: ResumePoint, keep_last: int) -> None:
    """Put the checkpoints of a run in order before it goes on from `point`.

    Nothing damaged and nothing given up is among them afterwards; it is named, and kept where nothing looks for it.
    """
    for path, what in point.damaged.items():
        kept = f", kept as {set_aside(path, 'damaged').name}" if path.exists() else ""
        _say(f"{what}{kept}; going on from {point.path.name}, step {point.step}")
    others = [path for path in run.checkpoints() if path != point.path] if point.named else []
    for path in others:
        try:
            if (steps_behind(path) or 0) > point.step:
                _say(f"{path} is given up, kept as {set_aside(path, 'given-up').name}")
        except UserError as error:
            _say(f"{error}, kept as {set_aside(path, 'damaged').name}")
    if point.path not in run.checkpoints():
        _copy(point.path, run.last, keep_last)
    if run.best.exists():  # it may be older than `point`, so that nobody has read it yet
        try:
            load_checkpoint(run.best, mmap=True)
        except UserError as error:
            _say(f"{error}, kept as {set_aside(run.best, 'damaged').name}; the next validation makes another")
    # A save that failed for best.ckpt alone left it to last.ckpt.
    if point.best.get("step") == point.step and best_of(run).get("step") != point.step:
        _copy(point.path, run.best, 1)


def _say(text: str) -> None:
    say(f"warning: {text}", file=sys.stderr)


def best_of(run: RunFolder) -> dict[str, float]:
    """Figures of the best checkpoint there is, and its step; empty where it is missing, or damaged."""
    try:
        return ResumePoint(run.best, load_checkpoint(run.best, mmap=True), {}).best
    except (UserError, KeyError):
        return {}


def _copy(source: Path, target: Path, keep: int) -> None:
    with open(source, "rb") as content:
        write_atomically(
            target,
            lambda file: shutil.copyfileobj(content, file),
            lambda temporary, path: put_in_front(temporary, path, keep),
        )
