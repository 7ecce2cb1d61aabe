"""Datasets of the Hugging Face Hub, or of a folder laid out like one, through `datasets`.

Which commit a dataset's name stands for, and which splits it has, is looked up once and kept in `hub.json` beside the
token stores: a later start with the same `data.path`, `data.name` and `data.revision` reads the same commit, and with
cached tokens it needs neither the network nor `datasets`.
"""

import contextlib
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mla_lm.data.config import CorpusConfig, DataConfig
from mla_lm.data.corpus import SPLITS, Source, split_of
from mla_lm.data.file_formats import PIECE, ROWS, column_values, import_datasets
from mla_lm.data.hashes import content_hashes, hash_text, remembered
from mla_lm.data.hub_errors import explained
from mla_lm.data.network import from_cache_only, reach_hub
from mla_lm.errors import UserError
from mla_lm.files import write_atomically

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder, DatasetDict, IterableDataset, IterableDatasetDict


def hub_dataset(config: DataConfig) -> Source:
    """The dataset that `config` names; a row is a document, or with `data.lines` a line of its split's one document.

    A validation or test split that the dataset lacks is carved from its training split, by the hash of the document.

    Raises:
        UserError: it is unknown, or not cached and there is no network; it has no such configuration or split. A
            missing column, and one that is not text, are found while the documents are read.
    """
    cache = Path(config.cache_dir).expanduser()
    folder = _folder(config)
    content = _content(folder, cache) if folder else None
    commit, there = _look_up(config, content, cache / "hub.json")
    own = _own_splits(config, there)
    rule = ", ".join(_in_words(split, name) for split, name in own.items())
    if config.lines:
        rule += "; rows are lines"
    if config.max_characters:
        rule += f"; the first {config.max_characters:,} characters"
    name = f"{config.path}{f' {config.name}' if config.name else ''}{'' if content else f' at {commit}'}"
    return Source(
        description=f"{name}: {rule}",
        fingerprint=hash_text(
            f"hub: {rule}", "" if content else _path(config), config.name or "", commit, config.column
        ),
        documents=lambda split: _documents(config, commit, own, split),
    )


def _in_words(split: str, name: str | None) -> str:
    if name is None:
        return f"{split} carved from train (5% by sha256 of the text)"
    return split if name == split else f"{split}={name}"


def _path(config: CorpusConfig) -> str:
    """data.path, which `CorpusConfig.check` has seen to be there."""
    assert config.path is not None
    return config.path


def _folder(config: CorpusConfig) -> Path | None:
    folder = Path(_path(config)).expanduser()
    return folder if folder.is_dir() else None


def _content(folder: Path, cache: Path) -> str:
    """Hash of the files of a dataset in a folder, hidden ones apart, which `datasets` does not read either."""
    names = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    names = sorted(name for name in names if not any(part.startswith((".", "__")) for part in name.parts))
    hashes = content_hashes([folder / name for name in names], cache / "hashes.json")
    return hash_text(*(name.as_posix() for name in names), *hashes)


# the commit and the splits


def _look_up(config: CorpusConfig, content: str | None, memory: Path) -> tuple[str, list[str]]:
    """Commit (of a folder: the hash of its content) and split names; asked once, then known from `memory`."""
    known = remembered(memory)
    key = f"{config.path} {config.name} {content or config.revision}"
    if not _is_answer(known.get(key)):
        with _network(config), explained(config):
            builder = _builder(config, config.revision)
            known[key] = {"commit": content or builder.hash, "splits": list(builder.as_streaming_dataset())}
        text = json.dumps(known, indent=1)
        with contextlib.suppress(UserError):  # not remembered: the next start asks again
            write_atomically(memory, lambda file: file.write(text.encode()))
    return known[key]["commit"], known[key]["splits"]


def _is_answer(entry: Any) -> bool:
    """Whether it is what `_look_up` remembers: others may have written the file."""
    known = isinstance(entry, dict) and isinstance(entry.get("commit"), str) and isinstance(entry.get("splits"), list)
    return known and all(isinstance(split, str) for split in entry["splits"])


def _own_splits(config: CorpusConfig, there: list[str]) -> dict[str, str | None]:
    """The dataset's split that each of ours is; None where it is carved."""
    own = {split: getattr(config.splits, split) or (split if split in there else None) for split in SPLITS}
    for split, name in own.items():
        if name is not None and name not in there:
            raise UserError(
                f"{config.path} has no split {name}: set data.splits.{split} to one of {', '.join(there)}"
                + ("" if split == "train" else ", or to null to carve one where it has none")
            )
        if name is None and config.lines:
            raise UserError(
                f"{config.path} has no {split} split, and lines of a text (data.lines) are not carved: "
                f"set data.splits.{split} to one of {', '.join(there)}"
            )
    return own


