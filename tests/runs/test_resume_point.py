"""A resume takes the newest checkpoint that is whole, and keeps what is not under another name."""

import json
import shutil
import struct
import zipfile
from pathlib import Path

import pytest
import torch

from mla_lm.errors import UserError
from mla_lm.runs.checkpoint import load_checkpoint, steps_behind
from mla_lm.runs.folder import RunFolder
from mla_lm.runs.resume_point import newest_resume_point
from scripts.soak.runs import check_same
from tests.conftest import TrainCommand, refused, rows_of, succeeded, summary_of

MORE = "trainer.max_steps=9"


@pytest.fixture(scope="module")
def command(tmp_path_factory, on_corpus) -> TrainCommand:
    return TrainCommand(tmp_path_factory.mktemp("start"), on_corpus)


@pytest.fixture(scope="module")
def longer(command) -> Path:
    """A run of 9 steps."""
    succeeded(command("hydra.run.dir=longer", MORE))
    return command.folder / "longer"


@pytest.fixture
def run(command, longer, tmp_path) -> Path:
    """The same run as it was after step 8, without a best.ckpt."""
    folder = tmp_path / "run"
    shutil.copytree(longer, folder)
    states = {path: load_checkpoint(path) for path in (folder / "checkpoints").iterdir()}
    assert {path.name: state["global_step"] for path, state in states.items()} == {
        "last.ckpt": 9,
        "last-1.ckpt": 8,
        "best.ckpt": 9,
    }
    (folder / "checkpoints" / "best.ckpt").unlink()
    (folder / "checkpoints" / "last.ckpt").unlink()
    (folder / "checkpoints" / "last-1.ckpt").rename(folder / "checkpoints" / "last.ckpt")
    (folder / "summary.json").unlink()
    return folder


def flip(path: Path, place: float = 0.5) -> None:
    """One bit of the file, within the numbers of its largest tensor."""
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
    content = bytearray(path.read_bytes())
    header = largest.header_offset
    start = header + 30 + sum(struct.unpack("<HH", content[header + 26 : header + 30]))
    content[start + int(place * largest.file_size)] ^= 16
    path.write_bytes(bytes(content))


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "flipped": flip,
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(bytes(range(256)) * 100),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_goes_on_from_the_one_before(command, longer, tmp_path, how):
    run = tmp_path / "run"
    shutil.copytree(longer, run)
    folder = run / "checkpoints"
    for name in ("best.ckpt", "last.ckpt"):  # both are of step 9, last-1.ckpt is of step 8
        DAMAGE[how](folder / name)
    damaged = {name: (folder / name).read_bytes() for name in ("best.ckpt", "last.ckpt") if (folder / name).exists()}
    (run / "summary.json").write_text("{")  # derived, so it stops nobody
    result = succeeded(command.bare(f"ckpt_path={run}"))
    assert "going on from last-1.ckpt, step 8" in result.stderr
    assert str(folder / "last.ckpt") in result.stderr
    for name, content in damaged.items():
        assert str(folder / name) in result.stderr
        assert (folder / f"{name}.damaged-1").read_bytes() == content
    check_same(run, longer)
    assert summary_of(run)["finished"]


def test_flipped_bits_are_found(longer, tmp_path):
    for number in range(10):
        path = shutil.copy(longer / "checkpoints" / "last.ckpt", tmp_path / f"{number}.ckpt")
        flip(Path(path), number / 10)
        with pytest.raises(UserError, match=f"{number}.ckpt is damaged"):
            load_checkpoint(Path(path))


def test_the_newest_counts_be_it_the_best(command, longer, tmp_path):
    """Validation oftener than saving, or a kill between the first two writes: best.ckpt alone, or newer than last."""
    run = tmp_path / "run"
    shutil.copytree(longer, run)
    (run / "checkpoints" / "last.ckpt").unlink()
    assert newest_resume_point(RunFolder(run), 10).path.name == "best.ckpt"
    (run / "checkpoints" / "last-1.ckpt").unlink()
    (run / "summary.json").unlink()
    refused(command(MORE, f"hydra.run.dir={run}"), "already holds a run", f"ckpt_path={run}")
    result = succeeded(command.bare(f"ckpt_path={run}", "trainer.max_steps=10"))
    assert "damaged" not in result.stderr
    assert [row["step"] for row in rows_of(run) if "train/loss" in row] == list(range(1, 11))


def test_best_follows_its_file(command, run, longer):
    """best.ckpt is gone, so no loss of before is the lowest: a file of the next validation is written."""
    succeeded(command.bare(f"ckpt_path={run}"))
    best = load_checkpoint(run / "checkpoints" / "best.ckpt")
    assert best["global_step"] == best["callbacks"]["Checkpoints"]["best"]["step"] == 9
    assert summary_of(run)["test_loss"] == summary_of(longer)["test_loss"]


