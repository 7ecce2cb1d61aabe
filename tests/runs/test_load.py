"""Loading a model from its run."""

from pathlib import Path

import pytest

from mla_lm.runs.load import load_run
from mla_lm.terminal import cli
from scripts import evaluate, generate
from tests.conftest import call_main, refused, succeeded


@pytest.mark.e2e
@pytest.mark.parametrize(("program", "arguments"), [(generate, ("--prompt", "a")), (evaluate, ())])
def test_a_damaged_best_checkpoint_leaves_the_last(run, tmp_path, program, arguments):
    """The message names it, and it is taken where the run was."""
    best = run / "checkpoints" / "best.ckpt"
    content = bytearray(best.read_bytes())
    content[len(content) // 2] ^= 1
    best.write_bytes(content)
    last = run / "checkpoints" / "last.ckpt"

    def call(path: Path):
        return call_main(lambda: cli.run(program.main), [program.__name__, str(path), *arguments], tmp_path)

    result = call(run)
    refused(result, "best.ckpt is damaged", f"give {last} in place of the run")
    assert len(result.stderr.splitlines()) == 2
    succeeded(call(last))
    last.write_bytes(content)
    refused(call(last), "last.ckpt is damaged")


def test_without_another_checkpoint_none_is_named(run):
    (run / "checkpoints" / "best.ckpt").write_bytes(b"nothing")
    for path in (run / "checkpoints").glob("last*.ckpt"):
        path.unlink()
    with pytest.raises(ValueError, match=r"best.ckpt is damaged or no checkpoint: [^\n]+$"):
        load_run(run)
