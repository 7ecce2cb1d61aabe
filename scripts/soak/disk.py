"""Disks that fill up or turn read-only under a run, and output that nobody reads any more."""

import os
import resource
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from random import Random

from scripts.soak.programs import Broken, Program, before, until
from scripts.soak.runs import STEPS, check_same, checkpoints_of, files_in, go_on, new_run, reference, steps_done
from scripts.soak.trials import Row, failures, held, run_trials

TEST = "disk full at random writes, read-only folder, closed stdout"
PLENTY = 2**28  # bytes of a disk that does not fill up
FULL, READ_ONLY = "No space left on device", "Read-only file system"
TOO_LARGE = "File too large"  # what a limit on the size of files gives
TRAIN = Path(__file__).parents[2] / "train.py"


def soak(root: Path, folder: Path, quick: bool, random: Random) -> Row:
    kinds = {"limit": 5, "closed stdout": 4}
    mounting = can_mount(folder)
    if mounting:
        kinds |= {"full": 20, "full token cache": 5, "read-only": 1, "read-only later": 4}
    if quick:
        kinds = {kind: 1 for kind in kinds if kind not in ("limit", "read-only later")}
    cases = [(kind, random.getrandbits(32)) for kind, times in kinds.items() for _ in range(times)]
    outcomes = run_trials(partial(trial, root=root), cases, folder / "trials", seconds=600)
    counts = Counter(outcome.value for outcome in outcomes if outcome.value)
    return Row(
        f"{held(outcomes)} said why; the checkpoint from before loads, and the run ends bit-equal "
        f"({', '.join(f'{count} {kind}' for kind, count in counts.items())}"
        f"{'' if mounting else '; full and read-only disks were left out, as only root can mount them'})",
        failures(outcomes),
    )


def can_mount(folder: Path) -> bool:
    """Whether this user can make a disk of memory."""
    try:
        with disk(folder / "try", PLENTY):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


@contextmanager
def disk(folder: Path, size: int, options: str = "") -> Iterator[None]:
    """A disk of memory at `folder`; at the end its files are in the folder itself."""
    folder.mkdir(parents=True, exist_ok=True)
    mount(folder, f"size={size}{options}")
    try:
        yield
    finally:
        copy = Path(shutil.copytree(folder, folder.with_name(f"{folder.name}-files")))
        subprocess.run(["umount", "--lazy", folder], check=True)
        folder.rmdir()
        copy.rename(folder)


def mount(folder: Path, options: str) -> None:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
    subprocess.run(command, check=True, capture_output=True)


def trial(folder: Path, kind: str, seed: int, root: Path) -> str:
    KINDS[kind](folder, Random(seed), root)
    check_same(folder / "run", reference(root))
    return kind


def full(folder: Path, random: Random, root: Path) -> None:
    """The run folder's disk is too small."""
    size = random.uniform(0.02, 1) * size_of(reference(root))
    with disk(folder / "run", int(size)):
        fails_and_goes_on(folder, new_run(root), FULL, lambda: mount(folder / "run", f"remount,size={PLENTY}"))


def full_cache(folder: Path, random: Random, root: Path) -> None:
    """The token cache's disk is too small."""
    size, command = random.uniform(0.1, 0.9) * size_of(root / "cache"), new_run(root, f"data.cache_dir={folder}/cache")
    with disk(folder / "cache", int(size)):
        fails_and_goes_on(folder, command, FULL, lambda: mount(folder / "cache", f"remount,size={PLENTY}"))


def limit(folder: Path, random: Random, root: Path) -> None:
    """From some step on, files cannot grow to the size of a checkpoint."""
    size = (reference(root) / "checkpoints" / "last.ckpt").stat().st_size
    step, most = random.randrange(STEPS), random.randrange(2**18, size)

    def lower() -> None:
        before("training_step", lambda module: module.global_step == step and limit_files(most))

    fails_and_goes_on(folder, new_run(root), TOO_LARGE, lambda: None, lower)


def limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def read_only(folder: Path, random: Random, root: Path) -> None:
    """From the start: a new run, its token cache, a run to go on with."""
    killed = new_run(root)
    process = Program("train.py", killed, folder)
    until(process, lambda: steps_done(folder / "run") > STEPS // 2)
    process.kill()
    (folder / "run").rename(folder / "kept")
    with disk(folder / "run", PLENTY):
        shutil.copytree(folder / "kept", folder / "run", dirs_exist_ok=True)
        mount(folder / "run", "remount,ro")
        for command in (
            ["ckpt_path=run"],
            new_run(root, "hydra.run.dir=run/new"),
            new_run(root, "hydra.run.dir=new", "data.cache_dir=run/cache"),
        ):
            result = Program("train.py", command, folder).expect(2)
            if READ_ONLY not in result.stderr:
                raise Broken(f"the reason is not named: {result.stderr.strip()}")
        mount(folder / "run", "remount,rw")
        go_on(folder, killed)


def read_only_later(folder: Path, random: Random, root: Path) -> None:
    """From some step on, as where a disk reports errors."""
    step = random.randrange(1, STEPS)

    def turn() -> None:
        before("training_step", lambda module: module.global_step == step and make_read_only(folder / "run"))

    with disk(folder / "run", PLENTY):
        fails_and_goes_on(folder, new_run(root), READ_ONLY, lambda: mount(folder / "run", "remount,rw"), turn)


def make_read_only(folder: Path) -> None:
    """As soon as no file there is being written."""
    while True:
        with suppress(subprocess.CalledProcessError):
            mount(folder, "remount,ro")
            return
        time.sleep(0.001)


def fails_and_goes_on(
    folder: Path, command: list[str], reason: str, mend: Callable[[], object], prepare: Callable | None = None
) -> None:
    """A run that cannot be saved says why and ends, and goes on when that is mended; or it was saved in the end."""
    result = Program("train.py", command, folder, prepare).expect(0, 1, 2)
    if result.returncode and reason not in result.stderr:
        raise Broken(f"the reason is not named: {result.stderr.strip() or 'nothing is said'}")
    checkpoints_of(folder / "run")
    mend()
    if result.returncode:
        go_on(folder, command)


def closed_stdout(folder: Path, random: Random, root: Path) -> None:
    """Its reader ends after some lines, in a shell; the run does not need one."""
    command = shlex.join([sys.executable, str(TRAIN), *new_run(root)])
    with open(folder / "errors", "w") as errors:
        status = subprocess.run(
            ["bash", "-c", f"{command} | head -n {random.randrange(1, 120)} > head; exit ${{PIPESTATUS[0]}}"],
            cwd=folder, stderr=errors, timeout=300,
        ).returncode  # fmt: skip
    if status:
        raise Broken(f"it ended with status {status}")


def size_of(folder: Path) -> int:
    return sum(os.path.getsize(file) for file in files_in(folder))


KINDS = {
    "full": full,
    "full token cache": full_cache,
    "limit": limit,
    "read-only": read_only,
    "read-only later": read_only_later,
    "closed stdout": closed_stdout,
}
