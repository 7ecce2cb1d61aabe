"""Checkpoints that are truncated, bit-flipped, empty or missing."""

import re
from functools import partial
from pathlib import Path
from random import Random

from mla_lm.errors import UserError
from scripts.soak.programs import Broken, Program, until
from scripts.soak.runs import SAVE_EVERY, check_same, checkpoints_of, copied, equal, new_run, reference, steps_done
from scripts.soak.trials import Row, failures, held, run_trials

TEST = "last checkpoint truncated, bit-flipped, empty or missing"
DAMAGED = (("last.ckpt",), ("last.ckpt", "last-1.ckpt"), ("last.ckpt", "best.ckpt"))
REPEATS = {"truncated": 4, "bit-flipped": 8, "empty": 1, "missing": 1}


def soak(root: Path, folder: Path, quick: bool, random: Random) -> Row:
    killed = killed_run(folder / "killed", new_run(root))
    cases = [
        (damage, names, random.getrandbits(32))
        for names in DAMAGED[: 1 if quick else None]
        for damage, times in REPEATS.items()
        for _ in range(1 if quick else times)
    ]
    outcomes = run_trials(partial(trial, killed=killed, root=root), cases, folder, seconds=600)
    return Row(
        f"{held(outcomes)} resumed from the one before, each damaged file named and kept, bit-equal at the end",
        failures(outcomes),
    )


def killed_run(folder: Path, command: list[str]) -> Path:
    """A run that was killed when it had saved some times."""
    folder.mkdir(parents=True)
    process = Program("train.py", command, folder)
    until(process, lambda: steps_done(folder / "run") > 5 * SAVE_EVERY + 1)
    process.kill()
    return folder / "run"


def trial(folder: Path, damage: str, names: tuple[str, ...], seed: int, killed: Path, root: Path) -> None:
    random = Random(seed)
    checkpoints = copied(killed, folder / "run") / "checkpoints"
    whole = checkpoints_of(folder / "run")
    if missing := [name for name in names if name not in whole]:
        raise Broken(f"the run keeps no {missing[0]}")
    lost: dict[str, bytes | None] = {}
    for name in names:
        content = damage_file(checkpoints / name, damage, random)
        if damage != "bit-flipped" or not is_harmless(checkpoints / name, whole[name]):
            lost[name] = content
    result = Program("train.py", ["ckpt_path=run"], folder).expect(0)
    resumed = re.search(r"^resumed +after step (\d+)", result.stdout, re.MULTILINE)
    intact = {checkpoint["global_step"] for name, checkpoint in whole.items() if name not in lost}
    if not resumed or int(resumed[1]) not in intact:
        raise Broken(f"it did not go on from the checkpoint before, but {resumed[0] if resumed else 'began anew'}")
    for name, content in lost.items():
        if content is None or whole[name]["global_step"] < int(resumed[1]):  # older ones need not be read
            continue
        if name not in result.output:
            raise Broken(f"the damaged {name} is not named")
        if not any(file.read_bytes() == content for file in checkpoints.iterdir() if file.name not in whole):
            raise Broken(f"the damaged {name} is not kept")
    check_same(folder / "run", reference(root))


def damage_file(path: Path, damage: str, random: Random) -> bytes | None:
    """What is in the file then; None where it is gone."""
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
        return None
    if damage == "bit-flipped":
        content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    else:
        del content[0 if damage == "empty" else random.randrange(1, len(content)) :]
    path.write_bytes(content)
    return bytes(content)


def is_harmless(path: Path, whole: dict) -> bool:
    """Whether a flipped bit changed nothing that is read: one in the padding of the archive, say."""
    try:
        return equal(checkpoints_of(path.parents[1])[path.name], whole)
    except UserError:
        return False
