"""When and how a run is saved: checkpoints, and stopping on a signal."""

import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.io import CheckpointIO

from mla_lm.callbacks import Metrics, log
from mla_lm.checkpoint import load_checkpoint, write_atomically
from mla_lm.config import TrainConfig
from mla_lm.errors import Interrupted
from mla_lm.lightning_module import LanguageModel
from mla_lm.run import RunFolder


class AtomicCheckpointIO(CheckpointIO):
    """How Lightning saves and loads: whole or not at all, and as plain data."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str, storage_options: Any = None) -> None:
        write_atomically(Path(path), lambda file: torch.save(checkpoint, file))

    def load_checkpoint(self, path: str, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return load_checkpoint(Path(path))

    def remove_checkpoint(self, path: str) -> None:
        Path(path).unlink(missing_ok=True)


class Checkpoints(Callback):
    """last.ckpt every n steps and at the end; best.ckpt at the validation with the lowest loss so far.

    Where a save and a validation fall on one step, the validation comes first, so that a resumed run never misses
    one. The best loss is part of the state, so it holds wherever the run folder is moved to.
    """

    def __init__(self, run: RunFolder, config: TrainConfig, metrics: Metrics):
        self.run, self.config, self.metrics = run, config, metrics
        self.best: dict[str, float] = {}  # metrics of the best validation, and its step

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = state["best"]

    def on_train_batch_end(self, trainer: L.Trainer, module: LanguageModel, *_: Any) -> None:
        step = trainer.global_step
        if step == self.config.trainer.max_steps:
            trainer.should_stop = True  # makes Lightning validate once more, whatever the interval
        elif step % self.config.checkpoint.every_n_steps == 0 and step % self.config.val_every_n_steps:
            self.save(trainer, module)

    def on_validation_end(self, trainer: L.Trainer, module: LanguageModel) -> None:
        step, metrics = trainer.global_step, module.evaluated
        log(trainer, metrics)
        if metrics["val/loss"] < self.best.get("val/loss", math.inf):
            self.best = {**metrics, "step": step}
            trainer.save_checkpoint(self.run.best)
        if step % self.config.checkpoint.every_n_steps == 0 or step == self.config.trainer.max_steps:
            self.save(trainer, module)

    def save(self, trainer: L.Trainer, module: LanguageModel) -> None:
        """Write last.ckpt, unless the weights are lost."""
        module.stop_if_diverged()
        self.metrics.pause()
        trainer.save_checkpoint(self.run.last)


class StopOnSignal(Callback):
    """SIGTERM or Ctrl-C: finish the step (and the validation due at it), save, and raise `Interrupted`.

    Works inside a `with` block, over training and testing. A second signal ends the process at once.
    """

    def __init__(self, checkpoints: Checkpoints, config: TrainConfig):
        self.checkpoints, self.config = checkpoints, config
        self.received = 0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> None:
        self.before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
        self._listen()

    def __exit__(self, *_: Any) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def _listen(self, *_: Any) -> None:
        for signum in self.before:
            signal.signal(signum, self._receive)

    on_train_start = on_test_start = _listen  # Lightning has put its own handler for SIGTERM before it by then

    def _receive(self, signum: int, frame: Any) -> None:
        if self.received:
            os._exit(128 + signum)
        self.received = signum
        print(f"\n{signal.Signals(signum).name}: stopping after this step", file=sys.stderr, flush=True)

    def on_train_batch_end(self, trainer: L.Trainer, module: LanguageModel, *_: Any) -> None:
        step = trainer.global_step
        if step % self.config.val_every_n_steps and step != self.config.trainer.max_steps:
            self._stop_if_received(trainer, module)

    def on_validation_end(self, trainer: L.Trainer, module: LanguageModel) -> None:
        self._stop_if_received(trainer, module)

    def _stop_if_received(self, trainer: L.Trainer, module: LanguageModel) -> None:
        if received := self._received_anywhere(trainer, module):
            self.checkpoints.save(trainer, module)
            raise Interrupted(received)

    def on_test_batch_end(self, trainer: L.Trainer, module: LanguageModel, *_: Any) -> None:
        if self.received:  # the last step is saved
            raise Interrupted(self.received)

    def _received_anywhere(self, trainer: L.Trainer, module: LanguageModel) -> int:
        """All ranks stop at the same step."""
        if trainer.world_size == 1:
            return self.received
        tensor = torch.tensor(self.received, device=module.device)
        return int(trainer.strategy.reduce(tensor, reduce_op="max").item())
