"""When a run is saved, and what happens where it cannot be."""

import math
import sys
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from mla_lm.config import TrainConfig
from mla_lm.errors import ADVICE, Diverged, TrainingFailed
from mla_lm.runs.folder import RunFolder
from mla_lm.runs.resume_point import best_of
from mla_lm.terminal.plain_text import say
from mla_lm.training.background_save import BackgroundCheckpointIO, SaveErrors
from mla_lm.training.callbacks import Metrics, log
from mla_lm.training.module import LanguageModel

MOST_FAILED = 3  # saves one after another, after which a run that cannot be saved ends


class Checkpoints(Callback):
    """last.ckpt every n steps and at the end; best.ckpt at the validation with the lowest loss so far.

    Where a save and a validation fall on one step, the validation comes first, so that a resumed run never misses
    one. A save that fails is told at the next step, and training goes on as long as there is an earlier checkpoint:
    the next save is the next try.
    """

    def __init__(self, run: RunFolder, config: TrainConfig, metrics: Metrics):
        self.run, self.config, self.metrics = run, config, metrics
        self.io = BackgroundCheckpointIO(config.checkpoint.keep_last)
        self.best: dict[str, float] = {}  # metrics of the best validation, and its step
        self.best_before: dict[str, float] = {}  # those of best.ckpt, as long as a better one is being written
        self.failed = 0  # saves, one after another
        self.last_step = -1  # that last.ckpt was last written at

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = best_of(self.run)  # best.ckpt may be newer than the checkpoint that training goes on from, or gone

    def on_before_optimizer_step(self, *_: Any) -> None:
        self.io.wait_until_copied()

    def on_train_batch_end(self, trainer: L.Trainer, module: LanguageModel, *_: Any) -> None:
        step = trainer.global_step
        if trainer.world_size == 1:  # with several processes all learn of it where they meet
            self._see_to(trainer, self.io.failures())
        if step == self.config.trainer.max_steps:
            trainer.should_stop = True  # makes Lightning validate once more, whatever the interval
        elif step % self.config.checkpoint.every_n_steps == 0 and step % self.config.val_every_n_steps:
            self.save(trainer, module)

    def on_validation_end(self, trainer: L.Trainer, module: LanguageModel) -> None:
        step, metrics = trainer.global_step, module.evaluated
        log(trainer, metrics)
        if not math.isfinite(metrics["val/loss"]):
            raise Diverged(
                f"training diverged: the validation loss is {metrics['val/loss']} after step {step}; it is not saved.\n"
                f"  {ADVICE}"
            )
        self._see_to(trainer, self.io.wait())  # what became of the best one decides whether this is better
        paths = []
        if metrics["val/loss"] < self.best.get("val/loss", math.inf):
            self.best, self.best_before = {**metrics, "step": step}, self.best
            paths.append(self.run.best)
        if step % self.config.checkpoint.every_n_steps == 0 or step == self.config.trainer.max_steps:
            paths.append(self.run.last)
        if paths:
            self.save(trainer, module, paths)

    def on_train_end(self, trainer: L.Trainer, module: LanguageModel) -> None:
        self._see_to(trainer, self.io.wait(), last_try=True)
        trainer.strategy.barrier()  # the other devices read best.ckpt next

    def save(self, trainer: L.Trainer, module: LanguageModel, paths: list[Path] | None = None) -> None:
        """Begin to write last.ckpt, or `paths` in their order, unless the weights are lost."""
        self._see_to(trainer, self.io.wait())
        self._begin(trainer, module, *(paths or [self.run.last]))

    def save_now(self, trainer: L.Trainer, module: LanguageModel) -> None:
        """Write last.ckpt of this step and wait until it is on the disk; print a warning if it cannot be written."""
        failures = trainer.strategy.broadcast(self.io.wait())
        if failures or self.last_step != trainer.global_step:
            self._tell(failures, "another one is tried now")
            self._begin(trainer, module, self.run.last)
            self._tell(self.io.wait(), "the steps since the checkpoint before are lost")
        trainer.strategy.barrier()  # a process that ends has the others ended

    def _begin(self, trainer: L.Trainer, module: LanguageModel, *paths: Path) -> None:
        module.stop_if_diverged()
        self.metrics.pause()
        if self.run.last in paths:
            self.last_step = trainer.global_step
        self.io.copies = list(paths[1:])
        trainer.save_checkpoint(paths[0])

    @staticmethod
    def _tell(failures: SaveErrors | None, then: str) -> None:
        for error in (failures or {}).values():
            say(f"warning: {error}; {then}", file=sys.stderr)

    def _see_to(self, trainer: L.Trainer, failures: SaveErrors | None, last_try: bool = False) -> None:
        """Handle the outcome of a save. One process writes, and all learn the outcome.

        Raises:
            TrainingFailed: the weights are lost.
            UserError: it could not be written, and there is no checkpoint yet, or it was not the first such failure.
        """
        failures, saved = trainer.strategy.broadcast((failures, bool(failures and self.run.checkpoints())))
        if failures is None:
            return
        if self.run.best in failures:
            self.best = self.best_before
        if not failures:
            self.failed = 0
            return
        self.failed += 1
        error = next(iter(failures.values()))
        if isinstance(error, TrainingFailed) or last_try or self.failed == MOST_FAILED or not saved:
            raise error
        if trainer.is_global_zero:
            self._tell(failures, "training goes on, and the next save is another try")
