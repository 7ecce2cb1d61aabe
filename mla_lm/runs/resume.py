"""Combines a command line with the configuration of the run that it resumes, or whose weights it takes."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from mla_lm.config import TrainConfig, differing, is_left_open, may_change, with_absolute_paths
from mla_lm.errors import UserError
from mla_lm.keys import flatten
from mla_lm.runs.config_file import changed
from mla_lm.runs.folder import RunFolder

WHOLE = ("experiment", "debug", "sweep")  # groups whose options reach all over the configuration
GROUPS = ("model", "data", "optimizer", "schedule", "trainer", "logger")


def resumed_config(composed: TrainConfig, run: RunFolder, overrides: list[str]) -> TrainConfig:
    """The run's own configuration, with what the command line names on top.

    Args:
        composed: what Hydra made of the command line
        overrides: the command line

    Raises:
        UserError: an override would change the meaning of the run.
    """
    own = run.config()
    theirs, ours = flatten(asdict(composed)), flatten(asdict(own))
    changes = {}
    for key, by_group in _named_keys(overrides, list(theirs)).items():
        value = theirs[key]
        if value == ours[key] or key in ("ckpt_path", "trust") or (by_group and is_left_open(key, value)):
            continue
        if not may_change(key):
            raise UserError(
                f"{key}={_text(value)} would change what the run in {run.path} is: it has {key}={_text(ours[key])}.\n"
                "  Leave it out to resume; init_from=RUN begins a new run from its weights."
            )
        if by_group == "logger" and key != "logger.kind":
            continue  # its project and group stay what they were
        if by_group and by_group != "logger":
            raise UserError(
                f"{by_group}=... would change {key} from {_text(ours[key])} to {_text(value)}: "
                f"with ckpt_path, name single keys such as {key}={_text(value)}"
            )
        changes[key] = value
    return with_absolute_paths(changed(own, changes))


def started_config(composed: TrainConfig, run: RunFolder, overrides: list[str]) -> TrainConfig:
    """The configuration of a new run: another run's model, with what the command line names on top.

    The model knows whole windows, so short ones come first only if the command line names schedule.short_seq_len. Where
    it names model.attention.yarn.factor, and no model.seq_len, the context grows by that factor.
    """
    theirs = flatten(asdict(composed))
    named = _named_keys(overrides, list(theirs), new_run=True)
    for key, by_group in named.items():
        if key.startswith("data.tokenizer.") and not by_group:
            raise UserError(f"{key}: the tokenizer of {run.path} comes with its weights; leave it out")
    own = run.config()
    ours = flatten(asdict(own))
    del ours["model.document_token"]  # data.document_mask of the new run decides
    inherited = {key: value for key, value in ours.items() if key.startswith(("model.", "data.tokenizer."))}
    if named.get("schedule.short_seq_len", "by default") is not None:
        inherited["schedule.short_seq_len"] = None
    changes = {key: theirs[key] for key in named if key.startswith("model.") and key != "model.vocab_size"}
    if "model.attention.yarn.factor" in changes and "model.seq_len" not in changes:
        wanted, there = changes["model.attention.yarn.factor"], own.model.attention.yarn.factor
        if 1 < wanted <= there:
            raise UserError(
                f"model.attention.yarn.factor={wanted}: the run in {run.path} has {there} already, so that gives no "
                f"longer context; {there * wanted} is {wanted} times what it has"
            )
        changes["model.seq_len"] = int(own.model.seq_len * wanted / there)
    return with_absolute_paths(changed(composed, inherited | changes))


def different_keys(config: TrainConfig, run: RunFolder) -> list[str]:
    """The dotted keys in which a run's configuration differs from this one, so that its results would differ."""
    ours = flatten(asdict(config))
    return [key for key in differing([config, run.config()]) if not is_left_open(key, ours[key])]


def _named_keys(overrides: list[str], keys: list[str], new_run: bool = False) -> dict[str, str | None]:
    """Map every key that the command line sets to the group that sets it, or to None if the key itself is named."""
    named = {}
    for override in OverridesParser.create().parse_overrides(overrides):
        name = override.key_or_group
        if name in WHOLE and not new_run:
            raise UserError(f"{name}=... belongs to a new run: with ckpt_path, name single keys")
        if name in WHOLE:
            named |= {key: name for key in _keys_of_file(name, f"{override.value()}") if key in keys}
        elif name in GROUPS:
            named |= {key: name for key in keys if key.startswith(name + ".") and named.get(key, name) is not None}
        else:
            named |= {key: None for key in keys if key == name or key.startswith(name + ".")}
    return named


def _keys_of_file(group: str, option: str) -> list[str]:
    """What conf/GROUP/OPTION.yaml sets."""
    sources = HydraConfig.get().runtime.config_sources
    conf = next(source.path for source in sources if source.provider == "main")
    content: Any = OmegaConf.to_container(OmegaConf.load(Path(conf, group, f"{option}.yaml")))
    return list(flatten(content))


def _text(value: Any) -> str:
    return "null" if value is None else str(value)
