"""The run folder: what lies where in it, and loading a trained model from it."""

import fcntl
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tokenizers import Tokenizer
from yaml import YAMLError

from mla_lm.attention import MLAConfig
from mla_lm.checkpoint import load_checkpoint
from mla_lm.config import TrainConfig
from mla_lm.data.tokenizer import load_tokenizer
from mla_lm.errors import UserError
from mla_lm.files import whole_folder, write_atomically
from mla_lm.hardware import memory_bytes
from mla_lm.transformer import Transformer, TransformerConfig


@dataclass(frozen=True)
class RunFolder:
    """The files of one run."""

    path: Path

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def tokenizer_file(self) -> Path:
        return self.path / "tokenizer.json"

    @property
    def last(self) -> Path:
        return self.path / "checkpoints" / "last.ckpt"

    @property
    def best(self) -> Path:
        return self.path / "checkpoints" / "best.ckpt"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def summary_file(self) -> Path:
        return self.path / "summary.json"

    @property
    def wandb_id_file(self) -> Path:
        return self.path / "wandb_id"

    def config(self) -> TrainConfig:
        """The run's configuration.

        Raises:
            UserError: config.yaml is damaged or of another version.
        """
        try:
            loaded = OmegaConf.load(self.config_file)
            if "model" not in loaded:
                raise UserError(f"{self.config_file} is not the configuration of a run")
            return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TrainConfig), loaded))
        except (OmegaConfBaseException, YAMLError, OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self.config_file} cannot be read: {str(error).splitlines()[0]}") from error

    def write_config(self, config: TrainConfig) -> None:
        self._write_text(self.config_file, OmegaConf.to_yaml(OmegaConf.create(asdict(config))))

    def write_tokenizer(self, tokenizer: Tokenizer) -> None:
        self._write_text(self.tokenizer_file, tokenizer.to_str(pretty=True))

    def write_summary(self, summary: dict[str, Any]) -> None:
        self._write_text(self.summary_file, json.dumps(summary, indent=2, allow_nan=False) + "\n")

    def summary(self) -> dict[str, Any]:
        """The figures of the run, `finished` among them; empty where it has none yet.

        Raises:
            UserError: summary.json is damaged.
        """
        if not self.summary_file.is_file():
            return {}
        try:
            return json.loads(self.summary_file.read_text())
        except ValueError as error:
            raise UserError(f"{self.summary_file} is damaged: {error}") from error

    @property
    def is_begun(self) -> bool:
        """Whether there is something in it to go on from."""
        return self.config_file.is_file() and (self.last.is_file() or self.best.is_file())

    def foreign_files(self) -> list[str]:
        """Names that a run would write over, where they are no run's."""
        files = (self.tokenizer_file, self.last.parent, self.metrics_file, self.summary_file, self.wandb_id_file)
        return [] if self.config_file.exists() else [file.name for file in files if file.exists()]

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Held by the one process that works on the run; on the folder itself, so that it leaves no file behind.

        Raises:
            UserError: another process holds it.
        """
        folder = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError as error:
            raise UserError(
                f"another process is at work on {self.path}: wait for it, or choose another folder"
            ) from error
        finally:
            os.close(folder)  # and with it the lock

    @staticmethod
    def _write_text(path: Path, text: str) -> None:
        write_atomically(path, lambda file: file.write(text.encode()))


def find_run(path: str | Path) -> tuple[RunFolder, Path]:
    """The run that a user names by its folder or by a checkpoint in it, and that checkpoint (last.ckpt of a folder).

    Raises:
        UserError: there is no run.
    """
    path = Path(path).expanduser().absolute()
    if not path.exists():
        raise UserError(f"{path} does not exist: give a run folder, or a checkpoint in one")
    run = RunFolder(path if path.is_dir() else path.parent.parent)
    if not run.config_file.is_file():
        raise UserError(f"{run.path} is no run folder: it has no config.yaml")
    return run, run.last if path.is_dir() else path


def find_best(path: str | Path) -> tuple[RunFolder, Path]:
    """As `find_run`, but of a folder the best checkpoint, where there is one."""
    run, checkpoint = find_run(path)
    if Path(path).expanduser().is_dir() and run.best.is_file():
        checkpoint = run.best
    return run, checkpoint


def load_run(path: str | Path, device: torch.device | str = "cpu") -> tuple[Transformer, Tokenizer, TrainConfig]:
    """The model of a run in evaluation mode, its tokenizer, and its configuration.

    Args:
        path: a run folder (its best checkpoint is taken, the last one where there is no best), or a checkpoint in one

    Raises:
        UserError: there is no run, or it is damaged.
    """
    run, checkpoint = find_best(path)
    config = run.config()
    weights = load_checkpoint(checkpoint)["state_dict"]
    check_describes(config.model, weights, checkpoint)
    model = Transformer(config.model)
    model.load_state_dict(weights)
    return model.to(device).eval(), load_tokenizer(run.tokenizer_file), config


def load_weights(model: Transformer, checkpoint: Path) -> None:
    """Load the network's weights.

    Raises:
        UserError: the checkpoint is missing, damaged, or of another model.
    """
    weights = load_checkpoint(checkpoint)["state_dict"]
    check_describes(model.config, weights, checkpoint)
    model.load_state_dict(weights)


def check_describes(config: TransformerConfig, weights: dict[str, torch.Tensor], checkpoint: Path) -> None:
    """See that a model is that of the weights before it is made, and takes what memory its configuration says.

    Raises:
        UserError: it is another, or its tables of RoPE, which are no weights, are too large.
    """
    items = weights.items() if isinstance(weights, dict) else [(None, None)]
    if not all(isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in items):
        raise UserError(f"{checkpoint} is no checkpoint of this project: its state_dict is not one of tensors")
    try:
        with torch.device("meta"):
            one = Transformer(replace(config, num_layers=1)).state_dict()
    except (RuntimeError, TypeError, OverflowError) as error:  # torch's words for sizes beyond 64 bits
        raise UserError(f"{checkpoint} holds another model: the configured one has impossible sizes") from error
    layers = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    if layers != config.num_layers:  # of which each takes time to write down, even where it takes no memory
        raise UserError(
            f"{checkpoint} holds another model: {layers} layers are there, where model.num_layers={config.num_layers}"
        )
    numbered = {re.sub(r"^blocks\.0\.", f"blocks.{i}.", name): one[name] for i in range(layers) for name in one}
    _check_shapes(numbered, weights, checkpoint)
    check_tables(config)


def check_tables(config: TransformerConfig) -> None:
    """Raises UserError where the tables of RoPE, which are in no checkpoint, are larger than this machine's memory."""
    layer = config.layer_config()
    dim = layer.rope_dim if isinstance(layer, MLAConfig) else config.d_model // config.num_heads
    needed, there = 4 * config.num_layers * config.seq_len * dim, memory_bytes()
    if needed > there:
        raise UserError(
            f"model.seq_len={config.seq_len} is too long for this machine: the tables of RoPE alone take "
            f"{needed / 1e9:,.0f} GB, and it has {there / 1e9:,.0f} GB of memory"
        )


