"""Training steps of ours, as train.py makes them."""

import logging
import time
import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader

from mla_lm.config import TrainerConfig
from mla_lm.hardware import synchronize
from mla_lm.model.config import TransformerConfig
from mla_lm.model.size import model_size
from mla_lm.model.transformer import Transformer
from mla_lm.training.module import LanguageModel
from scripts.plan import composed


class OurTraining:
    """A model of ours in Lightning's loop, with the LanguageModel, optimizer and precision of train.py.

    Args:
        model: its configuration
        tokens: (B, T + 1), the batch of every step, in one micro-batch
        optimizer: a name in conf/optimizer
        fp8: as trainer.fp8
    """

    def __init__(
        self,
        model: TransformerConfig,
        tokens: Tensor,
        precision: str,
        compiled: bool,
        optimizer: str,
        fp8: bool = False,
    ):
        self.tokens, self.device = tokens, tokens.device.type
        per_step = tokens[:, 1:].numel()
        self.config = replace(
            composed([f"optimizer={optimizer}"]),
            model=model,
            tokens_per_step=per_step,
            micro_batch_tokens=per_step,
            trainer=TrainerConfig(precision=precision, accelerator={"cuda": "gpu"}.get(self.device, self.device)),
        )
        size = model_size(model)
        self.parameters, self.flops_per_token = size.parameters, size.flops_per_token
        net = Transformer(model)
        if fp8:
            net.train_in_fp8()
        if compiled:
            net.compile()
        no_text = torch.zeros(model.vocab_size, dtype=torch.int64)  # what validation alone reads
        self.module = LanguageModel(net, self.config, no_text, data_fingerprint="")
        self.first_loss: float | None = None

    def run(self, steps: int, loader: Iterable[Tensor] | None = None) -> float:
        """Train on the batch, or on those of a loader, and return the seconds it took.

        A step before is not counted, in which the optimizer is new.
        """
        clock = Clock(self.device)
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        trainer = L.Trainer(
            accelerator=self.config.trainer.accelerator,
            devices=1,
            precision=self.config.trainer.precision,
            max_steps=steps + 1,
            callbacks=[clock],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Lightning, on the loader, which holds one batch
            trainer.fit(self.module, loader or DataLoader([self.tokens] * (steps + 1), batch_size=None))
        if self.first_loss is None:
            self.first_loss = clock.first_loss
        return clock.seconds


class Clock(Callback):
    """Seconds from the end of the first step to the end of the last."""

    def __init__(self, device: str):
        self.device = device

    def on_train_batch_end(self, trainer: L.Trainer, module: LanguageModel, *_: Any) -> None:
        if trainer.global_step == 1:
            self.first_loss = module.loss.item()
            synchronize(self.device)
            self.began = time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, module: LanguageModel) -> None:
        synchronize(self.device)
        self.seconds = time.perf_counter() - self.began
