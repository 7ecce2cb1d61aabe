"""The clock of the throughput, and when the loop reads what the device has worked out."""

import warnings
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from mla_lm.config import TrainConfig
from mla_lm.model.transformer import Transformer
from mla_lm.training.callbacks import Metrics
from mla_lm.training.module import LanguageModel
from scripts.plan import composed
from tests import varlen_attention  # noqa: F401 - the kernel of a GPU, for a CPU


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


class Copies(TorchFunctionMode):
    """At which steps a tensor was copied to the host, which calls none of the operations above where it lies there."""

    def __init__(self, trainer: L.Trainer):
        super().__init__()
        self.trainer, self.steps = trainer, set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.tolist, torch.Tensor.cpu):
            self.steps.add(self.trainer.global_step)
        return func(*args, **(kwargs or {}))


def reads_of(overrides: list[str], batches: torch.Tensor) -> set[int]:
    """At which steps training on these batches, (steps, B, T + 1), reads from the device."""
    sizes = ["model=mla_tiny", "model.vocab_size=50", "model.seq_len=16", "tokens_per_step=64", "micro_batch_tokens=32"]
    config = composed([*sizes, *overrides, "log_every_n_steps=4", f"trainer.max_steps={len(batches)}"])
    module = LanguageModel(Transformer(config.model), config, torch.zeros(50, dtype=torch.int64), data_fingerprint="")
    silent = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    metrics = Metrics(config, flops_per_token=1.0, peak_flops=1.0)
    trainer = L.Trainer(
        accelerator="cpu",
        precision="bf16-mixed",
        max_steps=len(batches),
        callbacks=[metrics],
        **dict.fromkeys(silent, False),
    )
    with warnings.catch_warnings(), Reads(trainer) as reads, Copies(trainer) as copies:
        warnings.simplefilter("ignore")  # of Lightning, on the loader
        trainer.fit(module, DataLoader(batches, batch_size=None))
    return (reads.steps | copies.steps) - {0}  # at 0 the loader draws a seed


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_only_a_logging_step_reads_from_the_device(optimizer):
    assert reads_of([f"optimizer={optimizer}"], torch.randint(50, (10, 4, 17))) == {4, 8, 10}


@pytest.mark.parametrize("documents", [2, 5, 50], ids=["many", "some", "few"])
def test_documents_are_not_read_from_the_device(monkeypatch, documents):
    """They are counted before the windows go there, if one kernel takes them all. Half of the steps cut the windows."""
    monkeypatch.setattr("mla_lm.attention.documents.takes_all_at_once", lambda *_: True)
    batches = torch.randint(documents, (10, 4, 17))
    batches[:2] = 1  # no document begins within these
    keys = ["model.document_token=0", "schedule.short_seq_len=8"]
    assert reads_of(keys, batches) == {4, 8, 10}


def test_documents_that_are_taken_one_by_one_are_read():
    keys = ["model.document_token=0", "schedule.short_seq_len=8"]
    assert reads_of(keys, torch.randint(5, (10, 4, 17))) == set(range(1, 11))
