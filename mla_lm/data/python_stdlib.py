"""The source code of Python's standard library as a corpus: real text that every machine has."""

import os
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from mla_lm.data.corpus import SPLITS, Source, as_dataset, split_of
from mla_lm.data.hashes import content_hashes, hash_text
from mla_lm.errors import UserError

LEFT_OUT = {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages", "__pycache__"}


def python_stdlib(memory: Path, root: str | Path | None = None, splits: tuple[str, ...] = SPLITS) -> Source:
    """The *.py files under `root`, by default this interpreter's standard library, without tests and codec tables.

    Each file is a document. The SHA-256 of its path relative to `root` decides its split, 90/5/5. Files that cannot be
    decoded in the encoding they declare (PEP 263) are listed by `skipped()`. Empty files are left out. Only the files
    of `splits` are looked at.

    Raises:
        UserError: there are no such files, or one cannot be read.
    """
    root = Path(root or sysconfig.get_path("stdlib"))
    names = sorted(path.relative_to(root).as_posix() for path in _python_files(root))
    names = [name for name in names if split_of(name) in splits]
    if not names:
        raise UserError(f"no *.py file of Python's standard library is in {root}: choose data=text instead")
    hashes = content_hashes([root / name for name in names], memory)
    return Source(
        description=f"Python standard library, {len(names)} files in {root}",
        fingerprint=hash_text("python_stdlib: sha256 of the path 90/5/5", *names, *hashes),
        documents=lambda split: as_dataset(_read_stdlib, root=str(root), names=names, split=split),
        skipped=lambda: [name for name in names if decode_python(root / name) is None],
    )


def _python_files(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in LEFT_OUT]  # os.walk enters only the remaining ones
        yield from (Path(folder, name) for name in files if name.endswith(".py"))


def _read_stdlib(root: str, names: list[str], split: str) -> Iterator[dict]:
    for name in names:
        if split_of(name) == split and (text := decode_python(Path(root, name))):
            yield {"text": text, "ends": True}


def decode_python(path: Path) -> str | None:
    """The text of a Python file, decoded as the file declares; None if that fails."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError):  # SyntaxError: an unknown encoding
        return None
