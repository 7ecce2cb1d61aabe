"""Where compiled code is kept: in folders that only this user can write, without truncated files."""

import fcntl
import os
import struct
from pathlib import Path

import torch

from mla_lm.errors import UserError
from mla_lm.files import private_folder


def code_folder() -> Path:
    """The folder for compiled code, beside torch's own caches, where nobody else can put code.

    Raises:
        UserError: others can write the folder, or it cannot be made.
    """
    try:
        return private_folder(Path(torch.hub.get_dir()).with_name("mla_lm"))
    except UserError as error:
        raise UserError(f"{error}\n  TORCH_HOME= names another place.") from error


def prepare_folder() -> None:
    """Make torch keep compiled code in `code_folder`, unless the user names another. Its default folder is shared.

    Raises:
        UserError: others can write the folder.
    """
    from torch._inductor import config  # importing it takes half a second
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    default = default_cache_dir()  # torch sets the variable to this when it is imported
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR", default) == os.path.abspath(default):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(code_folder() / "inductor")
    remove_cut_short(private_folder(Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])))
    try:
        private_folder(Path(default))  # torch keeps headers there in any case
    except UserError:
        config.cpp_cache_precompile_headers = False  # then compiling takes half as long again


def remove_cut_short(cache: Path) -> None:
    """Remove libraries from torch's folder that are truncated because their compiler was killed.

    torch assumes that an existing library is complete, so every later run would fail to load it. A library whose lock
    is held is left alone, since another process is at work on it.
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
    """Whether an ELF file ends before its section table, which comes last; for other files, whether they are empty."""
    with open(library, "rb") as file:
        header, size = file.read(64), file.seek(0, os.SEEK_END)
    if header[:5] != b"\x7fELF\2":  # another system's, or the linker was killed before it wrote one
        return not header.strip(b"\0")
    start, entry, count = *struct.unpack_from("<Q", header, 0x28), *struct.unpack_from("<2H", header, 0x3A)
    return start + entry * count > size
