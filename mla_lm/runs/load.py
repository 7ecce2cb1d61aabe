"""Loads a trained model from its run, after checking that its configuration describes its weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer

from mla_lm.attention import KINDS
from mla_lm.config import TrainConfig
from mla_lm.data.tokenizer import load_tokenizer, vocabulary_size
from mla_lm.errors import UserError
from mla_lm.hardware import DTYPES, memory_bytes
from mla_lm.model.config import TransformerConfig
from mla_lm.model.transformer import Transformer
from mla_lm.runs.checkpoint import load_checkpoint
from mla_lm.runs.folder import RunFolder, find_best


class LoadedRun(NamedTuple):
    """The content of a run folder."""

    model: Transformer
    tokenizer: Tokenizer
    config: TrainConfig


def load_run(path: str | Path, device: torch.device | str = "cpu") -> LoadedRun:
    """Load the model of a run in evaluation mode, its tokenizer and its configuration.

    Args:
        path: a run folder, of which the best checkpoint is loaded, or the last if there is no best; or a checkpoint in
            a run folder

    Raises:
        UserError: there is no run at `path`, or it is damaged.
    """
    run, checkpoint = find_best(path)
    config = run.config()
    weights = _load_checkpoint_of(run, checkpoint)["state_dict"]
    check_describes(config.model, weights, checkpoint)
    if config.trainer.precision not in DTYPES:
        raise UserError(f"{run.config_file} is no run's: trainer.precision={config.trainer.precision}")
    tokenizer = load_tokenizer(run.tokenizer_file)
    if (entries := vocabulary_size(tokenizer)) != config.model.vocab_size:
        raise UserError(
            f"{run.tokenizer_file} is another model's: it has {entries} entries, this one {config.model.vocab_size}"
        )
    model = Transformer(config.model)
    model.load_state_dict(weights)
    return LoadedRun(model.to(device).eval(), tokenizer, config)


def _load_checkpoint_of(run: RunFolder, checkpoint: Path) -> dict[str, Any]:
    """Like `load_checkpoint`, but if the best checkpoint is damaged, the error message names the last one."""
    try:
        return load_checkpoint(checkpoint)
    except UserError as error:
        lasts = run.lasts() if checkpoint == run.best else []
        if not lasts:
            raise
        raise UserError(f"{error}\n  the last checkpoint may be whole: give {lasts[0]} in place of the run") from error


def load_weights(model: Transformer, checkpoint: Path) -> None:
    """Load the weights of a checkpoint into a model.

    Raises:
        UserError: the checkpoint is missing, damaged, or of another model.
    """
    weights = load_checkpoint(checkpoint)["state_dict"]
    check_describes(model.config, weights, checkpoint)
    model.load_state_dict(weights)


def check_describes(config: TransformerConfig, weights: dict[str, torch.Tensor], checkpoint: Path) -> None:
    """Check that a configuration describes the weights, before a model is made that takes as much memory as it says.

    Raises:
        UserError: it describes another model, or RoPE's tables, which are not among the weights, are too large.
    """
    items = weights.items() if isinstance(weights, dict) else [(None, None)]
    if not all(isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in items):
        raise UserError(f"{checkpoint} is no checkpoint of this project: its state_dict is not one of tensors")
    config.layer_config()  # checks that the kind is known
    period = KINDS[config.attention.kind].period
    try:
        with torch.device("meta"):
            first = Transformer(replace(config, num_layers=period)).state_dict()
    except (RuntimeError, TypeError, OverflowError) as error:  # torch raises these for sizes beyond 64 bits
        raise UserError(f"{checkpoint} holds another model: the configured one has impossible sizes") from error
    layers = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    if layers != config.num_layers:  # each layer takes time to list, even on the meta device
        raise UserError(
            f"{checkpoint} holds another model: {layers} layers are there, where model.num_layers={config.num_layers}"
        )
    ours = {name: tensor for name, tensor in first.items() if not name.startswith("blocks.")}
    for i in range(layers):
        like = f"blocks.{i % period}."
        ours |= {name.replace(like, f"blocks.{i}.", 1): first[name] for name in first if name.startswith(like)}
    _check_shapes(ours, weights, checkpoint)
    check_tables(config)


def check_tables(config: TransformerConfig) -> None:
    """Raise UserError if RoPE's tables, which are in no checkpoint, are larger than this machine's memory."""
    dim = config.layer_config().rotated_dim
    needed, there = 4 * config.num_layers * config.seq_len * dim, memory_bytes()
    if needed > there:
        raise UserError(
            f"model.seq_len={config.seq_len} is too long for this machine: the tables of RoPE alone take "
            f"{needed / 1e9:,.0f} GB, and it has {there / 1e9:,.0f} GB of memory"
        )


def _check_shapes(ours: dict[str, torch.Tensor], weights: dict[str, torch.Tensor], checkpoint: Path) -> None:
    here = {name: list(tensor.shape) for name, tensor in ours.items()}
    there = {name: list(tensor.shape) for name, tensor in weights.items()}
    for name in sorted(here | there):
        if here.get(name) != there.get(name):
            raise UserError(
                f"{checkpoint} holds another model: {name} is {there.get(name, 'missing')} there, "
                f"{here.get(name, 'missing')} in the model to load it into"
            )
