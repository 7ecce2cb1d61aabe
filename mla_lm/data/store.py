"""The token store: a corpus is tokenized once, into shards that later starts memory-map in an instant."""

import contextlib
import fcntl
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from mla_lm.data.config import DataConfig, TokenizerConfig
from mla_lm.data.corpus import SPLITS, Source
from mla_lm.data.hashes import hash_file, hash_text
from mla_lm.data.shards import Tokens
from mla_lm.data.sources import open_source
from mla_lm.data.store_builder import build_store
from mla_lm.data.tokenizer import build_tokenizer, load_tokenizer, tokenizer_hash, vocabulary_size
from mla_lm.errors import UserError
from mla_lm.files import read_text
from mla_lm.terminal.plain_text import say

VERSION = "1"  # raise it when the code changes the tokens of the same corpus and tokenizer config
META_BYTES = 2**26  # largest meta.json: 400,000 shards


@dataclass(frozen=True)
class TokenStore:
    """An open token store, or a mixture of several."""

    tokenizer: Tokenizer  # the tokenizer that made its tokens
    end_of_text_id: int  # id of the token after every document
    fingerprint: str  # hex hash of the files' contents, the split rule and the tokenizer
    description: str  # the corpus in words
    skipped: list[str]  # files that could not be decoded
    counts: dict[str, int]  # tokens of each split (train, validation, test), including end-of-text
    text_bytes: dict[str, int]  # UTF-8 bytes of each split's text
    shards: dict[str, list[Path]]
    hashes: dict[str, tuple[str, ...]]  # of the shards of each split; equal ones hold the same tokens
    dtype: str  # of the tokens in the shards
    mixed: tuple[tuple[float, "TokenStore"], ...] = ()

    def tokens(self, split: str) -> Tokens:
        """All tokens of a split; in a mixture, those of its parts one after another."""
        return Tokens(self.shards[split], self.dtype, vocabulary_size(self.tokenizer))

    @property
    def parts(self) -> tuple[tuple[float, "TokenStore"], ...]:
        """The weights and stores that training mixes; this store alone if it is not a mixture."""
        return self.mixed or ((1.0, self),)


def open_corpus_store(config: DataConfig, tokenizer: Tokenizer | None = None) -> TokenStore:
    """Open the token store of the one corpus that `config` names, from the cache; build it if needed.

    If several processes call this at once, one builds and the others wait. A store that no longer holds what was
    written to it is built again. An interrupted build leaves only a draft, from which the next start continues.

    Args:
        tokenizer: replaces the one that `config.tokenizer` describes, for instance by that of an earlier run

    Raises:
        UserError: the files, the tokenizer or the cache folder cannot be used.
    """
    source = open_source(config)
    if tokenizer is None and config.tokenizer.kind in ("file", "hub"):
        tokenizer = build_tokenizer(config.tokenizer, [])
    folder = Path(config.cache_dir).expanduser() / _key(source, config.tokenizer, tokenizer)
    if _fault(folder, source, tokenizer):
        with sole_writer(folder):
            if fault := _fault(folder, source, tokenizer):  # check again: another process may have built it meanwhile
                if folder.exists():
                    say(f"The token cache {folder} is built again: {fault}")
                build_store(folder, source, config.tokenizer, tokenizer)
    return _open_folder(folder)


def _open_folder(folder: Path) -> TokenStore:
    meta = json.loads((folder / "meta.json").read_text())
    splits = meta["splits"]
    return TokenStore(
        tokenizer=load_tokenizer(folder / "tokenizer.json"),
        end_of_text_id=meta["end_of_text_id"],
        fingerprint=hash_text(meta["source_fingerprint"], meta["tokenizer_hash"]),
        description=meta["description"],
        skipped=meta["skipped"],
        counts={split: sum(shard["tokens"] for shard in splits[split]["shards"]) for split in SPLITS},
        text_bytes={split: splits[split]["text_bytes"] for split in SPLITS},
        shards={split: [folder / shard["file"] for shard in splits[split]["shards"]] for split in SPLITS},
        hashes={split: tuple(shard["xxh3"] for shard in splits[split]["shards"]) for split in SPLITS},
        dtype=meta["dtype"],
    )


