"""What is measured and shown around the training step: metrics, samples, the cache's memory."""

import itertools
import math
import textwrap
import time
from collections import deque
from statistics import median
from typing import Any, NamedTuple, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from mla_lm.config import TrainConfig
from mla_lm.data.store import TokenStore
from mla_lm.data.tokenizer import decode, encode
from mla_lm.errors import UserError
from mla_lm.hardware import DTYPES, inference_autocast, peak_memory_bytes
from mla_lm.inference.generate import generate
from mla_lm.terminal.plain_text import printable
from mla_lm.training.loggers import RunLogger
from mla_lm.training.module import LanguageModel

MOST_RATES = 10_000  # the last ones, so that a checkpoint does not grow with the run


def log(trainer: L.Trainer, metrics: dict[str, float]) -> None:
    """Send metrics to metrics.jsonl and to the chosen service."""
    for logger in trainer.loggers:
        logger.log_metrics(metrics, trainer.global_step)


class Metrics(Callback):
    """Loss, rate and throughput at every logging step; the clock stands still while a run validates or saves.

    Args:
        flops_per_token: of a training step
        peak_flops: of all devices together, per second
    """

    def __init__(self, config: TrainConfig, flops_per_token: float, peak_flops: float):
        self.config, self.flops_per_token, self.peak_flops = config, flops_per_token, peak_flops
        self.rates: deque[float] = deque(maxlen=MOST_RATES)  # tokens per second of each logging interval
        self.train_loss: float | None = None
        self.began: float | None = None  # time at which training would have begun without a pause
        self.seconds_before = 0.0  # trained before this process resumed
        self.mark: tuple[int, float] | None = None  # step and time that the running interval began at
        self.paused_since: float | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"rates": list(self.rates), "train_loss": self.train_loss, "train_seconds": self.train_seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rates = deque(state["rates"], maxlen=MOST_RATES)
        self.train_loss, self.seconds_before = state["train_loss"], state["train_seconds"]

    @property
    def tokens_per_second(self) -> float | None:
        return median(self.rates) if self.rates else None

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation: the share of the measured rate of a large matrix product in the same precision."""
        rate = self.tokens_per_second
        return rate * self.flops_per_token / self.peak_flops if rate else None

    @property
    def train_seconds(self) -> float:
        if self.began is None:
            return self.seconds_before
        return self.seconds_before + (self.paused_since or time.perf_counter()) - self.began

    def pause(self) -> None:
        """Stop the clock of the throughput until the next step begins."""
        self.paused_since = self.paused_since or time.perf_counter()

    def on_train_start(self, trainer: L.Trainer, module: LanguageModel) -> None:
        self.began = time.perf_counter()

    def on_train_batch_start(self, trainer: L.Trainer, module: LanguageModel, *_: Any) -> None:
        if self.paused_since and self.began is not None:
            paused, self.paused_since = time.perf_counter() - self.paused_since, None
            self.began += paused
            self.mark = (self.mark[0], self.mark[1] + paused) if self.mark else None

    def on_train_batch_end(self, trainer: L.Trainer, module: LanguageModel, *_: Any) -> None:
        step = trainer.global_step
        if step % self.config.log_every_n_steps and step != self.config.trainer.max_steps:
            self.mark = self.mark or (step, time.perf_counter())  # the first step warms up: compilation, allocation
            return
        # Tensors are read here and only here, so that the steps between never wait for the device.
        module.stop_if_diverged()
        self.train_loss = float(trainer.strategy.reduce(module.loss))
        metrics = {
            "train/loss": self.train_loss,
            "train/perplexity": math.exp(min(self.train_loss, 700.0)),
            "train/lr": module.optimizer.param_groups[0]["lr"],
            "train/grad_norm": module.grad_norm.item(),
            "train/tokens": step * self.config.step_tokens,
            "memory/peak_mib": peak_memory_bytes(module.device.type) / 2**20,
        }
        if self.config.on_nonfinite == "skip":
            metrics["train/skipped_steps"] = module.skipped
        now = time.perf_counter()
        if self.mark:
            rate = (step - self.mark[0]) * self.config.step_tokens / (now - self.mark[1])
            self.rates.append(rate)
            metrics["train/tokens_per_second"] = rate
            metrics["train/mfu"] = rate * self.flops_per_token / self.peak_flops
        log(trainer, metrics)
        self.mark = (step, now)

    def on_validation_start(self, trainer: L.Trainer, module: LanguageModel) -> None:
        self.pause()

    def on_validation_end(self, trainer: L.Trainer, module: LanguageModel) -> None:
        module.stop_if_diverged()

    def on_train_end(self, trainer: L.Trainer, module: LanguageModel) -> None:
        self.pause()


class Samples(Callback):
    """Continuations of `data.prompts` at each validation, through the cache, shown and logged.

    Raises:
        UserError: a prompt that the tokenizer does not know, or that fills the model's seq_len.
    """

    def __init__(self, config: TrainConfig, store: TokenStore):
        self.config, self.store = config, store
        self.prompts = {p: [store.end_of_text_id, *encode(store.tokenizer, p)] for p in config.data.prompts or [""]}
        for prompt, ids in self.prompts.items():
            if len(ids) >= config.model.seq_len:
                raise UserError(
                    f"data.prompts: {prompt!r} has {len(ids)} tokens, model.seq_len={config.model.seq_len}: shorten it"
                )

    def on_validation_end(self, trainer: L.Trainer, module: LanguageModel) -> None:
        if not trainer.is_global_zero or not self.config.samples.max_tokens:
            return
        samples = [(prompt, self._continue(module, ids)) for prompt, ids in self.prompts.items()]
        print(f"samples at step {trainer.global_step}:")
        for prompt, text in samples:  # an empty line after each, as texts may have any number of lines
            print(textwrap.indent(printable((prompt + text).expandtabs(4)), "  | ", lambda line: True) + "\n")
        for logger in cast(list[RunLogger], trainer.loggers):
            logger.log_samples(samples, trainer.global_step)

    def _continue(self, module: LanguageModel, ids: list[int]) -> str:
        """The continuation up to the end of the document; the same for the same weights."""
        samples, precision = self.config.samples, self.config.trainer.precision
        generator = torch.Generator(module.device).manual_seed(self.config.seed)
        prompt = torch.tensor([ids], device=module.device)
        tokens = generate(
            module.net, prompt, samples.max_tokens, samples.temperature, generator=generator, dtype=DTYPES[precision]
        )
        with inference_autocast(module.device.type, precision):
            new = itertools.takewhile(lambda i: i != self.store.end_of_text_id, (int(token) for token in tokens))
            return decode(self.store.tokenizer, new)


class CacheSize(NamedTuple):
    """The measured size of a filled cache."""

    bytes_at_seq_len: int
    bytes_per_token: float
    vs_mha: float  # the share of an MHA's of equal num_layers, num_heads and d_model


class CacheMemory(Callback):
    """The KV cache's bytes, read off a real cache filled to `seq_len` in the run's inference precision.

    Args:
        dtype: of the cache, where it is not that of the precision
        mha_bytes_per_token: the cache of an MHA of equal num_layers, num_heads and d_model
    """

    def __init__(self, precision: str, mha_bytes_per_token: int, dtype: torch.dtype | None = None):
        self.precision, self.mha_bytes_per_token = precision, mha_bytes_per_token
        self.dtype = dtype or DTYPES[precision]
        self.size: CacheSize | None = None  # measured with the first validation

    def on_validation_start(self, trainer: L.Trainer, module: LanguageModel) -> None:
        self.size = self.size or self._measure(module)

    def on_validation_end(self, trainer: L.Trainer, module: LanguageModel) -> None:
        assert self.size  # measured at its start
        metrics = {
            "kv_cache/bytes_per_token": self.size.bytes_per_token,
            "kv_cache/mib_at_seq_len": self.size.bytes_at_seq_len / 2**20,
            "kv_cache/vs_mha": self.size.vs_mha,
        }
        log(trainer, metrics)

    def _measure(self, module: LanguageModel) -> CacheSize:
        tokens = torch.zeros(1, module.net.config.seq_len, dtype=torch.long, device=module.device)
        with torch.no_grad(), inference_autocast(module.device.type, self.precision):
            cache = module.net.new_cache(1, dtype=self.dtype)
            module.net.forward(tokens, cache=cache)
        per_token = cache.nbytes / cache.length
        return CacheSize(cache.nbytes, per_token, per_token / self.mha_bytes_per_token)

    def state_dict(self) -> dict[str, Any]:
        return {"dtype": str(self.dtype), **(self.size._asdict() if self.size else {})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        measured: dict[str, Any] = {name: state.get(name) for name in CacheSize._fields}
        if state.get("dtype") == str(self.dtype) and None not in measured.values():
            self.size = CacheSize(**measured)  # else the run goes on in another precision, or had not measured it yet