def test_best_is_made_again_from_the_last_where_only_it_could_not_be_written(command, longer, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(longer, run)
    (run / "checkpoints" / "best.ckpt").unlink()
    (run / "summary.json").unlink()
    succeeded(command.bare(f"ckpt_path={run}"))
    check_same(run, longer)


def test_a_named_one_gives_up_what_lies_after_it(command, longer, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(longer, run)
    result = succeeded(command.bare(f"ckpt_path={run / 'checkpoints' / 'last-1.ckpt'}"))
    for name in ("last.ckpt", "best.ckpt"):
        assert f"{name} is given up, kept as {name}.given-up-1" in result.stderr
        assert steps_behind(run / "checkpoints" / f"{name}.given-up-1") == 9
    for key in ("state_dict", "optimizer_states"):
        a, b = (load_checkpoint(folder / "checkpoints" / "last.ckpt")[key] for folder in (run, longer))
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("how", ["missing", "flipped"])
def test_all_steps_done_and_no_best(command, longer, tmp_path, how):
    """A best.ckpt that only the validation of step 6 was: the steps after it are made again, and so a best one."""
    run = tmp_path / "run"
    shutil.copytree(longer, run)
    folder = run / "checkpoints"
    (run / "summary.json").unlink()
    last = load_checkpoint(folder / "last.ckpt")
    last["callbacks"]["Checkpoints"]["best"]["step"] = 6
    torch.save(last, folder / "last.ckpt")
    DAMAGE[how](folder / "best.ckpt")
    result = succeeded(command.bare(f"ckpt_path={run}"))
    assert "resumed     after step 8" in result.stdout
    assert (folder / "best.ckpt.damaged-1").exists() == ("best.ckpt is damaged" in result.stderr) == (how == "flipped")
    assert summary_of(run)["test_loss"] == summary_of(longer)["test_loss"]
    for path in folder.iterdir():
        if path.name != "last.ckpt":
            path.unlink()
    torch.save(last, folder / "last.ckpt")
    (run / "summary.json").unlink()
    refused(command.bare(f"ckpt_path={run}"), "no whole best.ckpt", "trainer.max_steps")
    succeeded(command.bare(f"ckpt_path={run}", "trainer.max_steps=10"))


def test_a_damaged_best_that_is_older_is_kept(command, run):
    """Nobody goes on from it, and the next validation would write over it."""
    best = run / "checkpoints" / "best.ckpt"
    shutil.copy(run / "checkpoints" / "last.ckpt", best)
    flip(best)
    content = best.read_bytes()
    result = succeeded(command.bare(f"ckpt_path={run}"))
    assert "best.ckpt is damaged" in result.stderr
    assert (run / "checkpoints" / "best.ckpt.damaged-1").read_bytes() == content


def test_all_damaged(command, run):
    for path in (run / "checkpoints").iterdir():
        path.write_bytes(b"")
    refused(command.bare(f"ckpt_path={run}"), "last.ckpt", "damaged", "hydra.run.dir")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["last.ckpt"]


def test_the_same_command_goes_on_by_itself(command, run, longer):
    """run.resume=auto: begins, goes on, and is content with a run that has finished; another run is not written to."""
    auto = (MORE, "run.resume=auto", f"hydra.run.dir={run}")
    result = succeeded(command(*auto))
    assert "resumed     after step 8" in result.stdout
    for key in ("state_dict", "optimizer_states"):
        a, b = (load_checkpoint(folder / "checkpoints" / "last.ckpt")[key] for folder in (run, longer))
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert "it has finished" in succeeded(command(*auto)).stdout
    refused(command(*auto, "optimizer.lr=0.1"), "already holds a run", "optimizer.lr")
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    begun = succeeded(command(*auto[:2], f"hydra.run.dir={run.parent / 'new'}"))
    assert "resumed" not in begun.stdout
    refused(command(*auto[:2]), "run.resume=auto", "hydra.run.dir")


def test_weights_alone_are_none_to_go_on_from(command, run):
    path = run / "checkpoints" / "last.ckpt"
    torch.save({"state_dict": load_checkpoint(path)["state_dict"]}, path)
    refused(command.bare(f"ckpt_path={run}"), "no global_step", "hydra.run.dir")
    assert path.exists()


def test_rows_of_a_damaged_metrics_file_are_left_out(command, run):
    rows = (run / "metrics.jsonl").read_text().splitlines()
    strange = [json.dumps({"step": step, "seconds": 1}) for step in ([], None, "x")]
    damaged = [*rows[:3], "{", "null", json.dumps({"step": 1}), *strange, *rows[3:], rows[-1][:10]]
    (run / "metrics.jsonl").write_text("\n".join(damaged))
    succeeded(command.bare(f"ckpt_path={run}"))
    assert [row["step"] for row in rows_of(run) if "train/loss" in row] == list(range(1, 10))


def test_a_step_that_is_left_open_is_no_other_run(train, tmp_path):
    """As with trainer=gpu: the same command finds its run again, though config.yaml has a number."""
    auto = ("tokens_per_step=null", "run.resume=auto", "hydra.run.dir=run")
    succeeded(train(*auto))
    assert summary_of(tmp_path / "run")["tokens_seen"] == 6 * 2048
    assert "it has finished" in succeeded(train(*auto)).stdout
    succeeded(train.bare("ckpt_path=run", "trainer.max_steps=7"))
    refused(train.bare("ckpt_path=run", "tokens_per_step=null"), "tokens_per_step=null would change", "2048")
