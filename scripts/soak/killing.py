"""kill -9, at a random moment, inside a save, and while tokenising."""

import itertools
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

from mla_lm.runs.folder import RunFolder
from scripts.soak.programs import Broken, Program, until
from scripts.soak.runs import check_same, go_on, new_run, reference
from scripts.soak.trials import Row, failures, held, run_trials

TEST = "`kill -9` at a random moment, half inside a save, a quarter while tokenising; resume"
ATTEMPTS = 12  # to hit the moment
SAVE_SECONDS = 0.01  # about what a save takes


def soak(root: Path, folder: Path, quick: bool, random: Random) -> Row:
    runs = 3 if quick else 50
    turns = ("inside a save", "while tokenising", "anywhere", "inside a save")
    moments = itertools.islice(itertools.cycle(turns), runs)
    cases = [(moment, random.getrandbits(32)) for moment in moments]
    outcomes = run_trials(partial(trial, root=root), cases, folder, seconds=900)
    counts = Counter(itertools.chain(*(outcome.value for outcome in outcomes if outcome.value)))
    return Row(
        f"{held(outcomes)} went on; weights, optimizer, random state and losses bit-equal to the uninterrupted run "
        f"({', '.join(f'{count} {what}' for what, count in counts.items())})",
        failures(outcomes),
    )


def trial(folder: Path, moment: str, seed: int, root: Path) -> list[str]:
    """Kill a run, go on with it, and compare; returns what the kill hit."""
    random, seconds = Random(seed), RunFolder(reference(root)).summary()["total_seconds"]
    for attempt in range(ATTEMPTS):
        place = folder / str(attempt)
        place.mkdir()
        command = new_run(root, f"data.cache_dir={place / 'cache'}") if moment == "while tokenising" else new_run(root)
        process = Program("train.py", command, place)
        stopped = MOMENTS[moment](process, place, random, seconds * 0.8**attempt)
        process.kill()
        if stopped:
            break
    else:
        raise Broken(f"no run could be killed {moment} in {ATTEMPTS} attempts")
    begun = RunFolder(place / "run").is_begun
    go_on(place, command)
    check_same(place / "run", reference(root))
    if leftovers := [path.name for path in (place / "run" / "checkpoints").iterdir() if path.name.startswith(".")]:
        raise Broken(f"{leftovers[0]} is left over from the save that was killed")
    return [moment] if begun else [moment, "before a first checkpoint"]


def saving(process: Program, folder: Path, random: Random, seconds: float) -> bool:
    """Stop it where a temporary file says that a checkpoint is being written."""
    checkpoints, skipped, seen = folder / "run" / "checkpoints", random.randrange(10), set()

    def being_written() -> set[str]:
        names = os.listdir(checkpoints) if checkpoints.is_dir() else []
        return {name for name in names if name.startswith((".last", ".best"))}

    def stopped() -> bool:
        new = being_written() - seen
        if not new:
            return False
        seen.update(new)
        if len(seen) <= skipped:
            return False
        time.sleep(random.uniform(0, SAVE_SECONDS))
        return _stopped_while(process, lambda: bool(being_written()))

    return until(process, stopped, pause=0.0003)


def tokenising(process: Program, folder: Path, random: Random, seconds: float) -> bool:
    """Stop it while the draft of a token store is there."""

    def draft() -> bool:
        return any(folder.glob("cache/*.tmp"))

    if not until(process, draft):
        return False
    time.sleep(random.uniform(0, 0.2 * seconds))
    return _stopped_while(process, draft)


def anywhere(process: Program, folder: Path, random: Random, seconds: float) -> bool:
    time.sleep(random.uniform(0, seconds))
    return _stopped_while(process, lambda: True)


def _stopped_while(process: Program, condition: Callable[[], bool]) -> bool:
    """Hold the process, and let it go again where what was seen is over by now."""
    if not process.running:
        return False
    process.send(signal.SIGSTOP)
    time.sleep(0.001)
    if process.running and condition():
        return True
    process.send(signal.SIGCONT)
    return False


MOMENTS = {"inside a save": saving, "while tokenising": tokenising, "anywhere": anywhere}
