"""Reads and writes config.yaml, a run's configuration as plain data.

A run may come from anybody, so only texts, numbers, lists and keys are read. `${...}` in a text stays that text and is
never replaced by a variable of this machine. No key makes an object of anything but the configuration's own classes.
"""

import contextlib
import types
from collections import Counter
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, get_args, get_origin

import yaml

from mla_lm.attention.gqa import kind_of_heads
from mla_lm.config import TrainConfig
from mla_lm.errors import UserError

MOST_BYTES, DEEPEST = 2**20, 16  # largest file, in bytes; deepest nesting of keys and lists
IN_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", list: "a list"}


def to_yaml(config: TrainConfig) -> str:
    """Format the configuration as YAML, with every key in the order of the fields; the inverse of `read_config`."""
    return yaml.dump(asdict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=float("inf"))


def read_config(path: Path) -> TrainConfig:
    """Read the configuration in a file; keys that it lacks get their defaults.

    Raises:
        UserError: the file cannot be read, is not a run's configuration, or has an unknown key or a value of a wrong
            type.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise UserError(f"{path} has more than {MOST_BYTES:,} bytes, so it is not the configuration of a run")
        content = yaml.load(path.read_text(encoding="utf-8"), _PlainLoader)
    except (yaml.YAMLError, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {_first_line(error)}") from error
    if not isinstance(content, dict) or "model" not in content:
        raise UserError(f"{path} is not the configuration of a run")
    try:
        config = from_plain(content, TrainConfig)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    attention = content["model"].get("attention", {})
    if "kind" not in attention:  # in a run from before the key existed
        own, heads = config.model.attention, config.model.num_heads
        own.kind = "mla" if own.kv_compressed_dim is not None else kind_of_heads(own.num_kv_heads, heads)
    return config


def changed(config: TrainConfig, changes: dict[str, Any]) -> TrainConfig:
    """Return a copy of the configuration with new values at these dotted keys."""
    plain = asdict(config)
    for key, value in changes.items():
        *above, name = key.split(".")
        part = plain
        for step in above:
            part = part[step]
        part[name] = value
    return from_plain(plain, TrainConfig)


def from_plain(value: Any, kind: Any, key: str = "") -> Any:
    """Convert plain data to the type of a configuration's field: a dataclass, list, number, text, bool or None.

    Args:
        kind: the field's type
        key: its dotted name, for error messages

    Raises:
        UserError: a key does not exist, or its value has a wrong type; the message names the key.
    """
    if type(value) is int and abs(value) >= 2**63:
        raise UserError(f"{key} is too large a number")
    if isinstance(kind, types.UnionType):  # X | None
        (kind,) = (choice for choice in get_args(kind) if choice is not types.NoneType)
        return None if value is None else from_plain(value, kind, key)
    if is_dataclass(kind) and isinstance(value, dict):
        known = {field.name: field.type for field in fields(kind)}
        within = {name: f"{key}.{name}" if key else f"{name}" for name in value}
        for name in value:
            if name not in known:
                raise UserError(f"unknown key {within[name]}")
        made: Any = kind
        return made(**{name: from_plain(item, known[name], within[name]) for name, item in value.items()})
    if get_origin(kind) is list and isinstance(value, list):
        (of,) = get_args(kind)
        return [from_plain(item, of, f"{key}[{place}]") for place, item in enumerate(value)]
    if kind is Any and not isinstance(value, dict):
        return value
    # A text too, as which YAML 1.1 reads 1e-3.
    if kind is float and isinstance(value, int | float | str) and type(value) is not bool:
        with contextlib.suppress(ValueError, OverflowError):
            return float(value)
    if type(value) is kind:
        return value
    wanted = IN_WORDS.get(get_origin(kind) or kind, "a group of keys" if is_dataclass(kind) else "a text or a list")
    raise UserError(f"{key}={_shown(value)} must be {wanted}")


class _PlainLoader(yaml.SafeLoader):
    """A YAML loader without tags, dates, and aliases, by which a short file could expand to an endless one."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, stream: str):
        super().__init__(stream)
        self.depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if event.anchor or getattr(event, "tag", None):
            raise yaml.YAMLError(f"line {event.start_mark.line + 1} has an alias, an anchor or a tag")
        if self.depth == DEEPEST:
            raise yaml.YAMLError(f"line {event.start_mark.line + 1} is more than {DEEPEST} levels deep")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        counts = Counter(name.value for name, _ in node.value if isinstance(name, yaml.ScalarNode))
        if twice := [name for name, count in counts.items() if count > 1]:
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: {twice[0]} is there twice")
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes texts with line ends or unprintable characters as escapes, since yaml misreads some of these otherwise."""

    def represent_str(self, text: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_str)


def _first_line(error: Exception) -> str:
    """Describe an error and its line number in one line."""
    mark = getattr(error, "problem_mark", None)
    text = getattr(error, "problem", None) or getattr(error, "strerror", None) or str(error).partition("\n")[0]
    return f"line {mark.line + 1}: {text}" if mark else text


def _shown(value: Any) -> str:
    """Format a value as in the file, shortened to 60 characters."""
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf")).removesuffix("\n...\n").strip()
    return text if len(text) <= 60 else text[:57] + "..."
