"""Keys of nested configurations: their dotted names, such as model.attention.rope_dim, and the marks on their fields.

A mark tells what a key means for a run: `compile: bool | None = marked(None, INCIDENTAL | FROM_MACHINE)`. The marks of
a section's field hold for all keys in the section.
"""

import difflib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import Field, field, fields, is_dataclass
from functools import cache
from typing import Any

from mla_lm.errors import UserError

INCIDENTAL = {"incidental": True}  # does not change what a run computes
ADJUSTABLE = {"adjustable": True}  # changes what a run computes, but a run may be resumed with another value
FROM_DATA = {"filled_in": "data"}  # if None or auto, filled in from the tokenizer and the data
FROM_MACHINE = {"filled_in": "machine"}  # if None or auto, chosen for the machine
FROM_MODEL = {"filled_in": "model"}  # if None, chosen for the model
PATH = {"path": "files"}  # one or several files or folders; made absolute
HUB_PATH = {"path": "hub"}  # a name on the Hugging Face Hub, or a folder with the same layout
RUN_PATH = {"path": "run"}  # a run folder, kept as it was typed


def marked(default: Any, mark: Mapping[str, Any]) -> Any:
    """Make a dataclass field with a default and one or more of the marks above."""
    return field(default=default, metadata=mark)


@cache
def marks(schema: type) -> dict[str, Mapping[str, Any]]:
    """The marks of every key that holds a value, by its dotted name, in nested dataclasses."""
    found = {}
    for own in fields(schema):
        if is_dataclass(own.type):
            found |= {f"{own.name}.{name}": {**own.metadata, **mark} for name, mark in marks(own.type).items()}
        else:
            found[own.name] = own.metadata
    return found


def key_names(schema: type) -> list[str]:
    """The dotted name of every key that holds a value, in nested dataclasses."""
    return list(marks(schema))


def flatten(config: dict, prefix: str = "") -> dict:
    """Flatten {"a": {"b": 1}} to {"a.b": 1}; lists stay whole."""
    flat = {}
    for name, value in config.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def paths(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Field]]:
    """Yield every key that holds a path, as (dotted name, the dataclass it belongs to, its field).

    The configurations in a list are numbered: data.parts[0].files.
    """
    for own in fields(config):
        value, name = getattr(config, own.name), prefix + own.name
        if "path" in own.metadata:
            yield name, config, own
        elif is_dataclass(value):
            yield from paths(value, f"{name}.")
        elif isinstance(value, list):
            for number, item in enumerate(value):
                if is_dataclass(item):
                    yield from paths(item, f"{name}[{number}].")


def nearest(name: str, names: list[str]) -> str:
    """A question for the end of a message, "did you mean ...?", or "" if no name is near."""
    # A key in the wrong place, such as max_steps for trainer.max_steps, counts as nearer than a similar spelling.
    same_end = [candidate for candidate in names if candidate.split(".")[-1] == name.split(".")[-1]]
    near = same_end or difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def check_choice(key: str, value: Any, choices: Collection[Any]) -> None:
    """Raise UserError for a value that is not among the choices."""
    if value not in choices:
        raise UserError(f"{key}={value} is unknown: one of {', '.join(map(str, choices))}")


def check_at_least(least: int, config: Any, section: str, *names: str) -> None:
    """Raise UserError for the first of the named fields that is set and smaller than `least`.

    Args:
        section: prefix of their keys, such as "trainer."
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and value < least:
            raise UserError(f"{section}{name}={value} must be at least {least}")
