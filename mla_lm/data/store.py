"""The token store: a corpus is tokenized once, into memory-mapped shards that later starts open in an instant."""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from tokenizers import Tokenizer

from mla_lm.data.build import build_store
from mla_lm.data.config import MIXTURE, DataConfig, TokenizerConfig
from mla_lm.data.hashes import hash_file, hash_text
from mla_lm.data.shards import Tokens
from mla_lm.data.sources import SPLITS, Source, open_source
from mla_lm.data.tokenizer import build_tokenizer, load_tokenizer, tokenizer_hash
from mla_lm.errors import UserError
from mla_lm.plain_text import say

VERSION = "1"  # raise it when the same corpus and tokenizer config come to give other tokens


@dataclass(frozen=True)
class TokenStore:
    """An open token store, or several that are mixed."""

    tokenizer: Tokenizer  # the one its tokens were made with
    end_of_text_id: int  # the token after every document
    fingerprint: str  # hex hash of the files' contents, the split rule and the tokenizer
    description: str  # of the corpus, in words
    skipped: list[str]  # files that could not be decoded
    counts: dict[str, int]  # tokens of each split (train, validation, test), end-of-text included
    text_bytes: dict[str, int]  # UTF-8 bytes of each split's text
    shards: dict[str, list[Path]]
    dtype: str  # of the tokens in the shards
    mixed: tuple[tuple[float, "TokenStore"], ...] = ()

    def tokens(self, split: str) -> Tokens:
        """All tokens of a split; those of a mixture's parts one after another."""
        return Tokens(self.shards[split], self.dtype)

    @property
    def parts(self) -> tuple[tuple[float, "TokenStore"], ...]:
        """Weights and stores that training mixes: this one alone where it is no mixture."""
        return self.mixed or ((1.0, self),)


def open_store(config: DataConfig, tokenizer: Tokenizer | None = None) -> TokenStore:
    """The tokens of the text that `config` names: from the cache, or built now.

    Several processes may ask at once: one builds, the others wait for it. A store that does not hold what was
    written to it is built again; an interrupted build leaves none, but a draft that the next start goes on with.

    Args:
        tokenizer: takes the place of the one `config.tokenizer` describes, for instance that of an earlier run

    Raises:
        UserError: a mistake in the files, the tokenizer or the cache folder.
    """
    if config.source == MIXTURE:
        from mla_lm.data.mixture import open_mixture  # which is built on this module

        return open_mixture(config, tokenizer)
    source = open_source(config)
    if tokenizer is None and config.tokenizer.kind in ("file", "hub"):
        tokenizer = build_tokenizer(config.tokenizer, [])
    folder = Path(config.cache_dir).expanduser() / _key(source, config.tokenizer, tokenizer)
    if _fault(folder):
        with sole_writer(folder):
            if fault := _fault(folder):  # still: nobody else built it while this process waited
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
        dtype=meta["dtype"],
    )


def _key(source: Source, config: TokenizerConfig, tokenizer: Tokenizer | None) -> str:
    if tokenizer is not None:
        how = tokenizer_hash(tokenizer)
    else:
        how = f"{config.kind} {config.vocab_size}" if config.kind == "bpe" else config.kind
    return hash_text(VERSION, source.fingerprint, how, f"{config.end_of_text}")


def _fault(folder: Path) -> str | None:
    """What keeps a store from being used; None when it holds what was written to it.

    A shard with the recorded size and time of modification is trusted; with another time its contents decide.
    """
    try:
        meta = json.loads((folder / "meta.json").read_text())
        if tokenizer_hash(load_tokenizer(folder / "tokenizer.json")) != meta["tokenizer_hash"]:
            return "tokenizer.json has changed"
        shards = [shard for split in SPLITS for shard in meta["splits"][split]["shards"]]
        for shard in shards:
            path = folder / shard["file"]
            status = path.stat()
            if status.st_size == shard["size"] and status.st_mtime_ns == shard["mtime_ns"]:
                continue
            if status.st_size != shard["size"] or hash_file(path) != shard["xxh3"]:
                return f"{path.name} has changed"
            with contextlib.suppress(OSError):  # copied, not changed: if it can be, spare the next start this hash
                os.utime(path, ns=(shard["mtime_ns"], shard["mtime_ns"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"it is damaged ({error})"
    return None


@contextlib.contextmanager
def sole_writer(path: Path) -> Iterator[None]:
    """Held by the one process that may write `path`, which lies in the cache folder; others wait for it.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_name(path.name + ".lock"))
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            say(f"Waiting for another process that builds the token cache {path}")
            held = lock.acquire()
        with held:
            yield
    except OSError as error:
        raise UserError(f"data.cache_dir={path.parent} cannot be written: {error}") from error
