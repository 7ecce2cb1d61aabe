"""A user's own files as a corpus: documents of any formats, or one file of characters."""

import functools
import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mla_lm.data.corpus import Source, as_dataset, split_of
from mla_lm.data.file_formats import check_format, is_plain, read_file, read_plain
from mla_lm.data.hashes import content_hashes, hash_text
from mla_lm.errors import UserError

if TYPE_CHECKING:
    from datasets import IterableDataset

FEW_DOCUMENTS = 200  # from here on, a split of 5% of the documents by hash is as good as never empty


def text_files(files: str | list[str], column: str, memory: Path) -> Source:
    """A user's files: plain text of any name, .jsonl, .json and .parquet; .gz of all but the last.

    A plain text file is a document, and so is every row of the others (null and empty ones left out). With 200 or
    more documents a hash of its content puts each into a split, 90/5/5: duplicates stay together, and documents added
    later move no other. Fewer are cut by position, files in the order of their paths: the first 90% of all
    characters, the next 5%, the rest.
    """
    paths, empty = find_files(files)
    for path in paths:
        check_format(path)
    hashes = content_hashes(paths, memory)
    # read once, when documents are first asked for: not at all where tokens are cached
    characters = functools.cache(lambda: _characters_of_few(paths, column))

    def documents(split: str) -> "IterableDataset":
        if characters() is None:
            return as_dataset(_read_by_hash, paths=paths, hashes=hashes, column=column, split=split)
        shares = {"train": (0, 0.9), "validation": (0.9, 0.95), "test": (0.95, 1)}[split]
        return as_dataset(_read_by_position, paths=paths, column=column, characters=characters(), shares=shares)

    left_out = f"; {empty} empty one{'s' * (empty > 1)} left out" if empty else ""
    return Source(
        description=f"{len(paths)} text file{'s' * (len(paths) > 1)}: {files}{left_out}",
        fingerprint=hash_text(
            f"text: sha256 of the document 90/5/5, by position under {FEW_DOCUMENTS}; column {column}",
            *(f"{'text' if is_plain(path) else 'rows'} {content}" for path, content in zip(paths, hashes, strict=True)),
        ),
        documents=documents,
    )


def find_files(files: str | list[str]) -> tuple[list[Path], int]:
    """The files that a path or glob, or a list of them, names, and how many empty ones of the globs are left out.

    Returns:
        absolute paths, each once, sorted; and the number of files that are empty

    Raises:
        UserError: there is no such file, a path names an empty one, or a glob matches no others.
    """
    found: set[Path] = set()
    empty: set[Path] = set()
    for pattern in [files] if isinstance(files, str) else files:
        expanded = Path(str(pattern)).expanduser()
        is_path = expanded.exists()
        matches = [expanded] if is_path else map(Path, glob.glob(str(expanded), recursive=True))
        matches = {Path(os.path.abspath(path)) for path in matches if path.is_file()}  # links keep their names
        if not matches and expanded.is_dir():
            raise UserError(
                f"data.files={pattern} is a folder: name its files, for example data.files='{pattern}/*.txt'"
            )
        if not matches:
            raise UserError(f"data.files={pattern} matches no file (looked in {Path.cwd()})")
        filled = {path for path in matches if path.stat().st_size}
        if not filled and is_path:
            raise UserError(f"{expanded} is empty: leave it out of data.files")
        if not filled:
            raise UserError(f"data.files={pattern} matches only empty files ({len(matches)})")
        found |= filled
        empty |= matches - filled
    return sorted(found), len(empty)


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


def character_file(files: str | list[str], memory: Path) -> Source:
    """One plain text file, the first 90% of its characters for training, as nanoGPT splits tiny Shakespeare.

    There is no third part there: the test split is the validation split.
    """
    paths, _ = find_files(files)
    if len(paths) != 1 or not is_plain(paths[0]):
        raise UserError(
            f"data=characters takes one plain text file, not data.files={files}: choose data=text for others"
        )
    check_format(paths[0])
    characters = functools.cache(lambda: sum(len(text) for text, _ in read_plain(paths[0])))

    def documents(split: str) -> "IterableDataset":
        shares = (0, 0.9) if split == "train" else (0.9, 1)
        return as_dataset(_read_by_position, paths=paths, column="", characters=characters(), shares=shares)

    return Source(
        description=f"characters of {paths[0]}",
        fingerprint=hash_text("characters: by position 90/10", *content_hashes(paths, memory)),
        documents=documents,
    )