def _key(source: Source, config: TokenizerConfig, tokenizer: Tokenizer | None) -> str:
    if tokenizer is not None:
        how = tokenizer_hash(tokenizer)
    else:
        how = f"{config.kind} {config.vocab_size}" if config.kind == "bpe" else config.kind
    return hash_text(VERSION, source.fingerprint, how, f"{config.end_of_text}")


def _fault(folder: Path, source: Source, tokenizer: Tokenizer | None) -> str | None:
    """The reason why a store cannot be used; None if it holds what was written to it.

    A shard with the recorded size and modification time is trusted. If only the time differs, its hash decides. The
    store may be another user's, in a shared folder. It is only data: at worst it is wrong.
    """
    try:
        meta = json.loads(read_text(folder / "meta.json", META_BYTES))
        if tokenizer_hash(own := load_tokenizer(folder / "tokenizer.json")) != meta["tokenizer_hash"]:
            return "tokenizer.json has changed"
        if tokenizer is not None and tokenizer_hash(tokenizer) != meta["tokenizer_hash"]:
            return "it has another tokenizer"
        if meta["source_fingerprint"] != source.fingerprint:
            return "it is of another corpus"
        if fault := _contradiction(meta, vocabulary_size(own)):
            return f"its meta.json contradicts itself ({fault})"
        for shard in (shard for split in SPLITS for shard in meta["splits"][split]["shards"]):
            path = folder / shard["file"]
            status = path.stat()
            if not stat.S_ISREG(status.st_mode) or status.st_size != shard["size"]:
                return f"{path.name} has changed"
            if status.st_mtime_ns == shard["mtime_ns"]:
                continue
            if hash_file(path) != shard["xxh3"]:
                return f"{path.name} has changed"
            with contextlib.suppress(OSError):  # copied, not changed: spare the next start the hash, if possible
                os.utime(path, ns=(shard["mtime_ns"], shard["mtime_ns"]))
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        return f"it is damaged ({error})"
    return None


def _contradiction(meta: dict[str, Any], vocab_size: int) -> str | None:
    """Describe what in meta.json no build writes, since others may have written it; None if nothing."""
    if meta["dtype"] not in ("uint16", "uint32"):
        return f"tokens of {meta['dtype']}"
    if not (isinstance(meta["end_of_text_id"], int) and 0 <= meta["end_of_text_id"] < vocab_size):
        return f"end of text is {meta['end_of_text_id']} of {vocab_size}"
    if not (isinstance(meta["description"], str) and all(isinstance(name, str) for name in meta["skipped"])):
        return "words that are none"
    for split in SPLITS:
        if not (isinstance(size := meta["splits"][split]["text_bytes"], int) and size > 0):
            return f"{size} bytes of text for {split}"
        for shard in meta["splits"][split]["shards"]:
            if shard["file"] != os.path.basename(shard["file"]):
                return f"{shard['file']} is not in its folder"
            if not isinstance(shard["xxh3"], str):
                return f"{shard['file']} has {shard['xxh3']} as its hash"
            if (
                type(shard["tokens"]) is not int
                or not 0 < shard["tokens"] * np.dtype(meta["dtype"]).itemsize == shard["size"]
            ):
                return f"{shard['file']} with {shard['tokens']} tokens in {shard['size']} bytes"
    return None


@contextlib.contextmanager
def sole_writer(path: Path) -> Iterator[None]:
    """Hold the lock of the one process that may write `path`, in the cache folder; other processes wait for it.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        name = path.with_name(path.name + ".lock")
        lock = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)  # neither written nor truncated
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"Waiting for another process that builds the token cache {path}")
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)  # which releases the lock
    except OSError as error:
        raise UserError(f"data.cache_dir={path.parent} cannot be written: {error}") from error
