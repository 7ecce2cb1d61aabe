"""Exit statuses, and the words for what can go wrong."""

import errno
import os
import signal

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from mla_lm.config import TrainConfig
from mla_lm.errors import Interrupted, TrainingFailed, UserError
from mla_lm.terminal import cli


def status_of(error: BaseException | None) -> int:
    def main() -> None:
        if error is not None:
            raise error

    with pytest.raises(SystemExit) as end:
        cli.run(main)
    return end.value.code


def test_statuses(capsys):
    assert status_of(None) == 0
    assert status_of(UserError("one\n  two\n  three\n  four")) == 2
    assert capsys.readouterr().err == "error: one\n  two\n  three\n"
    assert status_of(TrainingFailed("diverged")) == 1
    assert status_of(Interrupted(signal.SIGTERM)) == 143
    assert status_of(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err.endswith("stopped by Ctrl-C\n")
    assert status_of(NotADirectoryError(20, "Not a directory", "a/b")) == 2
    assert capsys.readouterr().err.endswith("error: a/b: Not a directory\n")


def test_a_bug_is_no_mistake():
    def main() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cli.run(main)


def test_key_names_are_those_of_values():
    names = cli.key_names(TrainConfig)
    assert "model.attention.rope_dim" in names
    assert "model.attention" not in names
    assert "seed" in names


@given(st.text(st.characters(codec="ascii", min_codepoint=32, exclude_characters="\x7f"), min_size=1))
def test_quoted_is_read_by_hydra_as_it_was(text):
    """A backslash, a quote, a comma, an interpolation's sign: a path may have any."""
    (override,) = OverridesParser.create().parse_overrides([f"key={cli.quoted(text)}"])
    assert override.value() == text


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.ENAMETOOLONG, errno.EACCES])
def test_what_the_system_says_of_a_path_is_one_line(number, capsys):
    def main() -> None:
        raise OSError(number, os.strerror(number), "some/path")

    with pytest.raises(SystemExit) as end:
        cli.run(main)
    assert end.value.code == 2
    assert capsys.readouterr().err == f"error: some/path: {os.strerror(number)}\n"
