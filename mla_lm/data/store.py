"""The token store: a corpus is tokenized once, into memory-mapped shards that later starts open in an instant."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import xxhash
from filelock import AcquireReturnProxy, FileLock, Timeout
from tokenizers import Tokenizer
from tqdm import tqdm

from mla_lm.data.config import DataConfig, TokenizerConfig
from mla_lm.data.hashes import hash_file, hash_text
from mla_lm.data.sources import SPLITS, Source, open_source
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

VERSION = "1"  # raise it when the same corpus and tokenizer config come to give other tokens
SHARD_TOKENS = 2**27
BATCH_CHARACTERS = 2**20  # tokenized at once, on all cores, in up to a few hundred MB of memory


class Tokens:
    """The tokens of one split: `len()`, and slices that are arrays of unsigned integers, across shards.

    Pickled by path, so that a worker process maps the files anew instead of being sent their contents.
    """

    def __init__(self, paths: list[Path], dtype: str):
        self.paths, self.dtype = paths, dtype
        self.shards = [np.asarray(np.memmap(path, dtype=dtype, mode="r")) for path in paths]
        self.starts = np.cumsum([0, *map(len, self.shards)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(len(self))  # windows never ask for a step
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        last = int(np.searchsorted(self.starts, stop, side="left"))
        pieces = [
            shard[max(0, start - begin) : max(0, stop - begin)]
            for shard, begin in zip(self.shards[first:last], self.starts[first:last], strict=True)
        ]
        return np.concatenate(pieces) if pieces else np.empty(0, self.dtype)

    def __reduce__(self) -> tuple:
        return Tokens, (self.paths, self.dtype)


class TokenStore:
    """An open token store.

    Attributes:
        tokenizer: the one its tokens were made with
        end_of_text_id: the token after every document
        fingerprint: hex hash of the files' contents, the split rule and the tokenizer
        description: of the corpus, in words
        counts: tokens of each split (train, validation, test), end-of-text included
        text_bytes: UTF-8 bytes of each split's text
        skipped: files that could not be decoded
    """

    def __init__(self, folder: Path):
        meta = json.loads((folder / "meta.json").read_text())
        self.folder = folder
        self.tokenizer = load_tokenizer(folder / "tokenizer.json")
        self.end_of_text_id: int = meta["end_of_text_id"]
        self.fingerprint = hash_text(meta["source_fingerprint"], meta["tokenizer_hash"])
        self.description: str = meta["description"]
        self.skipped: list[str] = meta["skipped"]
        self.counts = {split: sum(shard["tokens"] for shard in meta["splits"][split]["shards"]) for split in SPLITS}
        self.text_bytes = {split: meta["splits"][split]["text_bytes"] for split in SPLITS}
        self._files = {split: [shard["file"] for shard in meta["splits"][split]["shards"]] for split in SPLITS}
        self._dtype = meta["dtype"]

    def tokens(self, split: str) -> Tokens:
        return Tokens([self.folder / name for name in self._files[split]], self._dtype)


def open_store(config: DataConfig, tokenizer: Tokenizer | None = None) -> TokenStore:
    """The tokens of the corpus that `config` names: from the cache, or built now.

    Several processes may ask at once: one builds, the others wait for it. A store that does not hold what was
    written to it is built again; an interrupted build leaves none.

    Args:
        tokenizer: takes the place of the one `config.tokenizer` describes, for instance that of an earlier run

    Raises:
        UserError: a mistake in the files, the tokenizer or the cache folder.
    """
    source = open_source(config)
    if tokenizer is None and config.tokenizer.kind in ("file", "hub"):
        tokenizer = build_tokenizer(config.tokenizer, [])
    folder = Path(config.cache_dir).expanduser() / _key(source, config.tokenizer, tokenizer)
    if _fault(folder):
        try:
            with _lock(folder):
                if fault := _fault(folder):  # still: nobody else built it while this process waited
                    if folder.exists():
                        print(f"The token cache {folder} is built again: {fault}")
                    _build(folder, source, config.tokenizer, tokenizer)
        except OSError as error:
            raise UserError(f"data.cache_dir={config.cache_dir} cannot be written: {error}") from error
    return TokenStore(folder)


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


def _lock(folder: Path) -> AcquireReturnProxy:
    """Held, until the `with` block ends, by the one process that may build this store."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(folder.name + ".lock"))
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        print(f"Waiting for another process that builds the token cache {folder}")
        return lock.acquire()


