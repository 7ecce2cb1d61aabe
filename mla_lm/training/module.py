"""The Lightning side of training: loss, metrics, optimiser, nothing else."""

import math
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import lightning as L
import numpy as np
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor

from mla_lm.compiled_code import prepare_folder
from mla_lm.config import TrainConfig
from mla_lm.data.windows import most_documents
from mla_lm.errors import ADVICE, Diverged
from mla_lm.inference.evaluate import metrics_of, totals_of
from mla_lm.model.transformer import Transformer
from mla_lm.optim.optimizer import build_optimizer
from mla_lm.optim.schedule import lr_factor
from mla_lm.training.datamodule import datamodule_of

MOST_SKIPPED = 20  # steps of a run, with on_nonfinite=skip


class LanguageModel(L.LightningModule):
    """A `Transformer` and what it takes to train it.

    A training batch is one optimizer step's share of this device, (B, seq_len + 1) ids: inputs are all but the last,
    targets all but the first. With `document_token`, `on_before_batch_transfer` adds the most documents that a
    micro-batch has. The batch is split into micro-batches here, so that a step of the loader, of Lightning and of the
    optimiser are the same thing, however many devices and micro-batches share it; and cut into short windows where the
    schedule has them.

    Args:
        net: the network; in a checkpoint, `state_dict` has its own names
        config: the run's configuration
        token_bytes: (vocab_size,) UTF-8 bytes that each token stands for, 0 for special tokens
        data_fingerprint: kept in checkpoints, so that a run is not resumed on other data
    """

    token_bytes: Tensor

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
        self.unread: list[tuple[int, Tensor, Tensor]] = []  # steps since the last look, their losses and norms
        self.skipped = 0  # steps left out, of the whole run
        self.evaluated: dict[str, float] = {}  # figures of the last validation or test

    def setup(self, stage: str) -> None:
        """Compile on all devices or on none: each process decides for itself, and the first one's choice counts."""
        if stage == "fit" and self.trainer.strategy.broadcast(self.config.compile):
            prepare_folder()  # which this process has not done where it would not have compiled by itself
            torch.compiler.reset()  # or the compiler would give up after several jobs of a multirun
            self.net.compile()  # for few shapes: one or two lengths of windows, a few numbers of documents

    @property
    def lr(self) -> float:
        """Learning rate of the step that comes next."""
        return self.config.optimizer.lr * lr_factor(
            self.global_step, self.config.trainer.max_steps, self.config.schedule
        )

    @property
    def optimizer(self) -> LightningOptimizer:
        return cast(LightningOptimizer, self.optimizers())  # a list where there are several

    def on_before_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Any:
        """Count a training step's documents while its windows are on the CPU, so that nothing waits for the device."""
        if not self.trainer.training:
            return batch
        token, window = self.config.model.document_token, self.config.window_length(self.global_step)
        return batch, None if token is None else most_documents(batch, token, window, self.config.micro_batch_size)

    def training_step(self, batch: tuple[Tensor, int | None], batch_idx: int) -> None:
        windows, documents = batch
        # Dropout is a pure function of (seed, step, rank): a resumed run draws what the first would have drawn.
        place = np.random.SeedSequence((self.config.seed, self.global_step, self.global_rank))
        torch.manual_seed(int(place.generate_state(1, np.uint64)[0] >> 1))
        optimizer = self.optimizer
        for group in optimizer.param_groups:
            group["lr"] = self.lr * group.get("lr_share", 1.0)
        micro_batches = windows.split(self.config.micro_batch_size)
        window = self.config.window_length(self.global_step)
        self.loss = torch.zeros((), device=self.device)
        for i, tokens in enumerate(micro_batches, start=1):
            with nullcontext() if i == len(micro_batches) else self._no_gradient_sync():
                inputs, targets = (ids.reshape(-1, window) for ids in (tokens[:, :-1], tokens[:, 1:]))
                loss = self.net(inputs, targets, most_documents=documents) / len(micro_batches)
                self.manual_backward(loss)
            self.loss += loss.detach()
        step = self.global_step
        optimizer.step()
        optimizer.zero_grad()
        if self.config.on_nonfinite == "stop":
            self.unread.append((step, self.loss, self.grad_norm))

    def _no_gradient_sync(self) -> AbstractContextManager:
        """With several devices, gradients are averaged over them once a step, not once a micro-batch."""
        strategy = self.trainer.strategy
        return strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        clip = self.config.optimizer.gradient_clip or math.inf
        self.grad_norm = torch.nn.utils.clip_grad_norm_(self.net.parameters(), clip)
        if self.config.on_nonfinite == "skip" and self._is_lost_anywhere():
            self._skip()

    def _is_lost_anywhere(self) -> bool:
        """Whether this step's loss or gradient is no finite number, on any device; waits for the device."""
        lost = ~torch.isfinite(self.loss)
        if not self._scales_the_loss:
            lost |= ~torch.isfinite(self.grad_norm)
        if self.trainer.world_size > 1:
            lost = self.trainer.strategy.reduce(lost.float(), reduce_op="max")
        return bool(lost)

    def _skip(self) -> None:
        """Let the optimizer see no gradients: it counts the step and changes nothing."""
        self.skipped += 1
        what = self._words(self.global_step, self.loss.item(), self.grad_norm.item())
        if self.skipped > MOST_SKIPPED:
            raise Diverged(
                f"training diverged: {what}.\n  {MOST_SKIPPED} steps were skipped before it, which is the limit. "
                "A smaller optimizer.lr needs a new run."
            )
        if self.trainer.is_global_zero:
            print(f"warning: a step is skipped: {what}", file=sys.stderr)
        if not self._scales_the_loss:  # where it does, the scaler sees it and skips the step itself
            for parameter in self.net.parameters():
                parameter.grad = None

    @property
    def _scales_the_loss(self) -> bool:
        """In fp16 gradients that are no numbers are normal: the loss scaler skips the step."""
        return self.config.trainer.precision == "16-mixed"

    def stop_if_diverged(self) -> None:
        """Raises Diverged where a loss or gradient since the last call is no finite number.

        Every weight is lost from that step on. This reads from the device.
        """
        unread, self.unread = self.unread, []
        if not unread:
            return
        losses, norms = (torch.stack(values).tolist() for values in list(zip(*unread, strict=True))[1:])
        for (step, *_), loss, norm in zip(unread, losses, norms, strict=True):
            if not math.isfinite(loss) or not (math.isfinite(norm) or self._scales_the_loss):
                raise Diverged(f"training diverged: {self._words(step, loss, norm)}.\n  {ADVICE}")

    def _words(self, step: int, loss: float, norm: float) -> str:
        """Describe a step: its loss, gradient norm, learning rate and windows."""
        lr = self.config.optimizer.lr * lr_factor(step, self.config.trainer.max_steps, self.config.schedule)
        return (
            f"the loss is {loss:g} and the gradient norm {norm:g} at step {step + 1}, with learning rate {lr:g}, on "
            f"the windows that begin at {datamodule_of(self.trainer).places(step)}"
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
        checkpoint["skipped_steps"] = self.skipped
        checkpoint["random_state"] = torch.get_rng_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        torch.set_rng_state(checkpoint["random_state"])
        self.skipped = checkpoint.get("skipped_steps", 0)
        checkpoint["state_dict"] = {f"net.{name}": tensor for name, tensor in checkpoint["state_dict"].items()}
