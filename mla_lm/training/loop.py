"""One training run from its configuration to its summary."""

import logging
import shlex
import sys
import time
import warnings
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.profilers import AdvancedProfiler, SimpleProfiler
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only

from mla_lm.attention.kv_cache import CACHE_DTYPES
from mla_lm.config import TrainConfig, config_hash
from mla_lm.data.open_store import open_store
from mla_lm.data.store import TokenStore
from mla_lm.data.tokenizer import load_tokenizer, token_bytes, vocabulary_size
from mla_lm.errors import Interrupted, TrainingFailed, UserError
from mla_lm.hardware import (
    DTYPES,
    choose_accelerator,
    choose_compile,
    choose_precision,
    choose_products,
    is_out_of_memory,
    matmul_flops_per_second,
    peak_memory_bytes,
    take_own_gpu,
)
from mla_lm.model.size import model_size
from mla_lm.model.transformer import Transformer
from mla_lm.runs import trust
from mla_lm.runs.checkpoint import load_checkpoint
from mla_lm.runs.config_file import to_yaml
from mla_lm.runs.folder import RunFolder, find_best, find_run
from mla_lm.runs.load import check_describes, load_weights
from mla_lm.runs.report import data_lines, end_report, finite_or_none, git_commit, out_of_memory, size_table
from mla_lm.runs.resume_point import Start, prepare_checkpoints
from mla_lm.terminal.plain_text import say
from mla_lm.terminal.unbreakable import unbreakable_output
from mla_lm.training.callbacks import CacheMemory, Metrics, Samples, log
from mla_lm.training.checkpointing import Checkpoints
from mla_lm.training.datamodule import TextDataModule
from mla_lm.training.loggers import build_loggers, finish_wandb
from mla_lm.training.loss_by_position import LossByPosition
from mla_lm.training.module import LanguageModel
from mla_lm.training.progress import progress
from mla_lm.training.signals import StopOnSignal
from mla_lm.training.watchdog import Watchdog

say_once = rank_zero_only(say)
PROFILERS = {"simple": SimpleProfiler, "advanced": AdvancedProfiler}  # they write fit-profile.txt into the run folder


def train(config: TrainConfig, run: RunFolder, start: Start | None = None, overrides: list[str] | None = None) -> float:
    """Train, test the best checkpoint, and fill the run folder.

    Args:
        config: checked; what it leaves open (vocabulary, precision, compile) is filled in here
        start: to go on from, in `run`
        overrides: of one of several jobs, which prints them instead of its whole configuration

    Returns:
        the best validation loss, in nats per token

    Raises:
        UserError: data, hardware or checkpoint are not what the configuration needs; nothing has been written over.
        TrainingFailed: the loss is no number any more, or memory does not suffice.
        Interrupted: by a signal; the run is saved.
    """
    began = time.monotonic()
    device, why = choose_accelerator(config.trainer.accelerator)
    choices, config.trainer.accelerator = [f"device      {device} ({why})"], {"cuda": "gpu"}.get(device, device)
    if device == "cuda":
        take_own_gpu()
    config.trainer.precision, why = choose_precision(config.trainer.precision, device)
    choices.append(f"precision   {config.trainer.precision} ({why}{choose_products(device, config.trainer.precision)})")

    store = _open_data(config, run, start)
    _take_from_tokenizer(config, store)
    datamodule = TextDataModule(config, store)
    peak_flops = matmul_flops_per_second(device, config.trainer.precision) * config.world_size
    seconds = _training_flops(config) / peak_flops
    config.compile, why = choose_compile(config.compile, device, seconds, config.data.document_mask)
    choices.append(f"compile     {config.compile} ({why})")

    net = _build_net(config, start)
    if start:
        datamodule.start_step = _start_step(config, run, start)
        choices.append(f"resumed     after step {datamodule.start_step}")
    elif config.init_from:
        choices.append(f"begun from  {config.init_from}: its weights and tokenizer, on the data above")
    training = _Training(config, run, store, net, device, peak_flops, began)
    table = size_table(config, DTYPES[config.trainer.precision])

    if rank_zero_only.rank == 0:
        _prepare_folder(config, run, store, start)
    with unbreakable_output():
        say_once(to_yaml(config) if overrides is None else f"\njob         {run.path.name}: {shlex.join(overrides)}\n")
        say_once(table, "", *data_lines(store), *choices, "")
        return training.run_to_end(datamodule, start)


