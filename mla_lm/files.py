"""Writing files and folders completely or not at all, and keeping those private that code is loaded from."""

import contextlib
import grp
import os
import pwd
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, BinaryIO, cast

from mla_lm.errors import UserError


class _Recorder:
    """A binary file that keeps the operating system's error, for writers that replace it with one of their own."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def __getattr__(self, name: str) -> object:
        return getattr(self._file, name)


def write_atomically(
    path: Path, write: Callable[[BinaryIO], object], put: Callable[[Path, Path], None] = os.replace
) -> None:
    """Call `write(file)` on a binary temporary file beside `path`, then move it to `path` atomically.

    Whenever the process is killed, `path` has the old content or the new, never a part. The temporary file is new and
    its name cannot be guessed, so no link made by somebody else is followed.

    Args:
        put: moves the temporary file, which is complete and on the disk, to `path`

    Raises:
        UserError: the file cannot be written, for lack of space or permission; the old content is still there.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        make_folder(path.parent)
        with open(temporary, "xb") as file:
            recorder = _Recorder(file)
            try:
                write(cast(BinaryIO, recorder))
            except RuntimeError as error:  # torch.save raises this for any failure of the file
                raise recorder.error or error from error
            file.flush()
            os.fsync(file.fileno())
        put(temporary, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"{path} cannot be written: {reason}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def open_own(path: Path, mode: str) -> IO[bytes]:
    """Open a file for writing, unless `path` is a link, which somebody else may have put there.

    Raises:
        OSError: `path` is a link, or cannot be opened.
    """
    return open(path, mode, opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666))


def read_text(path: Path, most_bytes: int) -> str:
    """Read a text file that somebody else may have written.

    Args:
        most_bytes: largest size that such a file can have

    Raises:
        UserError: it is not a regular file (but a pipe, for example), or is larger than that.
        OSError: it cannot be read.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is not a file")
    if status.st_size > most_bytes:
        raise UserError(f"{path} has {status.st_size:,} bytes, and no such file has more than {most_bytes:,}")
    return path.read_text(encoding="utf-8")


def make_folder(path: Path) -> None:
    """Make a folder and its parents, and flush them to the disk. Do nothing if it exists."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Flush a folder to the disk; until then, a new name in it can be lost."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def private_folder(path: Path) -> Path:
    """Return a folder that only this user can write, for code and secrets; a new one also only this user can read.

    Raises:
        UserError: `check_private` refuses the folder, or it cannot be made.
    """
    try:
        _make_private(path)
    except OSError as error:
        raise UserError(f"{path} cannot be made: {error.strerror}") from error
    check_private(path)
    return path


def _make_private(path: Path) -> None:
    if not path.is_dir():
        _make_private(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)  # whatever the umask; `parents=True` would apply it to the parents


def check_private(path: Path) -> None:
    """Check that only this user and root can change or replace the existing file or folder at `path`.

    Others who can write a folder above it can replace it, unless that folder is sticky, like /tmp. Both ends of a link
    are checked.

    Raises:
        UserError: somebody else can.
    """
    if path.stat().st_uid not in (os.getuid(), 0):
        raise UserError(f"{path} belongs to another user, so nothing in it is used: remove it, or name another place")
    if _others_write(path):
        raise UserError(f"{path} can be written by others, so nothing in it is used: remove it, or chmod go-w {path}")
    for parent in (*path.absolute().parents, *path.resolve().parents):
        if parent.stat().st_uid not in (os.getuid(), 0):
            raise UserError(f"{parent} belongs to another user, so nothing in {path} is used: name another place")
        if _others_write(parent) and not parent.stat().st_mode & stat.S_ISVTX:
            raise UserError(f"{parent} can be written by others, so nothing in {path} is used: chmod go-w {parent}")


def _others_write(path: Path) -> bool:
    status = path.stat()
    shared = status.st_mode & stat.S_IWGRP and not _is_own_group(status.st_gid)
    return bool(shared or status.st_mode & stat.S_IWOTH)


def _is_own_group(gid: int) -> bool:
    """Whether this is the user's private group. Many systems make one per user and let it write the user's folders."""
    try:
        group, user = grp.getgrgid(gid), pwd.getpwuid(os.getuid())
    except KeyError:
        return False
    return group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}


def check_free(path: Path) -> None:
    """Raise UserError if `path` is a file or a folder that is not empty."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} is not empty: give a folder that is new or empty")


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path` to write into; on success, move it to `path` atomically.

    Raises:
        UserError: `path` is not empty, or cannot be written.
    """
    check_free(path)
    path = path.absolute()
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        make_folder(path.parent)
        draft.mkdir()
        yield draft
        _sync_tree(draft)
        os.rename(draft, path)
        sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _sync_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            file = os.open(os.path.join(root, name), os.O_RDONLY)
            os.fsync(file)
            os.close(file)
        sync_folder(Path(root))