def check_fits(model: Transformer, weights: dict[str, torch.Tensor], checkpoint: Path) -> None:
    """Raises UserError where the weights are those of another model, naming the first that differs."""
    _check_shapes(model.state_dict(), weights, checkpoint)


def _check_shapes(ours: dict[str, torch.Tensor], weights: dict[str, torch.Tensor], checkpoint: Path) -> None:
    here = {name: list(tensor.shape) for name, tensor in ours.items()}
    there = {name: list(tensor.shape) for name, tensor in weights.items()}
    for name in sorted(here | there):
        if here.get(name) != there.get(name):
            raise UserError(
                f"{checkpoint} holds another model: {name} is {there.get(name, 'missing')} there, "
                f"{here.get(name, 'missing')} in the model to load it into"
            )


def write_model(path: Path, config: TrainConfig, tokenizer: Tokenizer, checkpoint: dict[str, Any]) -> None:
    """A run of a model that was not trained in it: `init_from` and the tools take it like any other.

    Args:
        checkpoint: the weights under `state_dict`; there is no training to go on with in it

    Raises:
        UserError: `path` has something in it, or cannot be written.
    """
    with whole_folder(path) as draft:
        run = RunFolder(draft)
        write_atomically(run.last, lambda file: torch.save(checkpoint, file))
        run.write_tokenizer(tokenizer)
        run.write_config(config)
