"""Lightning's trainer, set up so that everything a run promises is done by our own callbacks."""

import logging
import warnings

import lightning as L
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.profilers import AdvancedProfiler, SimpleProfiler
from lightning.pytorch.strategies import DDPStrategy

from mla_lm.config import TrainConfig
from mla_lm.runs.folder import RunFolder

PROFILERS = {"simple": SimpleProfiler, "advanced": AdvancedProfiler}  # they write fit-profile.txt into the run folder


def build_trainer(
    config: TrainConfig, run: RunFolder, logger: Logger, callbacks: list[Callback], checkpoint_io: CheckpointIO
) -> L.Trainer:
    """The trainer of a resolved configuration."""
    _quieten()
    trainer = config.trainer
    # Lightning's own requeue saves under a name that no resume looks for: scripts/slurm.sbatch does it.
    slurm = [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []
    return L.Trainer(
        default_root_dir=run.path,
        accelerator=trainer.accelerator,
        devices=trainer.devices,
        num_nodes=trainer.num_nodes,
        strategy=_ddp() if config.world_size > 1 else "auto",
        precision=trainer.precision,  # pyright: ignore[reportArgumentType] - TrainConfig.check knows the names
        max_steps=trainer.max_steps,
        val_check_interval=config.val_every_n_steps,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=logger,
        callbacks=callbacks,
        plugins=[checkpoint_io, *slurm],
        profiler=PROFILERS[trainer.profiler](run.path, "profile") if trainer.profiler else None,
        log_every_n_steps=1,  # the callbacks keep to the interval
        enable_progress_bar=False,  # ProgressBar is ours
        enable_checkpointing=False,  # Checkpoints does it
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def _ddp() -> DDPStrategy:
    # Buffers are the same everywhere from the start; gradients need no copy beside what is sent of them.
    return DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)


def _quieten() -> None:
    """Silence Lightning's warnings about choices that are intended."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")  # tokens are memory-mapped
    warnings.filterwarnings("ignore", message=".*overridden `on_before_batch_transfer`.*")  # as is meant
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # within lightning
    warnings.filterwarnings("ignore", message=".*dataloader is not resumable.*")  # its order is one of the step
