"""What torch compiles is kept where nobody else can write, and is made again where its compiler was killed."""

import _ctypes
import fcntl
import getpass
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mla_lm.compiled_code import is_cut_short, remove_cut_short
from mla_lm.hardware import compiler_failure
from tests.attention.test_cpu_kernel import needs_compiler
from tests.conftest import ROOT
from tests.test_files import mode

WHOLE = Path(_ctypes.__file__).read_bytes()
needs_elf = pytest.mark.skipif(WHOLE[:4] != b"\x7fELF", reason="other systems have other libraries")


def library(cache: Path, name: str, content: bytes) -> Path:
    path = cache / "ab" / f"{name}.main.so"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


@needs_elf
@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.9999])
def test_a_part_of_a_library_is_told_from_the_whole(tmp_path, share):
    whole, part = library(tmp_path, "a", WHOLE), library(tmp_path, "b", WHOLE[: int(share * len(WHOLE))])
    assert not is_cut_short(whole)
    assert is_cut_short(part)
    assert is_cut_short(library(tmp_path, "c", bytes(len(WHOLE))))
    remove_cut_short(tmp_path)
    assert whole.read_bytes() == WHOLE
    assert not part.exists()


@needs_elf
def test_what_a_living_process_compiles_is_left_alone(tmp_path):
    part = library(tmp_path, "a", WHOLE[:1000])
    (tmp_path / "locks").mkdir()
    with open(tmp_path / "locks" / "a.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        remove_cut_short(tmp_path)
        assert part.exists()
    remove_cut_short(tmp_path)
    assert not part.exists()


@needs_elf
@pytest.mark.slow
def test_torch_compiles_again_what_was_cut_short(tmp_path):
    """The lock is the one that torch takes, the place the one where it looks."""
    program = (
        "from mla_lm.hardware import compiler_failure; assert (failure := compiler_failure('cpu')) is None, failure"
    )
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    for _ in range(2):
        subprocess.run([sys.executable, "-c", program], check=True, env=environment, cwd=ROOT)
        libraries = list((tmp_path / "cache").glob("??/*.so"))
        assert libraries
        assert not any(map(is_cut_short, libraries))
        for path in libraries:
            path.write_bytes(path.read_bytes()[:1000])


# where it is kept


def failure_elsewhere(tmp_path: Path) -> str:
    """`compiler_failure` of a process of its own, as torch remembers where it keeps things, and where that is."""
    program = (
        "import os; os.umask(0); from mla_lm.hardware import compiler_failure; print(compiler_failure('cpu'));"
        "print(os.environ.get('TORCHINDUCTOR_CACHE_DIR'))"
    )
    (tmp_path / "shared").mkdir(exist_ok=True)
    (tmp_path / "shared").chmod(0o1777)
    variables = {key: value for key, value in os.environ.items() if key != "TORCHINDUCTOR_CACHE_DIR"}
    variables |= {"TORCH_HOME": str(tmp_path / "torch"), "TMPDIR": str(tmp_path / "shared")}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=True).stdout


@pytest.mark.e2e
@needs_compiler
def test_torch_keeps_what_it_compiles_in_private_folders(tmp_path):
    kept = tmp_path / "torch" / "mla_lm" / "inductor"
    assert failure_elsewhere(tmp_path) == f"None\n{kept}\n"
    assert list(kept.rglob("*.so"))
    assert mode(kept) == mode(kept.parent) == 0o700


@needs_compiler
def test_torch_keeps_nothing_where_others_can_write(tmp_path, monkeypatch):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs").chmod(0o777)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "theirs"))
    assert "theirs can be written by others" in compiler_failure("cpu")
    assert not list((tmp_path / "theirs").iterdir())


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("mode_of_folder", "kept"), [(0o700, True), (0o777, False)])
def test_torch_keeps_headers_only_where_others_cannot_write(tmp_path, mode_of_folder, kept):
    """It has one folder for them, in the temporary one, which anybody may have made."""
    folder = tmp_path / "shared" / f"torchinductor_{getpass.getuser()}"
    folder.mkdir(parents=True)
    folder.chmod(mode_of_folder)
    assert failure_elsewhere(tmp_path).startswith("None\n")
    assert bool(list(folder.rglob("*.gch")) + list(folder.rglob("*.pch"))) == kept
