"""Loss by position in the window: how well a model uses its context, and whether a longer one serves it."""

import json
from dataclasses import replace

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from mla_lm.attention import YarnConfig
from mla_lm.config import TrainConfig
from mla_lm.files import write_atomically
from mla_lm.hardware import inference_autocast
from mla_lm.inference.evaluate import position_table, ranges, sums_over
from mla_lm.model.transformer import Transformer
from mla_lm.runs.folder import RunFolder
from mla_lm.training.datamodule import datamodule_of
from mla_lm.training.module import LanguageModel


class LossByPosition(Callback):
    """Measures the loss by position on the validation sample before a run's first step and with its best weights.

    Where YaRN has extended the context, also before with plain RoPE. Prints a table; the run folder gets
    loss_by_position.json and, as a plot, loss_by_position.png.
    """

    def __init__(self, config: TrainConfig, run: RunFolder):
        self.config, self.file = config, run.path / "loss_by_position.json"

    def on_fit_start(self, trainer: L.Trainer, module: LanguageModel) -> None:
        if not trainer.is_global_zero or datamodule_of(trainer).start_step:  # a resumed run has measured it
            return
        measured = {}
        if self.config.model.attention.yarn.factor != 1:
            plain = replace(self.config.model.attention, yarn=YarnConfig())
            net = Transformer(replace(self.config.model, attention=plain)).to(module.device)
            net.load_state_dict(module.net.state_dict())
            measured["before, plain RoPE"] = self._measure(net, trainer, module)
        measured["before"] = self._measure(module.net, trainer, module)
        self._write(measured)

    def on_test_start(self, trainer: L.Trainer, module: LanguageModel) -> None:
        if not trainer.is_global_zero:
            return
        before = json.loads(self.file.read_text()) if self.file.is_file() else {}
        measured = {name: torch.tensor(sums, dtype=torch.float64) for name, sums in before.items()}
        measured["after"] = self._measure(module.net, trainer, module)
        self._write(measured)
        print(f"validation loss by position:\n{position_table(measured)}")
        picture = plot(measured, self._trained_length())
        write_atomically(self.file.with_suffix(".png"), lambda file: file.write(picture))

    def _trained_length(self) -> int | None:
        yarn = self.config.model.attention.yarn
        return None if yarn.factor == 1 else int(yarn.trained_length(self.config.model.seq_len))

    def _measure(self, net: Transformer, trainer: L.Trainer, module: LanguageModel) -> Tensor:
        """Sums of `sums_by_position` over the validation sample, (3, seq_len)."""
        training = net.training
        net.eval()
        with inference_autocast(module.device.type, self.config.trainer.precision):
            windows = datamodule_of(trainer).val_windows
            sums = sums_over(net, windows, module.token_bytes, self.config.micro_batch_size)
        net.train(training)
        return sums

    def _write(self, measured: dict[str, Tensor]) -> None:
        content = json.dumps({name: sums.tolist() for name, sums in measured.items()})
        write_atomically(self.file, lambda file: file.write(content.encode() + b"\n"))


def plot(columns: dict[str, Tensor], trained_length: int | None) -> bytes:
    """A PNG of the mean loss over the ranges of `position_table`, a line for each column.

    Args:
        trained_length: where the context ended before it was extended, marked by a vertical line
    """
    from mla_lm import charts  # only a run that asks for a plot needs its library

    series = [
        charts.Series(name, name, number, charts.SHAPES[number], charts.DASHES[number])
        for number, name in enumerate(reversed(columns))  # what the run has come to is the whole line
    ]
    points = []
    for name, sums in columns.items():
        for start, end in ranges(sums.shape[1]):
            nats, tokens = sums[:2, start:end].sum(-1).tolist()
            if tokens:
                points.append({"series": name, "x": (start + end + 1) / 2, "y": nats / tokens})
    x = {"title": "tokens before the one that is predicted", "scale": {"type": "log", "base": 2}}
    y = {"title": "validation loss (nats per token)", "scale": {"zero": False}}
    spec = charts.lines(points, series, x, y)
    if trained_length:
        spec["layer"] += charts.vertical_line(trained_length, "trained length")
    return charts.png(charts.svg(spec))
