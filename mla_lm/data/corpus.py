"""A corpus as all that follows sees it: documents, and the split that each belongs to.

A document may come in several pieces, so that a large file is never held in memory: the rows of a source are
{"text": str, "ends": bool}, where "ends" tells that the document ends with this piece.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mla_lm.data.file_formats import import_datasets

if TYPE_CHECKING:  # importing it takes a second, which a start from cached tokens need not spend
    from datasets import IterableDataset

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Source:
    """A corpus: `documents(split)` reads it anew each time, `skipped()` names the files that cannot be decoded."""

    description: str
    fingerprint: str  # hex; changes with any byte of the files, the column, and the rule that splits them
    documents: Callable[[str], Iterable[dict]]  # rows {"text": str, "ends": bool}
    skipped: Callable[[], list[str]] = list


def split_of(key: str) -> str:
    """The split that a hash of `key` falls into: 90% train, 5% validation, 5% test."""
    position = int(hashlib.sha256(key.encode()).hexdigest(), 16) % 100
    return "train" if position < 90 else "validation" if position < 95 else "test"


def as_dataset(read: Callable[..., Iterable[dict]], **arguments: object) -> "IterableDataset":
    """Rows that `read` yields, as the `datasets` library has them."""
    # a list would be taken for shards, and `read` be called once for each of its items
    arguments = {name: tuple(value) if isinstance(value, list) else value for name, value in arguments.items()}
    return import_datasets().IterableDataset.from_generator(read, gen_kwargs=arguments)
