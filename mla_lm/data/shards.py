"""Tokens on disk: the shards of a split are written one after another, and read as one memory-mapped array."""

import os
from pathlib import Path

import numpy as np
import xxhash

from mla_lm.data.hashes import digest_file
from mla_lm.errors import UserError
from mla_lm.files import open_own


class Tokens:
    """The tokens of one split. It has a `len()`, and slices across shards that are arrays of unsigned integers.

    It is pickled by path: a worker process maps the files anew instead of receiving their contents.

    Args:
        vocab_size: ids must be below it; slices check this, since other users may have written the files

    Raises, from a slice:
        UserError: an id is not below vocab_size.
    """

    def __init__(self, paths: list[Path], dtype: str, vocab_size: int):
        self.paths, self.dtype, self.vocab_size = paths, dtype, vocab_size
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
        tokens = np.concatenate(pieces) if pieces else np.empty(0, self.dtype)
        if (largest := tokens.max(initial=0)) >= self.vocab_size:
            raise UserError(
                f"the token cache {self.paths[0].parent} is damaged: it has a token {largest}, and the tokenizer "
                f"only {self.vocab_size}; delete it"
            )
        return tokens

    def __reduce__(self) -> tuple:
        return Tokens, (self.paths, self.dtype, self.vocab_size)


class ShardWriter:
    """Appends tokens to files of `shard_tokens` each but the last.

    Args:
        records: the entries of meta.json for the files so far. The writer keeps them up to date: those of whole files
            at once, that of the last file whenever `sync` is called.
    """

    def __init__(self, folder: Path, split: str, dtype: str, shard_tokens: int, records: list[dict]):
        self.folder, self.split, self.dtype, self.shard_tokens = folder, split, dtype, shard_tokens
        self.records = records
        self._digest = digest_file(folder / records[-1]["file"]) if records else xxhash.xxh3_128()

    def write(self, tokens: np.ndarray) -> None:
        while len(tokens):
            if not self.records or self.records[-1]["tokens"] == self.shard_tokens:
                self.records.append({"file": f"{self.split}-{len(self.records):05d}.bin", "tokens": 0})
                self._digest = xxhash.xxh3_128()
            last = self.records[-1]
            room = self.shard_tokens - last["tokens"]
            part, tokens = tokens[:room], tokens[room:]
            data = part.astype(self.dtype).tobytes()
            with open_own(self.folder / last["file"], "ab") as file:
                file.write(data)
            self._digest.update(data)
            last["tokens"] += len(part)
            if last["tokens"] == self.shard_tokens:
                self.sync()

    def sync(self) -> None:
        """Flush what was written to the disk, and bring the records up to date."""
        if self.records:
            last = self.records[-1]
            with open_own(self.folder / last["file"], "ab") as file:
                os.fsync(file.fileno())
                status = os.fstat(file.fileno())
            last |= {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "xxh3": self._digest.hexdigest()}