def _build(folder: Path, source: Source, config: TokenizerConfig, tokenizer: Tokenizer | None) -> None:
    """Write a store beside its place, then move it there whole."""
    draft = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(draft, ignore_errors=True)  # left by a process that was killed
    draft.mkdir()
    print(f"Tokenizing {source.description}")
    try:
        if tokenizer is None:
            splits = SPLITS if config.kind == "characters" else ("train",)
            tokenizer = build_tokenizer(config, (row["text"] for split in splits for row in source.documents(split)))
        meta = {
            "description": source.description,
            "source_fingerprint": source.fingerprint,
            "skipped": source.skipped(),
            "tokenizer_hash": tokenizer_hash(tokenizer),
            "end_of_text_id": end_of_text_id(tokenizer, config.end_of_text),
            "dtype": "uint16" if vocabulary_size(tokenizer) <= 2**16 else "uint32",
        }
        meta["splits"] = {split: _write_split(draft, split, source, tokenizer, meta) for split in SPLITS}
        tokenizer.save(str(draft / "tokenizer.json"))
        (draft / "meta.json").write_text(json.dumps(meta, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    _report(meta)


def _report(meta: dict) -> None:
    if skipped := meta["skipped"]:
        print(f"{len(skipped)} files could not be decoded and are left out: {', '.join(skipped[:5])}")
    for split, part in meta["splits"].items():
        tokens = sum(shard["tokens"] for shard in part["shards"])
        print(f"{split}: {tokens:,} tokens, {part['text_bytes'] / tokens:.2f} bytes per token")


def _write_split(folder: Path, split: str, source: Source, tokenizer: Tokenizer, meta: dict) -> dict:
    """Tokenize one split into shards; returns its entry in meta.json."""
    counts = {"text": 0, "tokens": 0}  # UTF-8 bytes that went in, and that the tokens stand for
    length_of = token_bytes(tokenizer)

    def token_batches() -> Iterator[np.ndarray]:
        for rows in _batches(source.documents(split)):
            for row, ids in zip(rows, encode_batch(tokenizer, [row["text"] for row in rows]), strict=True):
                tokens = np.array(ids, dtype=np.int64)
                counts["text"] += (size := len(row["text"].encode()))
                bar.update(size)
                counts["tokens"] += int(length_of[tokens].sum())
                yield np.append(tokens, meta["end_of_text_id"]) if row["ends"] else tokens

    # disable=None: none where stderr is no terminal
    with tqdm(desc=f"tokenizing {split}", unit="B", unit_scale=True, disable=None) as bar:
        shards = list(_write_shards(folder, split, token_batches(), meta["dtype"], SHARD_TOKENS))
    if counts["text"] == 0:
        raise UserError(
            f"no text for the {split} split in {source.description}: it is too short, give more of it; "
            "train, validation and test all need some"
        )
    if abs(counts["tokens"] / counts["text"] - 1) > 0.05:  # a few spaces put before texts are fine, lost text is not
        raise UserError(
            f"the tokenizer does not keep the text ({counts['text']} bytes become {counts['tokens']}), so bits per "
            "byte would be wrong: use a byte-level one, or data.tokenizer.kind=bpe"
        )
    return {"text_bytes": counts["text"], "shards": shards}


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


def _write_shards(
    folder: Path, name: str, batches: Iterable[np.ndarray], dtype: str, shard_tokens: int
) -> Iterator[dict]:
    """Write tokens to files of `shard_tokens` each but the last; yields what meta.json records of a file."""
    batches = iter(batches)
    rest = next(batches, None)
    number = 0
    while rest is not None:
        path = folder / f"{name}-{number:05d}.bin"
        digest, written = xxhash.xxh3_128(), 0
        with open(path, "wb") as file:
            while rest is not None and written < shard_tokens:
                part, rest = rest[: shard_tokens - written], rest[shard_tokens - written :]
                data = part.astype(dtype).tobytes()
                file.write(data)
                digest.update(data)
                written += len(part)
                if not len(rest):
                    rest = next(batches, None)
            file.flush()
            os.fsync(file.fileno())
        status = path.stat()
        number += 1
        yield {
            "file": path.name,
            "tokens": written,
            "size": status.st_size,
            "mtime_ns": status.st_mtime_ns,
            "xxh3": digest.hexdigest(),
        }
