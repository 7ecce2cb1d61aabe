"""A corpus: documents, each of which belongs to a split.

A document may come in several pieces, so that a large file is never held in memory. A source yields rows
{"text": str, "ends": bool}; "ends" is true for the last piece of a document.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mla_lm.data.file_formats import import_datasets

if TYPE_CHECKING:  # importing it takes a second, which a start from cached tokens can save
    from datasets import IterableDataset

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Source:
    """A corpus. `documents(split)` reads it anew at each call; `skipped()` names the files that cannot be decoded."""

    description: str
    fingerprint: str  # hex hash of the files' contents, the column and the split rule
    documents: Callable[[str], Iterable[dict]]  # rows {"text": str, "ends": bool}
    skipped: Callable[[], list[str]] = list


def split_of(key: str) -> str:
    """The split of a document, chosen by a hash of `key`: 90% train, 5% validation, 5% test."""
    position = int(hashlib.sha256(key.encode()).hexdigest(), 16) % 100
    return "train" if position < 90 else "validation" if position < 95 else "test"


def as_dataset(read: Callable[..., Iterable[dict]], **arguments: object) -> "IterableDataset":
    """Wrap the rows that `read(**arguments)` yields as a dataset of the `datasets` library."""
    # `datasets` takes a list for shards and would call `read` once for each of its items
    arguments = {name: tuple(value) if isinstance(value, list) else value for name, value in arguments.items()}
    return import_datasets().IterableDataset.from_generator(read, gen_kwargs=arguments)
