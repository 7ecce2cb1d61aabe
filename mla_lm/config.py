"""The configuration of a training run: every key, its type, and what must hold between keys."""

import copy
import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from hydra.core.config_store import ConfigStore

from mla_lm import keys
from mla_lm.attention.fp8 import MULTIPLE
from mla_lm.data.config import DataConfig, PartConfig
from mla_lm.errors import UserError
from mla_lm.keys import (
    ADJUSTABLE,
    FROM_MACHINE,
    FROM_MODEL,
    INCIDENTAL,
    RUN_PATH,
    check_at_least,
    check_choice,
    flatten,
    marked,
)
from mla_lm.model.config import TransformerConfig
from mla_lm.optim.optimizer import OptimizerConfig
from mla_lm.optim.schedule import ScheduleConfig, mean_window_length, window_length

PRECISIONS = ("auto", "bf16-mixed", "16-mixed", "32-true")
ACCELERATORS = ("auto", "cpu", "gpu", "mps")
PROFILERS = (None, "simple", "advanced")
LOGGERS = ("wandb", "tensorboard", "none")
ON_NONFINITE = ("stop", "skip")
RESUME = (None, "auto")
MOST_KEPT = 100  # versions of last.ckpt
KV_CACHE_DTYPES = (None, "int8")
MICRO_BATCH_TOKENS = 8192  # at once where micro_batch_tokens is open, but in training on a GPU


@dataclass
class TrainerConfig:
    """How long and on what; the names are those of lightning.Trainer."""

    max_steps: int = marked(3600, ADJUSTABLE)  # optimizer steps
    accelerator: str = marked("auto", INCIDENTAL | FROM_MACHINE)  # auto | cpu | gpu | mps
    devices: int = marked(1, INCIDENTAL)
    num_nodes: int = marked(1, INCIDENTAL)
    precision: str = marked("auto", ADJUSTABLE | FROM_MACHINE)  # auto | bf16-mixed | 16-mixed | 32-true
    fp8: bool = marked(False, ADJUSTABLE)  # products of the blocks' matrices in training; all else in precision
    profiler: str | None = marked(None, INCIDENTAL)  # simple | advanced
    overfit_batches: int | None = None  # train on the batches of the first so many steps only, again and again

    def check(self) -> None:
        """Raises UserError for values that cannot be."""
        check_at_least(1, self, "trainer.", "max_steps", "devices", "num_nodes", "overfit_batches")
        check_choice("trainer.precision", self.precision, PRECISIONS)
        check_choice("trainer.accelerator", self.accelerator, ACCELERATORS)
        check_choice("trainer.profiler", self.profiler, PROFILERS)


@dataclass
class CheckpointConfig:
    every_n_steps: int = 300
    keep_last: int = 2  # last.ckpt, last-1.ckpt and so on: a resume takes the newest that is whole

    def check(self) -> None:
        """Raises UserError for values that cannot be."""
        check_at_least(1, self, "checkpoint.", "every_n_steps", "keep_last")
        if self.keep_last > MOST_KEPT:
            raise UserError(f"checkpoint.keep_last={self.keep_last} must be at most {MOST_KEPT}")


@dataclass
class RunConfig:
    resume: str | None = None  # auto: go on with the run in hydra.run.dir where there is one, or begin it

    def check(self) -> None:
        """Raises UserError for values that cannot be."""
        check_choice("run.resume", self.resume, RESUME)


@dataclass
class LoggerConfig:
    """Where metrics go besides metrics.jsonl."""

    kind: str = "wandb"  # wandb | tensorboard | none
    project: str = "mla-lm"
    group: str | None = None  # None: in a sweep, that of SweepJob
    name: str | None = None

    def check(self) -> None:
        """Raises UserError for values that cannot be."""
        check_choice("logger.kind", self.kind, LOGGERS)


class SweepJob(NamedTuple):
    """The sweep that a run belongs to."""

    overrides: list[str]  # the command line that makes this run by itself
    group: str  # of all its runs in wandb: date and time of its folder
    tags: list[str]  # of all its runs in wandb: its name in conf/sweep/, where it has one


