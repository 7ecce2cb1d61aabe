"""The Lightning side of training: loss, metrics, optimiser, nothing else."""

import math
from contextlib import nullcontext
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from mla_lm.config import TrainConfig
from mla_lm.errors import TrainingFailed
from mla_lm.evaluate import metrics_of, totals_of
from mla_lm.optim import build_optimizer
from mla_lm.schedule import lr_factor
from mla_lm.transformer import Transformer


class LanguageModel(L.LightningModule):
    """A `Transformer` and what it takes to train it.

    A training batch is one optimizer step's share of this device, (B, seq_len + 1) ids: inputs are all but the last,
    targets all but the first. It is split into micro-batches here, so that a step of the loader, of Lightning and of
    the optimiser are the same thing, however many devices and micro-batches share it.

    Args:
        net: the network; in a checkpoint, `state_dict` has its own names
        config: the run's configuration
        token_bytes: (vocab_size,) UTF-8 bytes that each token stands for, 0 for special tokens
        data_fingerprint: kept in checkpoints, so that a run is not resumed on other data
    """

    def __init__(
        self,
        net: Transformer,
        config: TrainConfig,
        token_bytes: Tensor,
        data_fingerprint: str,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.net = net
        self.config = config
        self.data_fingerprint = data_fingerprint
        self.register_buffer("token_bytes", token_bytes, persistent=False)
        self.loss = torch.zeros(())  # of the last step, over its micro-batches, on this device
        self.grad_norm = torch.zeros(())

    def setup(self, stage: str) -> None:
        """Compile on all devices or on none: each has timed the machine for itself, and the first one's word counts."""
        if stage == "fit" and self.trainer.strategy.broadcast(self.config.compile):
            torch.compiler.reset()  # or the compiler would give up after several jobs of a multirun
            self.net.compile()

    @property
    def lr(self) -> float:
        """Learning rate of the step that comes next."""
        return self.config.optimizer.lr * lr_factor(
            self.global_step, self.config.trainer.max_steps, self.config.schedule
        )

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        # Dropout is a pure function of (seed, step, rank): a resumed run draws what the first would have drawn.
        place = np.random.SeedSequence((self.config.seed, self.global_step, self.global_rank))
        torch.manual_seed(int(place.generate_state(1, np.uint64)[0] >> 1))
        optimizer = self.optimizers()
        for group in optimizer.param_groups:
            group["lr"] = self.lr
        micro_batches = batch.split(self.config.micro_batch_size)
        self.loss = torch.zeros((), device=self.device)
        for i, tokens in enumerate(micro_batches, start=1):
            with nullcontext() if i == len(micro_batches) else self._no_gradient_sync():
                loss = self.net(tokens[:, :-1], tokens[:, 1:]) / len(micro_batches)
                self.manual_backward(loss)
            self.loss += loss.detach()
        optimizer.step()
        optimizer.zero_grad()

    def _no_gradient_sync(self):
        """Under DDP, gradients are averaged over devices once a step, not once a micro-batch."""
        ddp = self.trainer.strategy.model
        return ddp.no_sync() if hasattr(ddp, "no_sync") else nullcontext()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        clip = self.config.optimizer.gradient_clip or math.inf
        self.grad_norm = torch.nn.utils.clip_grad_norm_(self.net.parameters(), clip)

    def stop_if_diverged(self) -> None:
        """Raises TrainingFailed where the loss or the gradients are no numbers: every weight is lost from here on.

        In fp16 such gradients are normal: the loss scaler skips the step.
        """
        loss, norm = self.loss.item(), self.grad_norm.item()
        if not math.isfinite(loss) or (not math.isfinite(norm) and self.config.trainer.precision != "16-mixed"):
            raise TrainingFailed(
                f"the loss is {loss} and the gradient norm {norm} at step {self.global_step}: training diverged.\n"
                "  Try a smaller optimizer.lr."
            )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        fused = self.config.trainer.precision != "16-mixed"  # there gradients must be unscaled, then clipped
        dtype = torch.bfloat16 if self.config.trainer.precision == "bf16-mixed" else torch.float32
        return build_optimizer(self.net, self.config.optimizer, fused, dtype)

    def on_validation_epoch_start(self) -> None:
        self.totals = torch.zeros(3, dtype=torch.float64)
        self.products = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")  # TF32 is for training: figures are those of scripts.evaluate

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.totals += totals_of(self.net, batch, self.token_bytes)

    def on_validation_epoch_end(self) -> None:
        torch.set_float32_matmul_precision(self.products)
        totals = self.totals
        if self.trainer.world_size > 1:
            totals = self.trainer.strategy.reduce(totals.to(self.device), reduce_op="sum")
        stage = "test" if self.trainer.testing else "val"
        self.evaluated = {f"{stage}/{name}": value for name, value in metrics_of(totals).items()}

    on_test_epoch_start, test_step, on_test_epoch_end = (
        on_validation_epoch_start,
        validation_step,
        on_validation_epoch_end,
    )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = self.net.state_dict()
        checkpoint["data_fingerprint"] = self.data_fingerprint
        checkpoint["random_state"] = torch.get_rng_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        torch.set_rng_state(checkpoint["random_state"])
        checkpoint["state_dict"] = {f"net.{name}": tensor for name, tensor in checkpoint["state_dict"].items()}
