"""Content hashes of files, cached by size and modification time so that a large corpus is hashed only once."""

import contextlib
import json
from pathlib import Path
from typing import Any

import xxhash

from mla_lm.errors import UserError
from mla_lm.files import write_atomically


def hash_text(*parts: str) -> str:
    """Hex xxh3_128 of some strings; their boundaries count."""
    return xxhash.xxh3_128_hexdigest(json.dumps(parts).encode())


def hash_file(path: Path) -> str:
    """Hex xxh3_128 of a file's bytes."""
    return digest_file(path).hexdigest()


def digest_file(path: Path) -> xxhash.xxh3_128:
    """The xxh3_128 of a file's bytes, read in pieces, as an object that can be updated with more."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest


def content_hashes(paths: list[Path], memory: Path) -> list[str]:
    """`hash_file` of every path; the JSON file `memory` keeps the hashes of files that have not changed since.

    Raises:
        UserError: a file cannot be read.
    """
    known = remembered(memory)
    hashes, news = [], {}
    for path in paths:
        try:
            status = path.stat()
            seen = known.get(str(path))
            if not isinstance(seen, list) or len(seen) != 3 or seen[:2] != [status.st_size, status.st_mtime_ns]:
                seen = news[str(path)] = [status.st_size, status.st_mtime_ns, hash_file(path)]
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        hashes.append(seen[2])
    if news:
        text = json.dumps(known | news)
        with contextlib.suppress(UserError):  # then the next start is slower, nothing else
            write_atomically(memory, lambda file: file.write(text.encode()))
    return hashes


def remembered(memory: Path) -> dict[str, Any]:
    """Read a JSON object that an earlier start left in the token cache; empty if there is none or it is damaged."""
    try:
        known = json.loads(memory.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}
