"""The configuration of a training run: every key, its type, and what must hold between keys."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field

from hydra.core.config_store import ConfigStore

from mla_lm.data.config import DataConfig
from mla_lm.errors import UserError
from mla_lm.keys import flatten
from mla_lm.model.config import TransformerConfig
from mla_lm.optim.optimizer import OptimizerConfig
from mla_lm.optim.schedule import ScheduleConfig

PRECISIONS = ("auto", "bf16-mixed", "16-mixed", "32-true")
ACCELERATORS = ("auto", "cpu", "gpu", "mps")
PROFILERS = (None, "simple", "advanced")
LOGGERS = ("wandb", "tensorboard", "none")
ON_NONFINITE = ("stop", "skip")
RESUME = (None, "auto")
MOST_KEPT = 100  # versions of last.ckpt
KV_CACHE_DTYPES = (None, "int8")


@dataclass
class TrainerConfig:
    """How long and on what; the names are those of lightning.Trainer."""

    max_steps: int = 3600  # optimizer steps
    accelerator: str = "auto"  # auto | cpu | gpu | mps
    devices: int = 1
    num_nodes: int = 1
    precision: str = "auto"  # auto | bf16-mixed | 16-mixed | 32-true
    profiler: str | None = None  # simple | advanced
    overfit_batches: int | None = None  # train on the batches of the first so many steps only, again and again


@dataclass
class CheckpointConfig:
    every_n_steps: int = 300
    keep_last: int = 2  # last.ckpt, last-1.ckpt and so on: a resume takes the newest that is whole


@dataclass
class RunConfig:
    resume: str | None = None  # auto: go on with the run in hydra.run.dir where there is one, or begin it


@dataclass
class LoggerConfig:
    """Where metrics go besides metrics.jsonl."""

    kind: str = "wandb"  # wandb | tensorboard | none
    project: str = "mla-lm"
    group: str | None = None
    name: str | None = None


@dataclass
class SamplesConfig:
    """Continuations of data.prompts, shown at each validation."""

    max_tokens: int = 64  # 0: none are made
    temperature: float = 0.8


@dataclass
class TrainConfig:
    """Everything `train.py` reads; the groups of conf/ fill it."""

    seed: int = 1
    compile: bool | None = None  # None: where it pays within the run
    ckpt_path: str | None = None  # a run folder, or a checkpoint in one: go on with that run
    init_from: str | None = None  # a run folder: begin a new run with its weights and tokenizer
    trust: bool = False  # ckpt_path: the paths of a run that was made elsewhere may be used
    tokens_per_step: int = 2048  # over all devices and accumulated micro-batches
    micro_batch_tokens: int = 8192  # at most this many go through a device at once; accumulation follows
    val_every_n_steps: int = 300
    log_every_n_steps: int = 20
    kv_cache_dtype: str | None = None  # int8: the cache whose bytes are measured and logged; None: of the precision
    loss_by_position: bool = False  # before and after training, as a table and a plot in the run folder
    on_nonfinite: str = "stop"  # stop | skip: what to do at a step whose loss or gradient is not finite
    step_timeout: int = 1800  # seconds without a step after which the run is given up; 0: never
    tags: list[str] = field(default_factory=list)
    run: RunConfig = field(default_factory=RunConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    model: TransformerConfig = field(default_factory=TransformerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)

    @property
    def sequences_per_step(self) -> int:
        """Windows of model.seq_len tokens in one optimizer step, over all devices."""
        return self.tokens_per_step // self.model.seq_len

    @property
    def world_size(self) -> int:
        return self.trainer.devices * self.trainer.num_nodes

    @property
    def micro_batch_size(self) -> int:
        """Windows that go through one device at once: the largest divisor of its share that the cap allows."""
        share = self.sequences_per_step // self.world_size
        most = max(1, self.micro_batch_tokens // self.model.seq_len)
        return max(size for size in range(1, min(share, most) + 1) if share % size == 0)

    @property
    def accumulation(self) -> int:
        """Micro-batches of one device in one optimizer step."""
        return self.sequences_per_step // self.world_size // self.micro_batch_size

    def check(self) -> None:
        """What must hold within and between the keys, before anything is built or written.

        Raises:
            UserError: naming the key and what would be right.
        """
        self.model.layer_config()
        self.data.check()
        self.optimizer.check()
        self.schedule.check()
        counts = {
            "trainer.max_steps": self.trainer.max_steps,
            "trainer.devices": self.trainer.devices,
            "trainer.num_nodes": self.trainer.num_nodes,
            "val_every_n_steps": self.val_every_n_steps,
            "log_every_n_steps": self.log_every_n_steps,
            "checkpoint.every_n_steps": self.checkpoint.every_n_steps,
            "checkpoint.keep_last": self.checkpoint.keep_last,
            "micro_batch_tokens": self.micro_batch_tokens,
        }
        if self.trainer.overfit_batches is not None:
            counts["trainer.overfit_batches"] = self.trainer.overfit_batches
        for name, value in counts.items():
            if value < 1:
                raise UserError(f"{name}={value} must be at least 1")
        if self.model.attention.yarn.factor != 1 and not self.init_from:
            raise UserError(
                f"model.attention.yarn.factor={self.model.attention.yarn.factor} extends the context of a trained run: "
                "give init_from=RUN"
            )
        unit = self.model.seq_len * self.world_size
        if self.tokens_per_step < unit or self.tokens_per_step % unit:
            raise UserError(
                f"tokens_per_step={self.tokens_per_step} must be a multiple of model.seq_len x devices = {unit}"
            )
        for name, value, choices in (
            ("trainer.precision", self.trainer.precision, PRECISIONS),
            ("trainer.accelerator", self.trainer.accelerator, ACCELERATORS),
            ("trainer.profiler", self.trainer.profiler, PROFILERS),
            ("logger.kind", self.logger.kind, LOGGERS),
            ("kv_cache_dtype", self.kv_cache_dtype, KV_CACHE_DTYPES),
            ("on_nonfinite", self.on_nonfinite, ON_NONFINITE),
            ("run.resume", self.run.resume, RESUME),
        ):
            if value not in choices:
                raise UserError(f"{name}={value} is unknown: one of {', '.join(map(str, choices))}")
        if self.checkpoint.keep_last > MOST_KEPT:
            raise UserError(f"checkpoint.keep_last={self.checkpoint.keep_last} must be at most {MOST_KEPT}")
        if self.step_timeout < 0:
            raise UserError(f"step_timeout={self.step_timeout} must be at least 0")
        if self.samples.max_tokens < 0 or not self.samples.temperature >= 0:
            raise UserError("samples.max_tokens and samples.temperature must be at least 0")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed={self.seed} must be at least 0 and below 2**32")


# Keys that say where, on what and how visibly a run goes, but not what it computes.
INCIDENTAL = (
    "ckpt_path",
    "trust",
    "compile",
    "micro_batch_tokens",
    "model.activation_checkpointing",
    "val_every_n_steps",
    "log_every_n_steps",
    "kv_cache_dtype",
    "loss_by_position",
    "on_nonfinite",  # which changes nothing as long as all numbers are finite
    "step_timeout",
    "tags",
    "run",
    "checkpoint",
    "samples",
    "trainer",
    "logger",
    "data.cache_dir",
    "data.num_workers",
    "data.prompts",
)


def is_incidental(key: str) -> bool:
    """Whether a dotted key changes nothing of what a run means."""
    if key == "trainer.overfit_batches":
        return False
    return any(key == name or key.startswith(name + ".") for name in INCIDENTAL)


def differing(configs: list[TrainConfig]) -> list[str]:
    """Dotted keys by which these configurations differ, in the order of the fields.

    Left out are incidental keys, other than the steps and the precision, and what train.py fills in from other keys.
    """
    flat = [flatten(asdict(config)) for config in configs]
    filled_in = ("model.vocab_size", "model.document_token")
    kept = ("trainer.max_steps", "trainer.precision")
    keys = [key for key in flat[0] if key in kept or not (is_incidental(key) or key in filled_in)]
    return [key for key in keys if any(config[key] != flat[0][key] for config in flat)]


def config_hash(config: TrainConfig) -> str:
    """Hex hash of what decides the result: the resolved config less paths, logging and hardware."""

    def without_paths(flat: dict) -> dict:  # a `path` that is no folder is a name on the Hub
        here = ("init_from", "files", "file")
        return {k: v for k, v in flat.items() if k.split(".")[-1] not in here and not os.path.isabs(str(v))}

    kept = {k: v for k, v in without_paths(flatten(asdict(config))).items() if not is_incidental(k)}
    kept["data.parts"] = [without_paths(flatten(part)) for part in kept["data.parts"]]
    kept["trainer.max_steps"] = config.trainer.max_steps
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def make_paths_absolute(config: TrainConfig) -> None:
    """So that a run can be resumed from any working directory."""

    def absolute(path: str) -> str:
        return os.path.abspath(os.path.expanduser(path))

    data = config.data
    for corpus in (data, *data.parts):
        if isinstance(corpus.files, str | int | float):  # data.files=2024 comes as a number
            corpus.files = absolute(str(corpus.files))
        elif corpus.files:
            corpus.files = [absolute(str(path)) for path in corpus.files]
    data.cache_dir = absolute(data.cache_dir)
    if data.tokenizer.file:
        data.tokenizer.file = absolute(data.tokenizer.file)
    for named in (data, *data.parts, data.tokenizer):  # a name on the Hub, or a folder laid out like it
        if named.path and os.path.isdir(os.path.expanduser(named.path)):
            named.path = absolute(named.path)


def register_schema() -> None:
    """Give Hydra the types: a wrong type or an unknown key is refused while the config is composed."""
    ConfigStore.instance().store(name="train_schema", node=TrainConfig)
