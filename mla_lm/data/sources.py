"""Where text comes from. A source is one function here that returns a `Source`; all that follows sees documents only.

A document may come in several pieces, so that a large file is never held in memory: the rows of a source are
{"text": str, "ends": bool}, where "ends" tells that the document ends with this piece.
"""

import functools
import glob
import hashlib
import os
import sysconfig
import tokenize
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mla_lm.data.config import DataConfig
from mla_lm.data.hashes import content_hashes, hash_text
from mla_lm.data.text_files import check_format, import_datasets, is_plain, read_file, read_plain
from mla_lm.errors import UserError

if TYPE_CHECKING:  # importing it takes a second, which a start from cached tokens need not spend
    from datasets import IterableDataset

SPLITS = ("train", "validation", "test")
LEFT_OUT_OF_STDLIB = {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages", "__pycache__"}
FEW_DOCUMENTS = 200  # from here on, a split of 5% of the documents by hash is as good as never empty


@dataclass(frozen=True)
class Source:
    """A corpus: `documents(split)` reads it anew each time, `skipped()` names the files that cannot be decoded."""

    description: str
    fingerprint: str  # hex; changes with any byte of the files, the column, and the rule that splits them
    documents: Callable[[str], Iterable[dict]]  # rows {"text": str, "ends": bool}
    skipped: Callable[[], list[str]] = list


def open_source(config: DataConfig) -> Source:
    """Find and hash the files of `config`; nothing is decoded yet.

    Raises:
        UserError: files that are missing, empty, or of an unknown format; a dataset that cannot be had. Text that
            cannot be decoded, invalid JSON and missing columns are found, and raised as `UserError`, while the
            documents are read.
    """
    memory = Path(config.cache_dir).expanduser() / "hashes.json"
    if config.source == "python_stdlib":
        return python_stdlib(memory)
    if config.source == "text":
        return text_files(config.files, config.column, memory)
    if config.source == "hub":
        from mla_lm.data.hub import hub_dataset  # which is built on this module

        return hub_dataset(config)
    return character_file(config.files, memory)


# Python's standard library


def python_stdlib(memory: Path, root: str | Path | None = None) -> Source:
    """The *.py files under `root` (the running interpreter's standard library), tests and codec tables left out.

    A file is a document; the SHA-256 of its path relative to `root` puts it into a split, 90/5/5. Files that cannot be
    decoded as they declare (PEP 263) are in `skipped()`; empty ones are left out.
    """
    root = Path(root or sysconfig.get_path("stdlib"))
    names = sorted(path.relative_to(root).as_posix() for path in _python_files(root))
    if not names:
        raise UserError(f"no *.py file of Python's standard library is in {root}: choose data=text instead")
    hashes = content_hashes([root / name for name in names], memory)
    return Source(
        description=f"Python standard library, {len(names)} files in {root}",
        fingerprint=hash_text("python_stdlib: sha256 of the path 90/5/5", *names, *hashes),
        documents=lambda split: _dataset(_read_stdlib, root=str(root), names=names, split=split),
        skipped=lambda: [name for name in names if _decode_python(root / name) is None],
    )


def _python_files(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in LEFT_OUT_OF_STDLIB]  # os.walk goes into the rest only
        yield from (Path(folder, name) for name in files if name.endswith(".py"))


def _read_stdlib(root: str, names: list[str], split: str) -> Iterator[dict]:
    for name in names:
        if split_of(name) == split and (text := _decode_python(Path(root, name))):
            yield {"text": text, "ends": True}


def _decode_python(path: Path) -> str | None:
    """Text of a Python file in the encoding it declares; None when that fails."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError):  # SyntaxError: an unknown encoding
        return None


# a user's files


def text_files(files: str | list[str], column: str, memory: Path) -> Source:
    """A user's files: plain text of any name, .jsonl, .json and .parquet; .gz of all but the last.

    A plain text file is a document, and so is every row of the others (null and empty ones left out). With 200 or
    more documents a hash of its content puts each into a split, 90/5/5: duplicates stay together, and documents added
    later move no other. Fewer are cut by position, files in the order of their paths: the first 90% of all
    characters, the next 5%, the rest.
    """
    paths = find_files(files)
    for path in paths:
        check_format(path)
    hashes = content_hashes(paths, memory)
    # read once, when documents are first asked for: not at all where tokens are cached
    characters = functools.cache(lambda: _characters_of_few(paths, column))

    def documents(split: str) -> "IterableDataset":
        if characters() is None:
            return _dataset(_read_by_hash, paths=paths, hashes=hashes, column=column, split=split)
        shares = {"train": (0, 0.9), "validation": (0.9, 0.95), "test": (0.95, 1)}[split]
        return _dataset(_read_by_position, paths=paths, column=column, characters=characters(), shares=shares)

    return Source(
        description=f"{len(paths)} text file{'s' * (len(paths) > 1)}: {files}",
        fingerprint=hash_text(
            f"text: sha256 of the document 90/5/5, by position under {FEW_DOCUMENTS}; column {column}",
            *(f"{'text' if is_plain(path) else 'rows'} {content}" for path, content in zip(paths, hashes, strict=True)),
        ),
        documents=documents,
    )


def find_files(files: str | list[str]) -> list[Path]:
    """Absolute paths of the files that a path or glob, or a list of them, names: each once, sorted."""
    found = set()
    for pattern in [files] if isinstance(files, str) else files:
        expanded = Path(str(pattern)).expanduser()
        matches = [expanded] if expanded.exists() else map(Path, glob.glob(str(expanded), recursive=True))
        matches = {Path(os.path.abspath(path)) for path in matches if path.is_file()}  # links keep their names
        if not matches and expanded.is_dir():
            raise UserError(
                f"data.files={pattern} is a folder: name its files, for example data.files='{pattern}/*.txt'"
            )
        if not matches:
            raise UserError(f"data.files={pattern} matches no file (looked in {Path.cwd()})")
        found |= matches
    for path in sorted(found):
        if path.stat().st_size == 0:
            raise UserError(f"{path} is empty: leave it out of data.files")
    return sorted(found)


def _characters_of_few(paths: list[Path], column: str) -> int | None:
    """Characters in all documents when there are few; None when there are many."""
    documents = characters = 0
    for path in paths:
        for text, ends in read_file(path, column):
            characters += len(text)
            documents += ends
            if documents >= FEW_DOCUMENTS:
                return None
    return characters


def _read_by_hash(paths: list[Path], hashes: list[str], column: str, split: str) -> Iterator[dict]:
    for path, content in zip(paths, hashes, strict=True):
        if is_plain(path) and split_of(content) != split:
            continue
        for text, ends in read_file(path, column):
            if is_plain(path) or split_of(text) == split:
                yield {"text": text, "ends": ends}


def _read_by_position(paths: list[Path], column: str, characters: int, shares: tuple[float, float]) -> Iterator[dict]:
    return cut((piece for path in paths for piece in read_file(path, column)), characters, shares)


def cut(pieces: Iterable[tuple[str, bool]], characters: int, shares: tuple[float, float]) -> Iterator[dict]:
    """The part of all `characters` between two shares of them; a document ends where the part does."""
    first, last = (int(characters * share) for share in shares)
    position = 0
    for text, ends in pieces:
        part = text[max(0, first - position) : max(0, last - position)]
        position += len(text)
        if part:
            yield {"text": part, "ends": ends or position >= last}


# one file of characters


def character_file(files: str | list[str], memory: Path) -> Source:
    """One plain text file, the first 90% of its characters for training, as nanoGPT splits tiny Shakespeare.

    There is no third part there: the test split is the validation split.
    """
    paths = find_files(files)
    if len(paths) != 1 or not is_plain(paths[0]):
        raise UserError(
            f"data=characters takes one plain text file, not data.files={files}: choose data=text for others"
        )
    check_format(paths[0])
    characters = functools.cache(lambda: sum(len(text) for text, _ in read_plain(paths[0])))

    def documents(split: str) -> "IterableDataset":
        shares = (0, 0.9) if split == "train" else (0.9, 1)
        return _dataset(_read_by_position, paths=paths, column="", characters=characters(), shares=shares)

    return Source(
        description=f"characters of {paths[0]}",
        fingerprint=hash_text("characters: by position 90/10", *content_hashes(paths, memory)),
        documents=documents,
    )


# shared


def split_of(key: str) -> str:
    """The split that a hash of `key` falls into: 90% train, 5% validation, 5% test."""
    position = int(hashlib.sha256(key.encode()).hexdigest(), 16) % 100
    return "train" if position < 90 else "validation" if position < 95 else "test"


def _dataset(read: Callable[..., Iterable[dict]], **arguments: object) -> "IterableDataset":
    # a list would be taken for shards, and `read` be called once for each of its items
    arguments = {name: tuple(value) if isinstance(value, list) else value for name, value in arguments.items()}
    return import_datasets().IterableDataset.from_generator(read, gen_kwargs=arguments)