def _build_net(config: TrainConfig, start: Start | None) -> Transformer:
    """The network, with the weights of another run where it begins from one; UserError where they are another model's.

    Lightning loads those of `start`.
    """
    weights = {}
    if start:
        check_describes(config.model, start.state["state_dict"], start.path)
    elif config.init_from:
        checkpoint = find_best(config.init_from)[1]
        weights = load_checkpoint(checkpoint)["state_dict"]
        check_describes(config.model, weights, checkpoint)
    torch.manual_seed(config.seed)
    net = Transformer(config.model)
    if weights:
        net.load_state_dict(weights)
    return net


def _take_from_tokenizer(config: TrainConfig, store: TokenStore) -> None:
    """Fill in what the model owes to the tokenizer; UserError where the configuration says otherwise."""
    there = {
        "vocab_size": vocabulary_size(store.tokenizer),
        "document_token": store.end_of_text_id if config.data.document_mask else None,
    }
    for key, value in there.items():
        if (given := getattr(config.model, key)) not in (None, value):
            raise UserError(
                f"model.{key}={given}, but with this tokenizer and data.document_mask it is {value}: leave it out"
            )
        setattr(config.model, key, value)


def _prepare_folder(config: TrainConfig, run: RunFolder, store: TokenStore, start: Start | None) -> None:
    """Write what is known of the run before it trains."""
    run.write_config(config)
    trust.sign(run, config)
    run.write_tokenizer(store.tokenizer)
    for leftover in run.last.parent.glob(".*.ckpt.*"):  # of a process that was killed while it saved
        leftover.unlink()
    if start:
        prepare_checkpoints(run, start, config.checkpoint.keep_last)
        run.reopen()


def _open_data(config: TrainConfig, run: RunFolder, start: Start | None) -> TokenStore:
    tokenizer = None
    if config.init_from:  # the tokenizer came with the weights; since then it lies in the run itself
        tokenizer = load_tokenizer((run if start else find_run(config.init_from)[0]).tokenizer_file)
    store = open_store(config.data, tokenizer)
    if start and start.state["data_fingerprint"] != store.fingerprint:
        raise UserError(
            f"the data have changed since {run.path} began ({store.description}): "
            "restore them, or begin a new run with init_from"
        )
    return store


def _training_flops(config: TrainConfig) -> float:
    return model_size(config.model).flops_per_token * config.tokens_per_step * config.trainer.max_steps


def _start_step(config: TrainConfig, run: RunFolder, start: Start) -> int:
    """Optimizer steps that the checkpoint has behind it; UserError where nothing is left to do."""
    done, wanted = start.step, config.trainer.max_steps
    if done > wanted or (done == wanted and run.is_finished):
        raise UserError(
            f"{run.path} already has {done} steps, trainer.max_steps={wanted}: give a larger one to train further"
        )
    return done


