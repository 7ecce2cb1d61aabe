"""How a run shows that it goes on: a line at each logging step, and on a terminal a bar below the lines."""

import sys
import time
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

from mla_lm.config import TrainConfig
from mla_lm.terminal.plain_text import duration
from mla_lm.training.callbacks import Metrics
from mla_lm.training.module import LanguageModel

if TYPE_CHECKING:
    from rich.progress import Progress

FRAMES = 4  # drawings of the bar per second


def progress(config: TrainConfig, metrics: Metrics) -> list[Callback]:
    on_terminal = sys.stderr.isatty() and rank_zero_only.rank == 0
    return [LogLines(config, metrics), *([ProgressBar(config)] if on_terminal else [])]


class LogLines(Callback):
    """A line at each logging step and each validation."""

    def __init__(self, config: TrainConfig, metrics: Metrics):
        self.config, self.metrics = config, metrics

    def on_train_start(self, trainer: L.Trainer, module: LanguageModel) -> None:
        self.began, self.first = time.monotonic(), trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, module: LanguageModel, *_: Any) -> None:
        step, last = trainer.global_step, self.config.trainer.max_steps
        if trainer.is_global_zero and (step % self.config.log_every_n_steps == 0 or step == last):
            left = (time.monotonic() - self.began) / (step - self.first) * (last - step)
            rate = f"{self.metrics.rates[-1]:,.0f} tokens/s  " if self.metrics.rates else ""
            print(
                f"step {step:>{len(str(last))}}/{last}  loss {self.metrics.train_loss:.3f}  {rate}"
                f"{duration(left)} left",
                flush=True,
            )

    def on_validation_end(self, trainer: L.Trainer, module: LanguageModel) -> None:
        if trainer.is_global_zero:
            shown = "  ".join(f"{name} {value:.4f}" for name, value in module.evaluated.items())
            print(f"step {trainer.global_step}  {shown}", flush=True)


class ProgressBar(Callback):
    """A bar on standard error, below what is printed meanwhile: steps of training, or batches of an evaluation."""

    def __init__(self, config: TrainConfig):
        self.config = config
        self.bars = _bars()

    def on_train_start(self, trainer: L.Trainer, module: LanguageModel) -> None:
        self._start()
        steps = self.config.trainer.max_steps
        self.training = self.bars.add_task("training", total=steps, completed=trainer.global_step)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.bars.update(self.training, completed=trainer.global_step)

    def on_validation_start(self, trainer: L.Trainer, module: LanguageModel) -> None:
        # One row at a time: of two, the upper one would erase what a signal handler writes below them.
        self.bars.update(self.training, visible=False)
        self.evaluation = self.bars.add_task("validation", total=sum(trainer.num_val_batches))

    def on_validation_end(self, trainer: L.Trainer, module: LanguageModel) -> None:
        self.bars.remove_task(self.evaluation)
        self.bars.update(self.training, visible=True)

    def on_test_epoch_start(self, trainer: L.Trainer, module: LanguageModel) -> None:
        self._start()
        self.evaluation = self.bars.add_task("test", total=sum(trainer.num_test_batches))

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        self.bars.advance(self.evaluation)

    on_test_batch_end = on_validation_batch_end

    def _start(self) -> None:
        self.bars = _bars()
        self.bars.start()
        self.bars.console.show_cursor()  # a process that is killed would leave the terminal without one

    def _stop(self, *_: Any, **__: Any) -> None:
        self.bars.stop()

    on_train_end = on_test_end = on_exception = _stop


def _bars() -> "Progress":
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("elapsed"),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=Console(stderr=True, markup=False, highlight=False, emoji=False),
        refresh_per_second=FRAMES,
        speed_estimate_period=600,  # seconds: steps may take minutes
        redirect_stdout=sys.stdout.isatty(),  # what goes into a file stays there
    )