# reading


def _documents(config: CorpusConfig, commit: str, own: dict[str, str | None], split: str) -> Iterator[dict]:
    values = _values(config, commit, own[split] or own["train"] or "train")
    if config.lines:
        return _one_document(values)
    return ({"text": text, "ends": True} for text in values if text and _is_in(text, split, own))


def _is_in(text: str, split: str, own: dict[str, str | None]) -> bool:
    """Whether a document belongs to `split`, of those in the dataset's split that it is read from."""
    if split != "train" and own[split]:
        return True
    drawn = split_of(text)
    return split == ("train" if own[drawn] else drawn)


def _one_document(lines: Iterable[str]) -> Iterator[dict]:
    """Rows that are lines, put together; one without a line end is given one, so an empty row is a blank line."""
    piece, characters = [], 0
    for line in lines:
        piece.append(line if line.endswith("\n") else line + "\n")
        characters += len(piece[-1])
        if characters >= PIECE:
            yield {"text": "".join(piece), "ends": False}
            piece, characters = [], 0
    yield {"text": "".join(piece), "ends": True}


def _values(config: CorpusConfig, commit: str, split: str) -> Iterator[str]:
    """Values of the column, whole or up to `max_characters`, from the disk."""
    datasets = import_datasets()
    with _network(config), explained(config):
        if config.max_characters:
            # kept by `datasets`, so that the network is read once, not once for each pass over the text
            asked = CorpusConfig(
                path=config.path, name=config.name, column=config.column, max_characters=config.max_characters
            )
            arguments = {"config": asked, "commit": commit, "split": split}
            rows = datasets.Dataset.from_generator(_beginning, gen_kwargs=arguments)
            return column_values(rows.iter(ROWS), "text", _path(config))
        builder = _builder(config, commit)
        if _folder(config):  # as they are: what `datasets` prepares of folders of the same name it confuses
            return _column(_streamed(builder, split), config)
        builder.download_and_prepare()
        return _column(cast("DatasetDict", builder.as_dataset())[split], config)


def _beginning(config: CorpusConfig, commit: str, split: str) -> Iterator[dict[str, str]]:
    """Streams whole documents until there are `max_characters`; nothing beyond them is downloaded."""
    assert config.max_characters is not None
    characters = 0
    for text in _column(_streamed(_builder(config, commit), split), config):
        yield {"text": text}
        characters += len(text)
        if characters >= config.max_characters:
            return


def _streamed(builder: "DatasetBuilder", split: str) -> "IterableDataset":
    return cast("IterableDatasetDict", builder.as_streaming_dataset())[split]


def _column(rows: "Dataset | IterableDataset", config: CorpusConfig) -> Iterator[str]:
    names = rows.column_names  # None where they show only in the rows
    if names and config.column in names:
        rows = rows.select_columns([config.column])  # the others need not be decoded
    return column_values(_batches(rows, config), config.column, _path(config), names)


def _batches(rows: "Dataset | IterableDataset", config: CorpusConfig) -> Iterator[dict[str, list]]:
    with explained(config):
        yield from cast("Iterator[dict[str, list]]", rows.iter(ROWS))


def _builder(config: CorpusConfig, commit: str | None) -> "DatasetBuilder":
    datasets = import_datasets()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    if folder := _folder(config):
        return datasets.load_dataset_builder(str(folder), config.name)
    builder = datasets.load_dataset_builder(config.path, config.name, revision=commit)
    from datasets.packaged_modules.cache.cache import Cache

    if isinstance(builder, Cache) and commit not in (None, builder.hash):  # `datasets` takes any it has
        raise UserError(
            f"{config.path} is cached at commit {builder.hash}, but not at {commit}, and that cannot be fetched now:\n"
            f"  data.revision={builder.hash} takes what is there"
        )
    return builder


@contextlib.contextmanager
def _network(config: CorpusConfig) -> Iterator[None]:
    """Where the Hub cannot be reached, only the cache is looked at."""
    if _folder(config):
        yield
        return
    reached = reach_hub()
    import_datasets()  # takes a second, in which the Hub may answer
    with from_cache_only(not reached()):
        yield
