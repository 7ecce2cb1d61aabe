"""What a study compares, as declared in conf/study/NAME.yaml and on the command line."""

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import MISSING, OmegaConf

from mla_lm.attention import KINDS
from mla_lm.config import TrainConfig
from mla_lm.errors import UserError
from mla_lm.keys import check_at_least, check_choice, key_names, nearest
from mla_lm.terminal import cli

VIEWS = ("parameters", "cache", "flops")
OF_RUNS = ("optimizer", "schedule", "trainer", "logger")  # groups of train.py that all runs of a study may share
# Keys of train.py that differ between the runs of a study, and the study's own that decide them.
OF_ROWS = {
    "model": "kinds and sizes",
    "seed": "seeds",
    "optimizer.lr": "tuning.learning_rates",
    "trainer.max_steps": "tokens",
    "trainer.devices": "processes, each on one device",
    "ckpt_path": "its folder, --out",
    "init_from": "nothing: its runs begin anew",
    "run.resume": "its folder, --out",
    "logger.group": "its name",
    "logger.name": "its rows",
    "tags": "its rows",
}


@dataclass
class TuningConfig:
    """The search for the learning rate of each kind and size, by validation loss."""

    seed: int = 1000  # of these runs alone
    learning_rates: list[float] = field(default_factory=lambda: [1.5e-3, 3e-3, 6e-3])  # one: nothing is tuned
    most: int = 7  # rates tried in all, where the best one lies at an end of the range and the range grows
    kinds: list[str] | None = None  # that are tuned; the others take the middle rate. None: all


@dataclass
class StudyConfig:
    """A declaration. An entry of kinds, variants and sizes is a name, and keys of train.py that go with it."""

    title: str = MISSING
    kinds: list[str] | None = None  # None: every kind in mla_lm.attention.KINDS
    variants: list[str] = field(default_factory=list)  # like kinds, but at the learning rate of their kind
    sizes: list[str] = MISSING  # of the presets conf/model/KIND_SIZE.yaml
    baseline: str | None = "mha"  # the kind that others are compared with, and whose parameters variants have
    views: list[str] = field(default_factory=lambda: list(VIEWS))
    cache_of: list[str] = field(default_factory=list)  # the view by cache: kinds whose cache an MLA is made to have
    corpus: str = MISSING  # data=..., and the keys that go with it
    tokens: int | None = None  # of each run
    tokens_per_parameter: float | None = None  # instead of tokens: by the parameters of the baseline in each size
    seeds: list[int] = MISSING
    more_seeds: list[int] = field(default_factory=list)  # besides these, for the kinds of more_seeds_of
    more_seeds_of: list[str] = field(default_factory=list)
    tuning: TuningConfig = field(default_factory=TuningConfig)
    settings: list[str] = field(default_factory=list)  # further keys of train.py, the same for every run
    processes: int | None = None  # at once; None: one for each GPU, or as many as the CPU's cores and memory allow
    threads: int | None = None  # of each; None: 1 on a CPU, and an equal share of the cores for each GPU

    def check(self) -> None:
        """Check all keys, alone and together.

        Raises:
            UserError: naming the key and what would be right.
        """
        for name in ("kinds", "sizes", "seeds", "views"):
            if getattr(self, name) == []:
                raise UserError(f"{name}=[] is empty: name at least one")
        for entry in [*(self.kinds or []), *self.variants]:
            _check_kind("kinds or variants", parsed(entry).name)
        for kind in [*self.cache_of, *self.more_seeds_of, *(self.tuning.kinds or [])]:
            _check_kind("cache_of, more_seeds_of or tuning.kinds", kind)
        for view in self.views:
            check_choice("views", view, VIEWS)
        self._check_numbers()
        self._check_baseline()

    def _check_numbers(self) -> None:
        check_at_least(1, self, "", "tokens", "processes", "threads")
        if (self.tokens is None) == (self.tokens_per_parameter is None):
            raise UserError("a study needs tokens or tokens_per_parameter, one of them: null the other")
        if self.tokens_per_parameter is not None and not self.tokens_per_parameter > 0:
            raise UserError(f"tokens_per_parameter={self.tokens_per_parameter} must be above 0")
        self._check_seeds(self.seeds + self.more_seeds)
        rates = self.tuning.learning_rates
        if not rates or not all(0 < rate < float("inf") for rate in rates) or len(set(rates)) < len(rates):
            raise UserError(f"tuning.learning_rates={rates} must be different numbers above 0, at least one")
        check_at_least(len(rates), self.tuning, "tuning.", "most")

    def _check_seeds(self, seeds: list[int]) -> None:
        if twice := {seed for seed in seeds if seeds.count(seed) > 1}:
            raise UserError(f"seeds={self.seeds} and more_seeds={self.more_seeds} name {min(twice)} more than once")
        if len(self.tuning.learning_rates) > 1 and self.tuning.seed in seeds:
            raise UserError(
                f"tuning.seed={self.tuning.seed} is among the seeds {seeds}: the learning rate that suits a seed best "
                "would favour it, so tune on another one"
            )

    def seeds_for(self, kind: str) -> list[int]:
        return self.seeds + (self.more_seeds if kind in self.more_seeds_of else [])

    def _check_baseline(self) -> None:
        if self.baseline is None:
            return
        _check_kind("baseline", self.baseline)
        if self.kinds is not None and self.baseline not in self.kinds:
            raise UserError(
                f"baseline={self.baseline} is not among kinds={self.kinds}: add it, or give baseline=null for no "
                "differences"
            )


