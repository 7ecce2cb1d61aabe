"""What is measured and shown around the training step: metrics, samples, the cache's memory."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from tokenizers import Tokenizer

from mla_lm.config import TrainConfig
from mla_lm.data.tokenizer import decode, encode, end_of_text_id
from mla_lm.errors import TrainingFailed
from mla_lm.generate import generate
from mla_lm.hardware import DTYPES, inference_autocast, peak_memory_bytes
from mla_lm.lightning_module import LanguageModel


def log(trainer: L.Trainer, metrics: dict[str, float]) -> None:
    """Send metrics to metrics.jsonl and to the chosen logger."""
    for logger in trainer.loggers:
        logger.log_metrics(metrics, trainer.global_step)


class Metrics(Callback):
    """Loss, rate and throughput at every logging step; the clock stands still while others validate or save.

    Args:
        flops_per_token: of a training step
        peak_flops: of all devices together, per second
    """

    def __init__(self, config: TrainConfig, flops_per_token: float, peak_flops: float):
        self.config, self.flops_per_token, self.peak_flops = config, flops_per_token, peak_flops
        self.rates: list[float] = []  # tokens per second of each logging interval
        self.train_loss: float | None = None
        self.train_seconds = 0.0
        self.mark: tuple[int, float] | None = None  # step and time that the running interval began at
        self.paused_since = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"rates": self.rates, "train_loss": self.train_loss, "train_seconds": self.train_seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rates, self.train_loss, self.train_seconds = state["rates"], state["train_loss"], state["train_seconds"]

    def on_train_start(self, trainer: L.Trainer, module: LanguageModel) -> None:
        self.began = time.perf_counter() - self.train_seconds

    @property
    def tokens_per_second(self) -> float | None:
        return median(self.rates) if self.rates else None

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation: of the peak of a matrix product, measured on this machine in this precision."""
        rate = self.tokens_per_second
        return rate * self.flops_per_token / self.peak_flops if rate else None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out of the throughput what is done inside."""
        start = time.perf_counter()
        yield
        self._skip(time.perf_counter() - start)

    def _skip(self, seconds: float) -> None:
        if self.mark:
            self.mark = (self.mark[0], self.mark[1] + seconds)
        self.began += seconds

    def on_train_batch_end(self, trainer: L.Trainer, module: LanguageModel, *_: Any) -> None:
        step = trainer.global_step
        if step % self.config.log_every_n_steps and step != self.config.trainer.max_steps:
            if self.mark is None:  # the first step warms up: compilation, allocation
                self.mark = (step, time.perf_counter())
            return
        # Tensors are read here and only here, so that the steps between never wait for the device.
        loss, grad_norm = trainer.strategy.reduce(module.loss).item(), module.grad_norm.item()
        stop_if_diverged(step, loss, grad_norm)
        now = time.perf_counter()
        self.train_loss = loss
        self.train_seconds = now - self.began
        last_lr = module.optimizers().param_groups[0]["lr"]
        metrics = {
            "train/loss": loss,
            "train/perplexity": math.exp(min(loss, 700.0)),
            "train/lr": last_lr,
            "train/grad_norm": grad_norm,
            "train/tokens": step * self.config.tokens_per_step,
            "memory/peak_mib": peak_memory_bytes(module.device.type) / 2**20,
        }
        if self.mark and step > self.mark[0]:
            rate = (step - self.mark[0]) * self.config.tokens_per_step / (now - self.mark[1])
            self.rates.append(rate)
            metrics["train/tokens_per_second"] = rate
            metrics["train/mfu"] = rate * self.flops_per_token / self.peak_flops
        log(trainer, metrics)
        self.mark = (step, time.perf_counter())

    def on_validation_start(self, trainer: L.Trainer, module: LanguageModel) -> None:
        self.paused_since = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, module: LanguageModel) -> None:
        self._skip(time.perf_counter() - self.paused_since)


def stop_if_diverged(step: int, loss: float, grad_norm: float) -> None:
    """Raises TrainingFailed where the loss or the gradients are no numbers: every weight is lost from here on."""
    if not (math.isfinite(loss) and (math.isfinite(grad_norm))):
        raise TrainingFailed(
            f"the loss is {loss} and the gradient norm {grad_norm} at step {step}: training diverged.\n"
            "  Try a smaller optimizer.lr. The last checkpoint is from before that."
        )


class Samples(Callback):
    """Continuations of `data.prompts` at each validation, through the cache, shown and logged."""

    def __init__(self, config: TrainConfig, tokenizer: Tokenizer, precision: str):
        self.config, self.tokenizer, self.precision = config, tokenizer, precision

    def on_validation_end(self, trainer: L.Trainer, module: LanguageModel) -> None:
        if not trainer.is_global_zero or not self.config.samples.max_tokens:
            return
        rows = [[prompt, self._continue(module, prompt)] for prompt in self.config.data.prompts or [""]]
        print(f"samples at step {trainer.global_step}:")
        for prompt, text in rows:
            print("  | " + (prompt + text).replace("\n", "\n  | "))
        for logger in trainer.loggers:
            if type(logger).__name__ == "WandbLogger":
                logger.log_text("samples", columns=["prompt", "continuation"], data=rows, step=trainer.global_step)
            elif type(logger).__name__ == "TensorBoardLogger":
                text = "\n\n".join("    " + (a + b).replace("\n", "\n    ") for a, b in rows)
                logger.experiment.add_text("samples", text, trainer.global_step)

    def _continue(self, module: LanguageModel, prompt: str) -> str:
        """The continuation up to the end of the document; the same for the same weights."""
        end = end_of_text_id(self.tokenizer, self.config.data.tokenizer.end_of_text)
        ids = torch.tensor([[end, *encode(self.tokenizer, prompt)]], device=module.device)
        generator = torch.Generator(module.device).manual_seed(self.config.seed)
        new = []
        with inference_autocast(module.device.type, self.precision):
            for token in generate(
                module.net,
                ids,
                self.config.samples.max_tokens,
                self.config.samples.temperature,
                generator=generator,
                dtype=DTYPES[self.precision],
            ):
                if token.item() == end:
                    break
                new.append(token.item())
        return decode(self.tokenizer, new)


class CacheMemory(Callback):
    """The KV cache's bytes, read off a real cache filled to `seq_len` in the run's inference precision.

    Args:
        mha_bytes_per_token: the cache of an MHA of equal num_layers, num_heads and d_model
    """

    def __init__(self, precision: str, mha_bytes_per_token: int):
        self.precision, self.mha_bytes_per_token = precision, mha_bytes_per_token
        self.bytes_at_seq_len: int | None = None  # measured with the first validation, as the next two
        self.bytes_per_token: float | None = None
        self.vs_mha: float | None = None

    def on_validation_end(self, trainer: L.Trainer, module: LanguageModel) -> None:
        if self.bytes_at_seq_len is None:
            self._measure(module)
        metrics = {
            "kv_cache/bytes_per_token": self.bytes_per_token,
            "kv_cache/mib_at_seq_len": self.bytes_at_seq_len / 2**20,
            "kv_cache/vs_mha": self.vs_mha,
        }
        log(trainer, metrics)

    def _measure(self, module: LanguageModel) -> None:
        tokens = torch.zeros(1, module.net.config.seq_len, dtype=torch.long, device=module.device)
        with torch.no_grad(), inference_autocast(module.device.type, self.precision):
            cache = module.net.new_cache(1, dtype=DTYPES[self.precision])
            module.net.forward(tokens, cache=cache)
        self.bytes_at_seq_len = cache.nbytes
        self.bytes_per_token = cache.nbytes / cache.length
        self.vs_mha = self.bytes_per_token / self.mha_bytes_per_token

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("bytes_at_seq_len", "bytes_per_token", "vs_mha")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