@dataclass
class SamplesConfig:
    """Continuations of data.prompts, shown at each validation."""

    max_tokens: int = 64  # 0: none are made
    temperature: float = 0.8

    def check(self) -> None:
        """Raises UserError for values that cannot be."""
        if self.max_tokens < 0 or not self.temperature >= 0:
            raise UserError("samples.max_tokens and samples.temperature must be at least 0")


@dataclass
class TrainConfig:
    """Everything `train.py` reads; the groups of conf/ fill it."""

    seed: int = 1
    compile: bool | None = marked(None, INCIDENTAL | FROM_MACHINE)  # None: where it pays within the run
    ckpt_path: str | None = marked(None, INCIDENTAL)  # a run folder, or a checkpoint in one: go on with that run
    init_from: str | None = marked(None, RUN_PATH)  # a run folder: begin a new run with its weights and tokenizer
    trust: bool = marked(False, INCIDENTAL)  # ckpt_path: the paths of a run that was made elsewhere may be used
    # over all devices and accumulated micro-batches. None: by the size of the model
    tokens_per_step: int | None = marked(2048, FROM_MODEL)
    # at most this many go through a device at once; accumulation follows. None: as the device's memory allows
    micro_batch_tokens: int | None = marked(None, INCIDENTAL | FROM_MACHINE)
    val_every_n_steps: int = marked(300, INCIDENTAL)
    log_every_n_steps: int = marked(20, INCIDENTAL)
    # int8: the cache whose bytes are measured and logged; None: of the precision
    kv_cache_dtype: str | None = marked(None, INCIDENTAL)
    # before and after training, as a table and a plot in the run folder
    loss_by_position: bool = marked(False, INCIDENTAL)
    # stop | skip: what to do at a step whose loss or gradient is not finite; as long as all are, it changes nothing
    on_nonfinite: str = marked("stop", INCIDENTAL)
    step_timeout: int = marked(1800, INCIDENTAL)  # seconds without a step after which the run is given up; 0: never
    tags: list[str] = field(default_factory=list, metadata=INCIDENTAL)
    run: RunConfig = field(default_factory=RunConfig, metadata=INCIDENTAL)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig, metadata=INCIDENTAL)
    samples: SamplesConfig = field(default_factory=SamplesConfig, metadata=INCIDENTAL)
    model: TransformerConfig = field(default_factory=TransformerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig, metadata=INCIDENTAL)

    @property
    def step_tokens(self) -> int:
        """`tokens_per_step` where it is not open any more."""
        assert self.tokens_per_step is not None
        return self.tokens_per_step

    @property
    def sequences_per_step(self) -> int:
        """Windows of model.seq_len tokens in one optimizer step, over all devices."""
        return self.step_tokens // self.model.seq_len

    def window_length(self, step: int) -> int:
        """Tokens of the windows that a step trains on."""
        return window_length(step, self.trainer.max_steps, self.model.seq_len, self.schedule)

    @property
    def mean_window_length(self) -> float:
        """The same, averaged over the run's steps."""
        return mean_window_length(self.trainer.max_steps, self.model.seq_len, self.schedule)

    @property
    def world_size(self) -> int:
        return self.trainer.devices * self.trainer.num_nodes

    @property
    def micro_batch_size(self) -> int:
        """Windows that go through one device at once: the largest divisor of its share that the cap allows."""
        share = self.sequences_per_step // self.world_size
        most = max(1, (self.micro_batch_tokens or MICRO_BATCH_TOKENS) // self.model.seq_len)
        return max(size for size in range(1, min(share, most) + 1) if share % size == 0)

    @property
    def evaluation_batch_size(self) -> int:
        """Windows at once where a trained model is evaluated, maybe on a smaller device than it was trained on."""
        return max(1, min(self.micro_batch_size, MICRO_BATCH_TOKENS // self.model.seq_len))

    @property
    def accumulation(self) -> int:
        """Micro-batches of one device in one optimizer step."""
        return self.sequences_per_step // self.world_size // self.micro_batch_size

    def check(self) -> None:
        """Check all keys, alone and together, before anything is built or written.

        Raises:
            UserError: naming the key and what would be right.
        """
        self.model.layer_config()
        for section in (self.data, self.optimizer, self.schedule, self.trainer):
            section.check()
        for section in (self.run, self.checkpoint, self.samples, self.logger):
            section.check()
        self._check_own_keys()
        self._check_between_sections()

    def _check_own_keys(self) -> None:
        check_at_least(1, self, "", "val_every_n_steps", "log_every_n_steps", "micro_batch_tokens")
        check_at_least(0, self, "", "step_timeout")
        check_choice("kv_cache_dtype", self.kv_cache_dtype, KV_CACHE_DTYPES)
        check_choice("on_nonfinite", self.on_nonfinite, ON_NONFINITE)
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed={self.seed} must be at least 0 and below 2**32")

    def _check_between_sections(self) -> None:
        if (factor := self.model.attention.yarn.factor) != 1 and not self.init_from:
            raise UserError(
                f"model.attention.yarn.factor={factor} extends the context of a trained run: give init_from=RUN"
            )
        if self.model.seq_len % (short := self.window_length(0)):
            raise UserError(
                f"schedule.short_seq_len={short} must divide model.seq_len={self.model.seq_len}, or be null"
            )
        unit = self.model.seq_len * self.world_size
        if self.tokens_per_step is not None and (self.tokens_per_step < unit or self.tokens_per_step % unit):
            raise UserError(
                f"tokens_per_step={self.tokens_per_step} must be a multiple of model.seq_len x devices = {unit}"
            )
        if self.trainer.fp8 and self.model.seq_len % MULTIPLE:
            raise UserError(
                f"trainer.fp8=true needs windows of a multiple of {MULTIPLE} tokens, and model.seq_len is "
                f"{self.model.seq_len}"
            )


MARKS = keys.marks(TrainConfig)


def may_change(key: str) -> bool:
    """Whether a run may go on with another value of a dotted key."""
    return "incidental" in MARKS[key] or "adjustable" in MARKS[key]


def is_left_open(key: str, value: Any) -> bool:
    """Whether this value leaves a dotted key to be filled in from the data, the machine or the model."""
    return "filled_in" in MARKS[key] and value in (None, "auto")


def differing(configs: list[TrainConfig]) -> list[str]:
    """Dotted keys by which these configurations differ, in the order of the fields.

    Left out are keys that change nothing of what a run computes, and those that the data fill in.
    """
    flat = [flatten(asdict(config)) for config in configs]
    compared = [k for k in flat[0] if "incidental" not in MARKS[k] and MARKS[k].get("filled_in") != "data"]
    return [key for key in compared if any(config[key] != flat[0][key] for config in flat)]


def config_hash(config: TrainConfig) -> str:
    """Hex hash of what decides the result: the resolved config less paths, logging and hardware."""
    kept = _hashed(flatten(asdict(config)), TrainConfig)
    kept["data.parts"] = [_hashed(flatten(part), PartConfig) for part in kept["data.parts"]]
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def _hashed(flat: dict[str, Any], schema: type) -> dict[str, Any]:
    """The entries of a flattened configuration that decide the result: names on the Hub do, paths do not."""
    found = keys.marks(schema)

    def decides(key: str, value: Any) -> bool:
        mark, path = found[key], found[key].get("path")
        is_path = path in ("files", "run") or (path == "hub" and os.path.isabs(str(value)))
        return not is_path and "incidental" not in mark and mark.get("filled_in") != "machine"

    return {key: value for key, value in flat.items() if decides(key, value)}


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """A copy whose paths are absolute, so that its run can be resumed from any working directory."""
    config = copy.deepcopy(config)
    for _, owner, own in keys.paths(config):
        path = getattr(owner, own.name)
        if path and own.metadata["path"] == "files":
            several = not isinstance(path, str | int | float)  # data.files=2024 comes as a number
            setattr(owner, own.name, [_absolute(str(one)) for one in path] if several else _absolute(str(path)))
        elif path and own.metadata["path"] == "hub" and os.path.isdir(os.path.expanduser(path)):
            setattr(owner, own.name, _absolute(path))
    return config


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def register_schema() -> None:
    """Give Hydra the types: a wrong type or an unknown key is refused while the config is composed."""
    ConfigStore.instance().store(name="train_schema", node=TrainConfig)
