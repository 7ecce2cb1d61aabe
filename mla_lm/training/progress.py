"""How a run shows that it goes on: a bar on a terminal, a line per logging step elsewhere."""

import sys
import time
from datetime import timedelta
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, TQDMProgressBar

from mla_lm.config import TrainConfig
from mla_lm.training.callbacks import Metrics
from mla_lm.training.module import LanguageModel


def progress(config: TrainConfig, metrics: Metrics) -> Callback:
    return Bar(metrics) if sys.stderr.isatty() else Lines(config, metrics)


class Bar(TQDMProgressBar):
    """Lightning's bar: steps, time spent and left; loss and tokens per second of the last logging step."""

    def __init__(self, metrics: Metrics):
        super().__init__(refresh_rate=1)
        self.metrics = metrics

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        super().on_train_epoch_start(trainer)
        self.train_progress_bar.set_description("training")  # passes over the data are not counted by Lightning

    def get_metrics(self, trainer: L.Trainer, module: LanguageModel) -> dict[str, Any]:
        shown = {}
        if self.metrics.train_loss is not None:
            shown["loss"] = f"{self.metrics.train_loss:.3f}"
        if self.metrics.rates:
            shown["tokens/s"] = f"{self.metrics.rates[-1]:,.0f}"
        if evaluated := getattr(module, "evaluated", None):
            shown["val_loss"] = f"{next(iter(evaluated.values())):.3f}"
        return shown


class Lines(Callback):
    """For log files: a line at each logging step and each validation."""

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
                f"{timedelta(seconds=round(left))} left",
                flush=True,
            )

    def on_validation_end(self, trainer: L.Trainer, module: LanguageModel) -> None:
        if trainer.is_global_zero:
            shown = "  ".join(f"{name} {value:.4f}" for name, value in module.evaluated.items())
            print(f"step {trainer.global_step}  {shown}", flush=True)
