"""Dotted keys of nested configurations: model.attention.rope_dim."""

import difflib
from dataclasses import fields, is_dataclass


def flatten(config: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} as {"a.b": 1}; lists stay whole."""
    flat = {}
    for name, value in config.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def key_names(schema: type, prefix: str = "") -> list[str]:
    """Dotted names of all keys of a dataclass of dataclasses, those that hold a value and no further keys."""
    names = []
    for field in fields(schema):
        if isinstance(field.type, type) and is_dataclass(field.type):
            names += key_names(field.type, f"{prefix}{field.name}.")
        else:
            names.append(prefix + field.name)
    return names


def nearest(name: str, names: list[str]) -> str:
    """A question for the end of a message: did you mean that one? Empty where none is near."""
    # A key in the wrong place, such as max_steps for trainer.max_steps, is nearer than one that is spelled alike.
    same_end = [candidate for candidate in names if candidate.split(".")[-1] == name.split(".")[-1]]
    near = same_end or difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else ""
