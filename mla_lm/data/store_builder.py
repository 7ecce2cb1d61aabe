"""Builds a token store: reads a corpus, tokenizes it, and continues an interrupted build where it stopped."""

import itertools
import json
import os
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from mla_lm.data.config import TokenizerConfig
from mla_lm.data.corpus import SPLITS, Source
from mla_lm.data.hashes import hash_file
from mla_lm.data.shards import ShardWriter
from mla_lm.data.tokenizer import (
    build_tokenizer,
    encode_batch,
    end_of_text_id,
    load_tokenizer,
    token_bytes,
    tokenizer_hash,
    vocabulary_size,
)
from mla_lm.errors import UserError
from mla_lm.files import open_own, sync_folder, write_atomically
from mla_lm.terminal.plain_text import say

SHARD_TOKENS = 2**27
BATCH_CHARACTERS = 2**20  # tokenized at once on all cores, with up to a few hundred MB of memory
JOURNAL_BYTES = 2**26  # of text between saves, so the most that a killed build has to repeat
SECONDS_PER_LINE = 30.0  # between lines of progress, where no terminal shows a bar


def build_store(folder: Path, source: Source, config: TokenizerConfig, tokenizer: Tokenizer | None = None) -> None:
    """Tokenize a corpus into a store at `folder`. It is built as a draft beside it, and moved there once complete.

    The draft's meta.json is its journal. It records how many rows of the source are done and how long each shard was at
    that time. So a build that was killed, or that found the disk full, continues as if it had not stopped.

    Args:
        tokenizer: replaces the one that `config` describes

    Raises:
        UserError: the text or the tokenizer cannot be used, and the draft is removed; or the disk fails, and the draft
            is kept.
    """
    draft = folder.with_name(folder.name + ".tmp")
    say(f"Tokenizing {source.description}")
    try:
        meta, tokenizer = _go_on(draft, source, tokenizer) or _begin(draft, source, config, tokenizer)
        for split in SPLITS:
            _tokenize_split(draft, split, source, tokenizer, meta)
        shutil.rmtree(folder, ignore_errors=True)
        draft.chmod(stat.S_IMODE(draft.stat().st_mode) | _usual_mode())
        os.rename(draft, folder)
        sync_folder(folder.parent)
    except UserError as error:
        if not isinstance(error.__cause__, OSError):
            shutil.rmtree(draft, ignore_errors=True)
        raise
    _report(meta)


def _begin(draft: Path, source: Source, config: TokenizerConfig, tokenizer: Tokenizer | None) -> tuple[dict, Tokenizer]:
    """Make a new draft with its tokenizer; return the content of its meta.json, and the tokenizer.

    Only this user can write the draft, so nobody else can put links into it, even if the folder above is shared.
    """
    if draft.is_symlink() or draft.is_file():
        draft.unlink()
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(mode=0o700)
    if tokenizer is None:
        splits = SPLITS if config.kind == "characters" else ("train",)
        tokenizer = build_tokenizer(config, (row["text"] for split in splits for row in source.documents(split)))
    write_atomically(draft / "tokenizer.json", lambda file: file.write(tokenizer.to_str(pretty=True).encode()))
    meta = {
        "description": source.description,
        "source_fingerprint": source.fingerprint,
        "skipped": source.skipped(),
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "end_of_text_id": end_of_text_id(tokenizer, config.end_of_text),
        "dtype": "uint16" if vocabulary_size(tokenizer) <= 2**16 else "uint32",
        "splits": {
            split: {"rows": 0, "text_bytes": 0, "token_bytes": 0, "shards": [], "whole": False} for split in SPLITS
        },
    }
    _save(draft, meta)
    return meta, tokenizer


def _go_on(draft: Path, source: Source, tokenizer: Tokenizer | None) -> tuple[dict, Tokenizer] | None:
    """Cut an interrupted build back to what its meta.json records, and return that; None if it is of no use."""
    try:
        if not _is_own(draft):
            return None
        meta = json.loads((draft / "meta.json").read_text())
        drafted = load_tokenizer(draft / "tokenizer.json")
        wanted = meta["tokenizer_hash"] if tokenizer is None else tokenizer_hash(tokenizer)
        if not meta["tokenizer_hash"] == tokenizer_hash(drafted) == wanted:
            return None
        if meta["source_fingerprint"] != source.fingerprint:
            return None
        shards = {shard["file"]: shard for split in SPLITS for shard in meta["splits"][split]["shards"]}
        for path in draft.iterdir():
            if path.name in shards:
                with open_own(path, "r+b") as file:
                    file.truncate(shards[path.name]["size"])
                shards[path.name]["mtime_ns"] = path.stat().st_mtime_ns
            elif path.name not in ("meta.json", "tokenizer.json"):
                path.unlink()
        if any(hash_file(draft / name) != shard["xxh3"] for name, shard in shards.items()):
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    done = [f"{part['text_bytes'] / 1e6:,.1f} MB of {split}" for split, part in meta["splits"].items() if part["rows"]]
    print(f"Going on with an interrupted build, after {', '.join(done) or 'its tokenizer'}")
    return meta, drafted


