"""Where compiled code is kept: in folders that nobody else can write, and whole."""

import fcntl
import os
import struct
from pathlib import Path

import torch

from mla_lm.errors import UserError
from mla_lm.files import private_folder


def code_folder() -> Path:
    """The folder for compiled code, beside what else torch keeps, where nobody else can put code of theirs.

    Raises:
        UserError: others can write it, or it cannot be made.
    """
    try:
        return private_folder(Path(torch.hub.get_dir()).with_name("mla_lm"))
    except UserError as error:
        raise UserError(f"{error}\n  TORCH_HOME= names another place.") from error


def prepare_folder() -> None:
    """Have torch keep what it compiles in `code_folder`, where the user names no other: it would take a shared folder.

    Raises:
        UserError: others can write the folder.
    """
    from torch._inductor import config  # takes half a second
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    default = default_cache_dir()  # which torch puts into the variable itself when it is imported
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR", default) == os.path.abspath(default):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(code_folder() / "inductor")
    remove_cut_short(private_folder(Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])))
    try:
        private_folder(Path(default))  # where it keeps headers, whatever it is told
    except UserError:
        config.cpp_cache_precompile_headers = False  # compiling takes half as long again


def remove_cut_short(cache: Path) -> None:
    """Remove the libraries in torch's folder whose compiler was killed while it wrote them.

    torch takes a library that is there for whole, so that every later run would fail to load it. Its lock tells whether
    another process is at work on one.
    """
    for library in cache.glob("??/*.so"):
        if is_cut_short(library):
            (cache / "locks").mkdir(exist_ok=True)
            with open(cache / "locks" / f"{library.name.split('.')[0]}.lock", "a") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                library.unlink(missing_ok=True)


def is_cut_short(library: Path) -> bool:
    """Whether an ELF file ends before its table of sections, which linkers put last; elsewhere, whether it is empty."""
    with open(library, "rb") as file:
        header, size = file.read(64), file.seek(0, os.SEEK_END)
    if header[:5] != b"\x7fELF\2":  # other systems have other headers, a linker that was killed may have written none
        return not header.strip(b"\0")
    start, entry, count = *struct.unpack_from("<Q", header, 0x28), *struct.unpack_from("<2H", header, 0x3A)
    return start + entry * count > size
