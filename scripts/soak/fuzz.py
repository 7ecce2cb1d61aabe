"""Command lines and data that nobody would think of, and every file of a run spoiled at random."""

import hashlib
from collections import Counter
from functools import partial
from pathlib import Path
from random import Random

from scripts.soak.mutations import mutate
from scripts.soak.programs import Broken, Program, limit_memory
from scripts.soak.runs import STEPS, copied, files_in, new_run
from scripts.soak.trials import Row, failures, held, run_trials

TEST = "drawn command lines and data files, and every file of a run folder spoiled at random"
READERS = {
    "load_run": ("load_run", "run"),
    "compare": ("scripts.compare", "run", "other"),
    "generate": ("scripts.generate", "run", "--prompt", "a", "--max-tokens", "2"),
    "resume": ("train.py", "ckpt_path=run", f"trainer.max_steps={STEPS}"),  # which it has: decides, and is done
    "resume for more": ("train.py", "ckpt_path=run", f"trainer.max_steps={STEPS + 1}"),
}
TINY = (
    "model.d_model=32", "model.ff_hidden=64", "model.attention.kv_compressed_dim=8", "model.attention.rope_dim=4",
    "model.attention.nope_dim=4", "model.attention.value_dim=8",
)  # fmt: skip
SECONDS = 60.0  # that a program may take


def soak(root: Path, folder: Path, quick: bool, random: Random) -> Row:
    from scripts.soak.drawn import examples  # needs hypothesis, which the other rows do not

    run = whole_run(root, folder / "whole")
    commands = examples(8 if quick else 500, random.getrandbits(32))
    drawn = run_trials(partial(command_trial, run=run, root=root), commands, folder / "drawn", seconds=900)
    names = [str(file.relative_to(run)) for file in files_in(run)]
    cases = [
        (names[number % len(names)], random.choice(list(READERS)), random.getrandbits(32))
        for number in range(16 if quick else 2000)
    ]
    spoiled = run_trials(partial(file_trial, run=run), cases, folder / "spoiled", seconds=900)
    statuses = Counter(outcome.value for outcome in drawn + spoiled)
    return Row(
        f"{held(drawn)} command lines and {held(spoiled)} spoiled files ended with status 0 ({statuses[0]}) or 2 "
        f"({statuses[2]}), no traceback, and nothing was written over",
        failures(drawn + spoiled),
    )


def whole_run(root: Path, folder: Path) -> Path:
    """A finished run with all its files, and a model that is copied and loaded in no time."""
    folder.mkdir(parents=True)
    Program("train.py", new_run(root, *TINY), folder).expect(0)
    (folder / "run" / "wandb_id").write_text("0123abcd\n")
    return folder / "run"


def command_trial(folder: Path, arguments: list[str], name: str, content: bytes, run: Path, root: Path) -> int:
    """A small run of two steps on a drawn file, with drawn arguments after it."""
    (folder / name).write_bytes(content)
    (folder / "notes.txt").write_text("mine")
    copied(run, folder / "other")
    before = contents(folder)
    cache = f"data.cache_dir={folder / 'cache'}"
    command = new_run(root, *TINY, f"data.files={folder / name}", cache, "trainer.max_steps=2", "val_every_n_steps=1")
    result = Program("train.py", [*command, *arguments], folder, limit_memory).expect(0, 2, seconds=SECONDS)
    check_kept(before, contents(folder), went_on=False)
    return result.returncode


def file_trial(folder: Path, name: str, reader: str, seed: int, run: Path) -> int:
    """A run with a spoiled file, given to a program that reads it."""
    copied(run, folder / "run")
    copied(run, folder / "other")
    file = folder / "run" / name
    mutated = mutate(file.read_bytes(), name, Random(seed))
    file.write_bytes(mutated)
    before = contents(folder)
    program, *arguments = READERS[reader]
    result = Program(program, arguments, folder, limit_memory).expect(0, 2, seconds=SECONDS)
    check_kept(before, contents(folder), went_on=reader.startswith("resume") and result.returncode == 0)
    return result.returncode


def contents(folder: Path) -> dict[str, str]:
    """Hashes of all files, by their paths within the folder."""
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files_in(folder)}


def check_kept(before: dict[str, str], after: dict[str, str], went_on: bool) -> None:
    """Raises Broken where a file was written over: any but those of a run that goes on.

    A damaged checkpoint may have another name.
    """
    for path, content in before.items():
        own = path.startswith("run/")
        if own and went_on:
            continue
        if after.get(path) != content and not (own and path.endswith(".ckpt") and content in after.values()):
            raise Broken(f"{path} was written over")