def _is_own(draft: Path) -> bool:
    """Whether the draft is a folder, not a link, that only this user can write."""
    status = draft.lstat()
    own = status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return own and stat.S_ISDIR(status.st_mode)


def _usual_mode() -> int:
    """The mode of a new folder under the present umask, which can only be read by setting it."""
    umask = os.umask(0o077)
    os.umask(umask)
    return 0o777 & ~umask


def _save(draft: Path, meta: dict) -> None:
    write_atomically(draft / "meta.json", lambda file: file.write(json.dumps(meta, indent=1).encode()))


def _tokenize_split(draft: Path, split: str, source: Source, tokenizer: Tokenizer, meta: dict) -> None:
    """Tokenize the rest of a split into shards, and keep its entry in meta.json up to date."""
    done = meta["splits"][split]
    if done["whole"]:
        return
    writer = ShardWriter(draft, split, meta["dtype"], SHARD_TOKENS, done["shards"])
    length_of = token_bytes(tokenizer)
    saved = done["text_bytes"]
    rows = itertools.islice(source.documents(split), done["rows"], None)
    with _progress(f"tokenizing {split}", saved) as bar:
        for batch in _batches(rows):
            tokens = _tokens(batch, tokenizer, meta["end_of_text_id"])
            writer.write(tokens)
            size = sum(len(row["text"].encode()) for row in batch)
            done["rows"] += len(batch)
            done["text_bytes"] += size  # UTF-8 bytes of the text; the next line has those of its tokens
            done["token_bytes"] += int(length_of[tokens].sum())
            bar.update(size)
            if done["text_bytes"] - saved >= JOURNAL_BYTES:
                writer.sync()
                _save(draft, meta)
                saved = done["text_bytes"]
    _check(split, done, source)
    writer.sync()
    done["whole"] = True
    _save(draft, meta)


def _batches(rows: Iterable[dict]) -> Iterator[list[dict]]:
    batch, characters = [], 0
    for row in rows:
        batch.append(row)
        characters += len(row["text"])
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _tokens(rows: list[dict], tokenizer: Tokenizer, end_of_text_id: int) -> np.ndarray:
    """Tokenize rows, (count,), with the end-of-text token after each row that ends its document."""
    pieces = []
    for row, ids in zip(rows, encode_batch(tokenizer, [row["text"] for row in rows]), strict=True):
        pieces.append(np.array([*ids, end_of_text_id] if row["ends"] else ids, dtype=np.int64))
    return np.concatenate(pieces)


def _progress(what: str, done: int) -> tqdm:
    """A progress bar on a terminal; elsewhere a line on stdout from time to time, for log files."""
    if sys.stderr.isatty():
        return tqdm(desc=what, initial=done, unit="B", unit_scale=True)
    return tqdm(
        desc=what, initial=done, unit="B", unit_scale=True, file=sys.stdout, miniters=1,
        delay=SECONDS_PER_LINE, mininterval=SECONDS_PER_LINE, bar_format="{desc}: {n_fmt}{unit} of text, {rate_fmt}\n",
    )  # fmt: skip


def _check(split: str, done: dict, source: Source) -> None:
    if done["text_bytes"] == 0:
        raise UserError(
            f"no text for the {split} split in {source.description}: it is too short, give more of it; "
            "train, validation and test all need some"
        )
    # a few spaces added before texts are fine, lost text is not
    if abs(done["token_bytes"] / done["text_bytes"] - 1) > 0.05:
        raise UserError(
            f"the tokenizer does not keep the text ({done['text_bytes']} bytes become {done['token_bytes']}), so bits "
            "per byte would be wrong: use a byte-level one, or data.tokenizer.kind=bpe"
        )


def _report(meta: dict) -> None:
    if skipped := meta["skipped"]:
        say(f"{len(skipped)} files could not be decoded and are left out: {', '.join(skipped[:5])}")
    for split, part in meta["splits"].items():
        tokens = sum(shard["tokens"] for shard in part["shards"])
        print(f"{split}: {tokens:,} tokens, {part['text_bytes'] / tokens:.2f} bytes per token")
