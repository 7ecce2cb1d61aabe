"""Files and folders on disk: whole or not at all, and private where code is loaded from them."""

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
    """A binary file that remembers what the operating system said, for writers that put it into words of their own."""

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
    """Call `write(file)` on a binary temporary file beside `path`, then put it in the place of `path` at once.

    Whoever reads `path`, whenever the process is killed, finds the old content or the new, never a part. The
    temporary file is new, with a name that nobody can guess, so no link that somebody else has made is followed.

    Args:
        put: moves the temporary file, now whole and on the disk, to `path`

    Raises:
        UserError: it cannot be written, for want of room or rights; the old content is still there.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        make_folder(path.parent)
        with open(temporary, "xb") as file:
            recorder = _Recorder(file)
            try:
                write(cast(BinaryIO, recorder))
            except RuntimeError as error:  # torch.save's word for whatever went wrong with the file
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
    """`open` for writing that follows no link at the end of `path`, which somebody else may have put there.

    Raises:
        OSError: there is a link, or it cannot be opened.
    """
    return open(path, mode, opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666))


def read_text(path: Path, most_bytes: int) -> str:
    """The text of a file that somebody else may have written.

    Raises:
        UserError: it is no file, such as a pipe, or has more bytes than any file of its kind.
        OSError: it cannot be read.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is not a file")
    if status.st_size > most_bytes:
        raise UserError(f"{path} has {status.st_size:,} bytes, and no such file has more than {most_bytes:,}")
    return path.read_text(encoding="utf-8")


def make_folder(path: Path) -> None:
    """Make a folder and those above it, and see that they are on the disk; nothing happens where it is there."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """A new name in a folder is on the disk only when the folder is."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def private_folder(path: Path) -> Path:
    """A folder that nobody else can write; made for nobody else to read. For what is run, or kept secret.

    Raises:
        UserError: as `check_private`, or it cannot be made.
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
        path.mkdir(mode=0o700, exist_ok=True)  # whatever the umask; `parents=True` would leave the others to it


def check_private(path: Path) -> None:
    """See that nobody but this user and root has a say in what is at `path`, a file or folder that is there.

    A folder above it that others can write is as good as itself, as they can put another in its place; in a sticky one,
    such as /tmp, they cannot. So it is for both ends of a link.

    Raises:
        UserError: somebody has.
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
    """Whether it is the group that many systems give each user for himself, whose folders the group can write."""
    try:
        group, user = grp.getgrgid(gid), pwd.getpwuid(os.getuid())
    except KeyError:
        return False
    return group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}


def check_free(path: Path) -> None:
    """Raises UserError where there is something that a new folder would write over."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} is not empty: give a folder that is new or empty")


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` to write into, which takes the place of `path` at once, whole or not at all.

    Raises:
        UserError: there is something in `path`, or it cannot be written.
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