class _Training:
    """The parts of a run that is about to begin."""

    def __init__(
        self,
        config: TrainConfig,
        run: RunFolder,
        store: TokenStore,
        net: Transformer,
        device: str,
        peak_flops: float,
        began: float,
    ):
        self.config, self.run, self.store, self.device = config, run, store, device
        self.size = model_size(config.model)
        precision = config.trainer.precision
        self.module = LanguageModel(
            net,
            config,
            torch.from_numpy(token_bytes(store.tokenizer)),
            data_fingerprint=store.fingerprint,
        )
        mha_bytes = 2 * config.model.d_model * config.model.num_layers * DTYPES[precision].itemsize
        self.metrics = Metrics(config, self.size.flops_per_token, peak_flops)
        self.checkpoints = Checkpoints(run, config, self.metrics)
        self.cache_memory = CacheMemory(precision, mha_bytes, CACHE_DTYPES.get(config.kv_cache_dtype))
        self.stop_on_signal = StopOnSignal(self.checkpoints, config)
        # What a step or validation gave is logged and saved before anything else is done with it; then, after all of
        # it has been shown, a signal may end the run.
        self.callbacks = [
            Watchdog(config.step_timeout),
            self.metrics,
            self.cache_memory,
            self.checkpoints,
            *progress(config, self.metrics),
            Samples(config, store),
            self.stop_on_signal,
        ]
        if config.loss_by_position:
            self.callbacks.append(LossByPosition(config, run))
        self.began = began

    def run_to_end(self, datamodule: TextDataModule, start: Start | None) -> float:
        """Fit, test, and write the summary; the summary also where training stops early."""
        loggers = build_loggers(self.config, self.run, datamodule.start_step, self.began)
        trainer = self._trainer(loggers)
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if start:
            self.checkpoints.io.loaded = start.state
        tested: dict[str, float] = {}
        stop: BaseException | None = None
        try:
            with self.stop_on_signal:
                trainer.fit(self.module, datamodule, ckpt_path=start.path if start else None, weights_only=True)
                tested = self._test(trainer, datamodule)
        except (Interrupted, TrainingFailed) as error:
            stop = error
        except BaseException as error:
            finish_wandb(loggers, error=error)  # the next job of a multirun would log into it
            if isinstance(error, UserError) or not (stop := self._told_apart(error)):
                raise
        if trainer.is_global_zero:
            self._report(trainer, loggers, tested, stop)
        if stop:
            raise stop
        return self.checkpoints.best["val/loss"]

    def _told_apart(self, error: BaseException) -> BaseException | None:
        """What ended training where `error` is only what it looks like."""
        if signum := self.stop_on_signal.received:  # which a compiler, started by us, got as well
            return Interrupted(signum)
        if is_out_of_memory(error):
            failure = TrainingFailed(out_of_memory(self.config, self.device))
            failure.__cause__ = error
            return failure
        return None

    def _trainer(self, loggers: list) -> L.Trainer:
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")  # tokens are memory-mapped
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # within lightning
        warnings.filterwarnings("ignore", message=".*dataloader is not resumable.*")  # its order is one of the step
        config = self.config.trainer
        # Lightning's own requeue saves under a name that no resume looks for: scripts/slurm.sbatch does it.
        slurm = [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []
        return L.Trainer(
            default_root_dir=self.run.path,
            accelerator=config.accelerator,
            devices=config.devices,
            num_nodes=config.num_nodes,
            # Buffers are the same everywhere from the start; gradients need no copy beside what is sent of them.
            strategy=DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)
            if self.config.world_size > 1
            else "auto",
            precision=config.precision,
            max_steps=config.max_steps,
            val_check_interval=self.config.val_every_n_steps,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            logger=loggers,
            callbacks=self.callbacks,
            plugins=[self.checkpoints.io, *slurm],
            profiler=PROFILERS[config.profiler](self.run.path, "profile") if config.profiler else None,
            log_every_n_steps=1,  # the callbacks keep to the interval
            enable_progress_bar=False,  # ProgressBar is ours
            enable_checkpointing=False,  # Checkpoints does it
            enable_model_summary=False,
            use_distributed_sampler=False,
        )

    def _test(self, trainer: L.Trainer, datamodule: TextDataModule) -> dict[str, float]:
        """Test figures of the best checkpoint."""
        load_weights(self.module.net, self.run.best)
        trainer.test(self.module, datamodule, verbose=False)
        log(trainer, self.module.evaluated)
        return self.module.evaluated

    def _report(self, trainer: L.Trainer, loggers: list, tested: dict[str, float], stop: BaseException | None) -> None:
        summary = self._summary(trainer, tested, loggers[0].seconds)
        upload = finish_wandb(loggers, summary, stop)
        try:
            self.run.write_summary(summary)
        except UserError as error:  # the figures are shown all the same, and made again from the last checkpoint
            say(f"warning: {error}", file=sys.stderr)
        say(end_report(self.run, summary, upload))

    def _summary(self, trainer: L.Trainer, tested: dict[str, float], total_seconds: float) -> dict[str, Any]:
        """summary.json; what was not measured is None."""
        config, best, metrics = self.config, self.checkpoints.best, self.metrics
        cache = self.cache_memory
        return {
            "finished": bool(tested),
            "attention": self.size.attention,
            "num_layers": config.model.num_layers,
            "d_model": config.model.d_model,
            "num_heads": config.model.num_heads,
            "parameters": self.size.parameters,
            "non_embedding_parameters": self.size.non_embedding_parameters,
            "seq_len": config.model.seq_len,
            "seed": config.seed,
            "steps": trainer.global_step,
            "tokens_seen": trainer.global_step * config.tokens_per_step,
            "train_loss": finite_or_none(metrics.train_loss),
            **{f"{stage}_{name}": values.get(f"{stage}/{name}")
               for stage, values in (("val", best), ("test", tested))
               for name in ("loss", "perplexity", "bits_per_byte")},
            "kv_cache_elements_per_token_per_layer": self.size.cache_elements_per_token_per_layer,
            "kv_cache_bytes_per_token": cache.bytes_per_token,
            "kv_cache_bytes_at_seq_len": cache.bytes_at_seq_len,
            "kv_cache_vs_mha": cache.vs_mha,
            "tokens_per_second": metrics.tokens_per_second,
            "model_flops_utilization": metrics.mfu,
            "peak_memory_bytes": peak_memory_bytes(self.device),
            "train_seconds": metrics.train_seconds,
            "total_seconds": total_seconds,
            "precision": config.trainer.precision,
            "accelerator": config.trainer.accelerator,
            "torch_version": torch.__version__,
            "git_commit": git_commit(),
            "data_fingerprint": self.store.fingerprint,
            "config_hash": config_hash(config),
        }  # fmt: skip