class Entry(NamedTuple):
    """An entry of kinds, variants or sizes."""

    name: str
    overrides: list[str]

    @property
    def label(self) -> str:
        """For names and folders: small, or small-num_layers8."""
        parts = [override.partition("=") for override in self.overrides]
        words = [self.name, *(key.rpartition(".")[2] + value for key, _, value in parts)]
        return "-".join(re.sub(r"[^\w.]", "_", word) for word in words)


def parsed(entry: str) -> Entry:
    """Split "mla model.attention.rope_dim=8"."""
    name, *overrides = shlex.split(entry) or [""]
    return Entry(name, overrides)


def _check_kind(key: str, kind: str) -> None:
    if kind not in KINDS:
        raise UserError(f"{key}: unknown kind {kind}{nearest(kind, list(KINDS))}\n  one of: {', '.join(KINDS)}")


def declared(conf: Path, name: str, overrides: list[str]) -> StudyConfig:
    """Compose and check a study.

    Args:
        conf: the folder that has study/NAME.yaml
        overrides: key=value of the study, or of train.py for all its runs

    Raises:
        UserError and Hydra's errors: there is no such study or key, or a value is not possible.
    """
    names = sorted(file.stem for file in (conf / "study").glob("*.yaml"))
    if name not in names:
        raise UserError(f"unknown study {name}{nearest(name, names)}\n  one of: {', '.join(names)}")
    ConfigStore.instance().store(name="study_schema", node=StudyConfig)
    own, of_data, of_runs = _sorted_out(overrides)
    with initialize_config_dir(str(conf / "study"), version_base="1.3"):
        composed = compose(name, own)
    cli.check_keys(composed, StudyConfig)
    study: Any = OmegaConf.to_object(composed)
    if of_data:  # another corpus takes none of this one's keys
        other = any(override.startswith("data=") for override in of_data)
        study.corpus = shlex.join([*([] if other else shlex.split(study.corpus)), *of_data])
    study.settings += of_runs
    study.check()
    return study


def _sorted_out(overrides: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Tell the keys of a study, those of data, and the other keys of train.py apart."""
    known = [*OF_RUNS, *key_names(TrainConfig)]
    own, of_data, of_runs = [], [], []
    for override in OverridesParser.create().parse_overrides(overrides):
        key = override.key_or_group
        if key in OF_ROWS:
            raise UserError(f"{override.input_line}: a study sets {key} itself, by {OF_ROWS[key]}")
        line = override.input_line or ""
        (of_data if key.partition(".")[0] == "data" else of_runs if key in known else own).append(line)
    return own, of_data, of_runs
