"""The clock of the throughput, and when the loop reads what the device has worked out."""

import warnings
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from mla_lm.config import TrainConfig
from mla_lm.model.transformer import Transformer
from mla_lm.training.callbacks import Metrics
from mla_lm.training.module import LanguageModel
from scripts.plan import composed


def test_pauses_are_left_out(monkeypatch):
    clock = iter((100.0, 101.0, 110.0, 115.0, 115.0))
    monkeypatch.setattr("mla_lm.training.callbacks.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    metrics = Metrics(TrainConfig(), flops_per_token=1.0, peak_flops=1.0)
    metrics.on_train_start(None, None)
    metrics.pause()  # a second later
    metrics.pause()  # a save within a validation
    metrics.on_train_batch_start(None, None)
    assert metrics.train_seconds == 101 - 100 + 115 - 110
    resumed = Metrics(TrainConfig(), 1.0, 1.0)
    resumed.load_state_dict(metrics.state_dict())
    assert resumed.train_seconds == 6


class Reads(TorchDispatchMode):
    """At which steps a tensor's value was asked for, where a GPU would have to be waited for."""

    def __init__(self, trainer: L.Trainer):
        super().__init__()
        self.trainer, self.steps = trainer, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal"):
            self.steps.add(self.trainer.global_step)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_only_a_logging_step_reads_from_the_device(optimizer):
    sizes = ["model=mla_tiny", "model.vocab_size=50", "model.seq_len=16", "tokens_per_step=64", "micro_batch_tokens=32"]
    config = composed([*sizes, f"optimizer={optimizer}", "log_every_n_steps=4", "trainer.max_steps=10"])
    module = LanguageModel(Transformer(config.model), config, torch.zeros(50, dtype=torch.int64), data_fingerprint="")
    silent = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    metrics = Metrics(config, flops_per_token=1.0, peak_flops=1.0)
    trainer = L.Trainer(
        accelerator="cpu", precision="bf16-mixed", max_steps=10, callbacks=[metrics], **dict.fromkeys(silent, False)
    )
    batches = DataLoader(torch.randint(50, (12, 4, 17)), batch_size=None)
    with warnings.catch_warnings(), Reads(trainer) as reads:
        warnings.simplefilter("ignore")  # of Lightning, on the loader
        trainer.fit(module, batches)
    assert reads.steps - {0} == {4, 8, 10}  # at 0 the loader draws a seed
