"""Nothing that is run is loaded from where others can put theirs: our kernel, and what torch compiles."""

import getpass
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from mla_lm.attention import cpu_kernel
from mla_lm.errors import UserError
from mla_lm.files import check_private, private_folder
from mla_lm.hardware import cpp_compiler

needs_compiler = pytest.mark.skipif(shutil.which(cpp_compiler()) is None, reason="no C++ compiler")
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
ANOTHER_USER = 12345


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


# the kernel


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    """The folder that it is kept in, of a user with the worst of umasks."""
    home, before = tmp_path_factory.mktemp("home"), os.umask(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(home / "torch"))
        cpu_kernel._library()
    os.umask(before)
    return home / "torch"


@pytest.fixture
def kernel(kept, tmp_path, monkeypatch) -> Path:
    """It as it is kept, a copy for each test."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    shutil.copytree(kept, tmp_path / "torch")
    return next((tmp_path / "torch" / "mla_lm").iterdir())


@needs_compiler
def test_the_kernel_is_kept_privately(kernel):
    cpu_kernel._library()
    assert mode(kernel) == mode(kernel.parent) == 0o700
    assert list(kernel.parent.iterdir()) == [kernel]


@needs_compiler
@pytest.mark.parametrize("what", ["file", "folder", "folder above"])
def test_a_kernel_that_others_can_write_is_not_loaded(kernel, what):
    kernel.write_bytes(b"theirs")  # which would be an error of the loader
    place = {"file": kernel, "folder": kernel.parent, "folder above": kernel.parent.parent}[what]
    place.chmod(0o777)
    with pytest.raises(UserError, match="can be written by others"):
        cpu_kernel._library()


@needs_compiler
@needs_root
@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_kernel_of_another_user_is_not_loaded(kernel, what):
    os.chown(kernel if what == "file" else kernel.parent, ANOTHER_USER, -1)
    with pytest.raises(UserError, match="belongs to another user"):
        cpu_kernel._library()


# what torch compiles


def compiler_failure(tmp_path: Path, **environment: str) -> str:
    """Of a process of its own, as torch remembers where it keeps things."""
    program = (
        "import os; os.umask(0); from mla_lm.hardware import compiler_failure; print(compiler_failure('cpu'));"
        "print(os.environ.get('TORCHINDUCTOR_CACHE_DIR'))"
    )
    (tmp_path / "shared").mkdir(exist_ok=True)
    (tmp_path / "shared").chmod(0o1777)
    variables = {key: value for key, value in os.environ.items() if key != "TORCHINDUCTOR_CACHE_DIR"}
    variables |= {"TORCH_HOME": str(tmp_path / "torch"), "TMPDIR": str(tmp_path / "shared"), **environment}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=True).stdout


@needs_compiler
def test_torch_keeps_what_it_compiles_in_private_folders(tmp_path):
    kept = tmp_path / "torch" / "mla_lm" / "inductor"
    assert compiler_failure(tmp_path) == f"None\n{kept}\n"
    assert list(kept.rglob("*.so"))
    assert mode(kept) == mode(kept.parent) == 0o700


@needs_compiler
def test_torch_keeps_nothing_where_others_can_write(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs").chmod(0o777)
    said = compiler_failure(tmp_path, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "theirs"))
    assert "theirs can be written by others" in said
    assert not list((tmp_path / "theirs").iterdir())


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("mode_of_folder", "kept"), [(0o700, True), (0o777, False)])
def test_torch_keeps_headers_only_where_others_cannot_write(tmp_path, mode_of_folder, kept):
    """It has one folder for them, in the temporary one, which anybody may have made."""
    folder = tmp_path / "shared" / f"torchinductor_{getpass.getuser()}"
    folder.mkdir(parents=True)
    folder.chmod(mode_of_folder)
    assert compiler_failure(tmp_path).startswith("None\n")
    assert bool(list(folder.rglob("*.gch")) + list(folder.rglob("*.pch"))) == kept
