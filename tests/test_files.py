"""Files are written whole or not at all, and private folders are those that nobody else can put anything into."""

import os
import stat
from pathlib import Path

import pytest

from mla_lm.errors import UserError
from mla_lm.files import check_private, private_folder, write_atomically

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
ANOTHER_USER = 12345


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, lambda file: file.write(b"old"))

    def fail(file) -> None:
        file.write(b"new, but")
        raise OSError("disk full")

    with pytest.raises(UserError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.fixture(params=[0o000, 0o002, 0o022, 0o077])
def umask(request):
    before = os.umask(request.param)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_private_folder_is_private_whatever_the_umask(tmp_path, umask):
    private_folder(tmp_path / "a" / "b")
    assert [mode(tmp_path / name) for name in ("a", "a/b")] == [0o700, 0o700]
    assert private_folder(tmp_path / "a" / "b").is_dir()  # as it is there now


@pytest.mark.parametrize("open_to_others", ["kept", "kept/code", "."])
@pytest.mark.parametrize("bit", [stat.S_IWOTH, stat.S_IWGRP])
def test_refuses_what_others_can_write(tmp_path, open_to_others, bit):
    folder = private_folder(tmp_path / "kept" / "code")
    place = tmp_path / open_to_others
    if os.getuid() == 0:
        os.chown(place, 0, 1)  # a group that is not the user's own
    elif bit == stat.S_IWGRP:
        pytest.skip("only root gives files to other groups")
    place.chmod(mode(place) | bit)
    with pytest.raises(UserError, match=f"chmod go-w {place.resolve()}( |$)"):
        check_private(folder)
    place.chmod(mode(place) & ~bit)
    check_private(folder)


def test_takes_a_folder_in_one_that_is_sticky(tmp_path):
    tmp_path.chmod(0o1777)
    private_folder(tmp_path / "code")


@needs_root
def test_refuses_what_another_user_owns(tmp_path):
    folder = private_folder(tmp_path / "code")
    os.chown(folder, ANOTHER_USER, ANOTHER_USER)
    with pytest.raises(UserError, match="another user"):
        private_folder(folder)


def test_refuses_a_link_to_what_others_can_write(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs").chmod(0o777)
    (tmp_path / "code").symlink_to(tmp_path / "theirs")
    with pytest.raises(UserError, match="can be written by others"):
        private_folder(tmp_path / "code")
