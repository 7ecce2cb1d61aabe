"""Runs training in one process, from the first step or a resume to the summary."""

import sys

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from mla_lm.attention.kv_cache import CACHE_DTYPES
from mla_lm.data.store import TokenStore
from mla_lm.data.tokenizer import token_bytes
from mla_lm.errors import Diverged, Interrupted, TrainingFailed, UserError
from mla_lm.hardware import DTYPES, is_out_of_memory
from mla_lm.model.transformer import Transformer
from mla_lm.runs.folder import RunFolder
from mla_lm.runs.load import load_weights
from mla_lm.runs.report import end_report, out_of_memory
from mla_lm.runs.resume_point import ResumePoint
from mla_lm.terminal.plain_text import say
from mla_lm.training.callbacks import CacheMemory, Metrics, Samples, log
from mla_lm.training.checkpointing import Checkpoints
from mla_lm.training.datamodule import TextDataModule
from mla_lm.training.loggers import RunLogger, open_logger
from mla_lm.training.loss_by_position import LossByPosition
from mla_lm.training.module import LanguageModel
from mla_lm.training.progress import progress
from mla_lm.training.resolve import Resolved
from mla_lm.training.signals import StopOnSignal
from mla_lm.training.summary import summary
from mla_lm.training.trainer import build_trainer
from mla_lm.training.watchdog import Watchdog


class Session:
    """Builds the parts of a run, and runs them to the end.

    Args:
        net: the network, with the weights that a new run begins from
        began: `time.monotonic()` when this process began to work on the run

    Raises:
        UserError: `data.prompts` does not fit the tokenizer or the model.
    """

    def __init__(self, resolved: Resolved, run: RunFolder, store: TokenStore, net: Transformer, began: float):
        self.config = config = resolved.config
        self.device, self.run, self.store, self.began = resolved.device, run, store, began
        self.size = resolved.size
        self.module = LanguageModel(
            net, config, torch.from_numpy(token_bytes(store.tokenizer)), data_fingerprint=store.fingerprint
        )
        self.metrics = Metrics(config, self.size.flops_per_token, resolved.peak_flops)
        self.checkpoints = Checkpoints(run, config, self.metrics)
        precision = config.trainer.precision
        mha_bytes = 2 * config.model.d_model * config.model.num_layers * DTYPES[precision].itemsize
        self.cache_memory = CacheMemory(precision, mha_bytes, CACHE_DTYPES.get(config.kv_cache_dtype or ""))
        self.stop_on_signal = StopOnSignal(self.checkpoints, config)
        self.callbacks = self._callbacks()

    def _callbacks(self) -> list[Callback]:
        """In the order in which they are called.

        What a step or validation gave is logged and saved before anything else is done with it; then, after all of it
        has been shown, a signal may end the run.
        """
        config = self.config
        callbacks = [
            Watchdog(config.step_timeout),
            self.metrics,
            self.cache_memory,
            self.checkpoints,
            *progress(config, self.metrics),
            Samples(config, self.store),
            self.stop_on_signal,
        ]
        return [*callbacks, LossByPosition(config, self.run)] if config.loss_by_position else callbacks

    def run_to_end(self, datamodule: TextDataModule, resume_point: ResumePoint | None) -> float:
        """Fit, test, and write the summary, which is also written where training stops early.

        Returns:
            the best validation loss, in nats per token
        """
        logger = open_logger(self.config, self.run, datamodule.start_step, self.began)
        trainer = build_trainer(self.config, self.run, logger, self.callbacks, self.checkpoints.io)
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        tested: dict[str, float] = {}
        stop: BaseException | None = None
        try:
            with self.stop_on_signal:
                self._fit(trainer, datamodule, resume_point)
                tested = self._test(trainer, datamodule)
        except (Interrupted, TrainingFailed) as error:
            stop = error
        except BaseException as error:
            if isinstance(error, UserError) or not (stop := self._told_apart(error)):
                logger.finish({}, error)  # the next job of a multirun would log into it
                raise
        if trainer.is_global_zero:
            self._report(trainer, logger, tested, stop)
        if stop:
            raise stop
        return self.checkpoints.best["val/loss"]

    def _fit(self, trainer: L.Trainer, datamodule: TextDataModule, resume_point: ResumePoint | None) -> None:
        path = None
        if resume_point:
            self.checkpoints.io.loaded, path = resume_point.state, resume_point.path
        trainer.fit(self.module, datamodule, ckpt_path=path, weights_only=True)

    def _test(self, trainer: L.Trainer, datamodule: TextDataModule) -> dict[str, float]:
        """Test figures of the best checkpoint."""
        load_weights(self.module.net, self.run.best)
        trainer.test(self.module, datamodule, verbose=False)
        log(trainer, self.module.evaluated)
        return self.module.evaluated

    def _told_apart(self, error: BaseException) -> BaseException | None:
        """The real cause of `error`, if that is a signal or missing memory; otherwise None."""
        if signum := self.stop_on_signal.received:  # which a compiler, started by us, got as well
            return Interrupted(signum)
        if is_out_of_memory(error):
            failure = TrainingFailed(out_of_memory(self.config, self.device))
            failure.__cause__ = error
            return failure
        return None

    def _report(
        self, trainer: L.Trainer, logger: RunLogger, tested: dict[str, float], stop: BaseException | None
    ) -> None:
        figures = summary(
            self.config,
            self.size,
            self.metrics,
            self.cache_memory.size,
            steps=trainer.global_step,
            best=self.checkpoints.best,
            tested=tested,
            diverged=isinstance(stop, Diverged),
            total_seconds=logger.file.seconds,
            device=self.device,
            data_fingerprint=self.store.fingerprint,
        )
        upload = logger.finish(figures, stop)
        try:
            self.run.write_summary(figures)
        except UserError as error:  # the figures are shown all the same, and made again from the last checkpoint
            say(f"warning: {error}", file=sys.stderr)
        say(end_report(self.run, figures, upload))
