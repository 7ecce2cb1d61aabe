"""Libraries whose compiler was killed are made again: torch takes one that is there for whole."""

import _ctypes
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mla_lm.compiled_code import is_cut_short, remove_cut_short
from tests.conftest import ROOT

WHOLE = Path(_ctypes.__file__).read_bytes()

pytestmark = pytest.mark.skipif(WHOLE[:4] != b"\x7fELF", reason="other systems have other libraries")


def library(cache: Path, name: str, content: bytes) -> Path:
    path = cache / "ab" / f"{name}.main.so"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.9999])
def test_a_part_of_a_library_is_told_from_the_whole(tmp_path, share):
    whole, part = library(tmp_path, "a", WHOLE), library(tmp_path, "b", WHOLE[: int(share * len(WHOLE))])
    assert not is_cut_short(whole)
    assert is_cut_short(part)
    assert is_cut_short(library(tmp_path, "c", bytes(len(WHOLE))))
    remove_cut_short(tmp_path)
    assert whole.read_bytes() == WHOLE
    assert not part.exists()


def test_what_a_living_process_compiles_is_left_alone(tmp_path):
    part = library(tmp_path, "a", WHOLE[:1000])
    (tmp_path / "locks").mkdir()
    with open(tmp_path / "locks" / "a.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        remove_cut_short(tmp_path)
        assert part.exists()
    remove_cut_short(tmp_path)
    assert not part.exists()


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
