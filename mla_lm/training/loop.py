"""One training run from its configuration to its summary."""

import shlex
import time

import torch
from lightning.pytorch.utilities import rank_zero_only

from mla_lm.config import SweepJob, TrainConfig
from mla_lm.data.open_store import open_store
from mla_lm.data.store import TokenStore
from mla_lm.data.tokenizer import load_tokenizer
from mla_lm.errors import UserError
from mla_lm.hardware import DTYPES
from mla_lm.model.induction import begin_with_induction
from mla_lm.model.transformer import Transformer
from mla_lm.runs import trust
from mla_lm.runs.checkpoint import load_checkpoint
from mla_lm.runs.config_file import to_yaml
from mla_lm.runs.folder import RunFolder, find_best, find_run
from mla_lm.runs.load import check_describes
from mla_lm.runs.report import data_lines, size_table
from mla_lm.runs.resume_point import ResumePoint, prepare_checkpoints
from mla_lm.terminal.plain_text import say
from mla_lm.terminal.unbreakable import unbreakable_output
from mla_lm.training.datamodule import TextDataModule
from mla_lm.training.resolve import Resolved, choose_machine, resolve
from mla_lm.training.session import Session

say_once = rank_zero_only(say)


def train(
    config: TrainConfig,
    run: RunFolder,
    resume_point: ResumePoint | None = None,
    job: SweepJob | None = None,
) -> float:
    """Train, test the best checkpoint, and fill the run folder.

    Args:
        config: checked; `resolve` fills in what it leaves open
        resume_point: to go on from, in `run`
        job: of a sweep, where the run is one; it prints its overrides instead of its whole configuration

    Returns:
        the best validation loss, in nats per token

    Raises:
        UserError: data, hardware or checkpoint are not what the configuration needs; nothing has been written over.
        TrainingFailed: the loss is no number any more, or memory does not suffice.
        Interrupted: by a signal; the run is saved.
    """
    began = time.monotonic()
    machine = choose_machine(config.trainer)
    store = _open_data(config, run, resume_point)
    resolved = resolve(config, machine, store, job)
    config = resolved.config
    datamodule = TextDataModule(config, store)
    net = _build_net(config, resume_point)
    in_fp8 = _in_fp8(net, resolved)
    datamodule.start_step = _steps_done(config, run, resume_point)
    session = Session(resolved, run, store, net, began)
    table = size_table(config, DTYPES[config.trainer.precision])

    if rank_zero_only.rank == 0:
        _prepare_folder(config, run, store, resume_point)
    with unbreakable_output():
        say_once(to_yaml(config) if job is None else f"\njob         {run.path.name}: {shlex.join(job.overrides)}\n")
        origin = _where_from(config, resume_point)
        say_once(table, "", *data_lines(store), *resolved.reasons, *in_fp8, *origin, f"folder      {run.path}", "")
        return session.run_to_end(datamodule, resume_point)


def _open_data(config: TrainConfig, run: RunFolder, resume_point: ResumePoint | None) -> TokenStore:
    tokenizer = None
    if config.init_from:  # the tokenizer came with the weights; since then it lies in the run itself
        source = run if resume_point else find_run(config.init_from)[0]
        tokenizer = load_tokenizer(source.tokenizer_file)
    store = open_store(config.data, tokenizer)
    if resume_point and resume_point.state["data_fingerprint"] != store.fingerprint:
        raise UserError(
            f"the data have changed since {run.path} began ({store.description}): "
            "restore them, or begin a new run with init_from"
        )
    return store


def _build_net(config: TrainConfig, resume_point: ResumePoint | None) -> Transformer:
    """Build the network with its first weights; with `init_from`, those of the other run.

    UserError if they belong to another model.

    Lightning loads those of `resume_point`.
    """
    weights = {}
    if resume_point:
        check_describes(config.model, resume_point.state["state_dict"], resume_point.path)
    elif config.init_from:
        checkpoint = find_best(config.init_from)[1]
        weights = load_checkpoint(checkpoint)["state_dict"]
        check_describes(config.model, weights, checkpoint)
    torch.manual_seed(config.seed)
    net = Transformer(config.model)
    if weights:
        net.load_state_dict(weights)
    elif config.model.induction_init and not resume_point:
        begin_with_induction(net)
    return net


def _in_fp8(net: Transformer, resolved: Resolved) -> list[str]:
    """Train in fp8 if the configuration says so; return a line on that."""
    if not resolved.config.trainer.fp8:
        return []
    left_out = net.train_in_fp8()
    which = f"but {', '.join(left_out)}, whose sizes are no multiples of 16" if left_out else "of them"
    slow = "; a CPU only imitates it, which is slow" if resolved.device == "cpu" else ""
    return [f"fp8         products of the blocks' matrices in training, all {which}{slow}"]


def _steps_done(config: TrainConfig, run: RunFolder, resume_point: ResumePoint | None) -> int:
    """Optimizer steps that the run has behind it; UserError where nothing is left to do."""
    if resume_point is None:
        return 0
    done, wanted = resume_point.step, config.trainer.max_steps
    if done > wanted or (done == wanted and run.is_finished):
        raise UserError(
            f"{run.path} already has {done} steps, trainer.max_steps={wanted}: give a larger one to train further"
        )
    return done


def _where_from(config: TrainConfig, resume_point: ResumePoint | None) -> list[str]:
    """A line that says what the run continues from, or whose weights it starts with."""
    if resume_point:
        return [f"resumed     after step {resume_point.step}"]
    if config.init_from:
        return [f"begun from  {config.init_from}: its weights and tokenizer, on the data above"]
    return []


def _prepare_folder(config: TrainConfig, run: RunFolder, store: TokenStore, resume_point: ResumePoint | None) -> None:
    """Write what is known of the run before it trains."""
    run.write_config(config)
    trust.sign(run, config)
    run.write_tokenizer(store.tokenizer)
    for leftover in run.last.parent.glob(".*.ckpt.*"):  # of a process that was killed while it saved
        leftover.unlink()
    if resume_point:
        prepare_checkpoints(run, resume_point, config.checkpoint.keep_last)
        run.reopen()
