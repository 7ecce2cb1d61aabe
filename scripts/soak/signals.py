"""Signals at any moment of a run; all stop it at a step, and it goes on as if it had not stopped."""

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
from scripts.soak.programs import Broken, Program, before, until
from scripts.soak.runs import STEPS, check_same, checkpoints_of, go_on, new_run, reference, steps_done
from scripts.soak.trials import Row, failures, held, run_trials

TEST = "SIGTERM, SIGINT, SIGHUP, SIGUSR1 at random moments, also in validation, testing, compiling; a second Ctrl-C"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
# The hook in which the process sends itself the signal, and how often that is called in a run, at least.
HOOKS = {"validating": ("validation_step", 40), "testing": ("test_step", 6)}
AT_ONCE = 5.0  # seconds that a second Ctrl-C may take
SLOW = 15.0  # seconds of the step in which it comes
COMPILED = ("compile=true", "model.num_layers=1", "samples.max_tokens=0")
COMPILE_SECONDS = 300.0


def soak(root: Path, folder: Path, quick: bool, random: Random) -> Row:
    times = {"starting": 1, "training": 5, "validating": 2, "testing": 2}
    pairs = [(signum, moment) for signum in SIGNALS for moment, count in times.items() for _ in range(count)]
    if quick:  # each signal and each moment once
        pairs = list(zip(SIGNALS, times, strict=True))
    cases = [(signum, moment, random.getrandbits(32)) for signum, moment in pairs]
    outcomes = run_trials(partial(trial, root=root), cases, folder / "trials", seconds=600)
    outcomes += run_trials(second, [(root,)], folder / "second", seconds=60)
    outcomes += run_trials(nohup, [(root,)], folder / "nohup", seconds=60)
    if not quick:  # a compiled run takes a minute
        cases = [(signum, random.getrandbits(32)) for signum in SIGNALS]
        outcomes += run_trials(partial(compiling, root=root), cases, folder / "compiling", seconds=600)
    counts = Counter(outcome.value for outcome in outcomes if outcome.value)
    return Row(
        f"{held(outcomes)} stopped at a step with status 128 + n, and ended bit-equal when resumed "
        f"({', '.join(f'{count} {moment}' for moment, count in counts.items())})",
        failures(outcomes),
    )


def trial(folder: Path, signum: int, moment: str, seed: int, root: Path) -> str:
    random, command = Random(seed), new_run(root)
    if moment in HOOKS:
        method, calls = HOOKS[moment]
        process = Program("train.py", command, folder, lambda: send_itself(signum, method, random.randrange(calls)))
    else:
        process = Program("train.py", command, folder)
        if moment == "training":
            wanted = random.randrange(1, STEPS - 1)
            until(process, lambda: steps_done(folder / "run") >= wanted)
        time.sleep(random.uniform(0, 0.01 if moment == "training" else 1))
        process.send(signum)
    process.expect(128 + signum)
    if moment != "starting":  # where there is no step yet to stop at
        check_stopped(folder / "run")
    go_on(folder, command)
    check_same(folder / "run", reference(root))
    return moment


def send_itself(signum: int, method: str, number: int) -> None:
    """In a process that is about to train: a signal in the call with this number of a hook."""
    calls = itertools.count()
    before(method, lambda module: next(calls) == number and os.kill(os.getpid(), signum))


def check_stopped(run: Path) -> None:
    """Raises Broken unless the run stopped at a step that is saved, or before the first."""
    summary, saved = RunFolder(run).summary(), checkpoints_of(run).get("last.ckpt", {}).get("global_step", 0)
    if summary.get("finished") is not False or summary["steps"] != saved:
        raise Broken(f"summary.json says {summary.get('steps')} steps, last.ckpt {saved}")


def nohup(folder: Path, root: Path) -> str:
    """Where SIGHUP is ignored, as `nohup` sets it, the run goes on."""
    process = Program("train.py", new_run(root), folder, lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    until(process, lambda: steps_done(folder / "run") > 1)
    process.send(signal.SIGHUP)
    process.expect(0)
    check_same(folder / "run", reference(root))
    return "under nohup"


def second(folder: Path, root: Path) -> str:
    """A second Ctrl-C, in a step that takes long, ends the process at once; the last checkpoint is good."""
    command = new_run(root)

    def slow_step() -> None:
        before("training_step", lambda module: time.sleep(SLOW * (module.global_step == STEPS // 2)))

    process = Program("train.py", command, folder, slow_step)
    until(process, lambda: steps_done(folder / "run") == STEPS // 2)
    time.sleep(0.5)
    process.send(signal.SIGINT)
    errors = process.log.with_suffix(".stderr")
    until(process, lambda: "SIGINT" in errors.read_text())
    began = time.monotonic()
    process.send(signal.SIGINT)
    process.expect(130)
    if (seconds := time.monotonic() - began) > AT_ONCE:
        raise Broken(f"a second Ctrl-C ended the run after {seconds:.1f} s")
    go_on(folder, command)
    check_same(folder / "run", reference(root))
    return "second Ctrl-C"


def sources(folder: Path) -> list[Path]:
    return list(folder.glob("compiled/**/*.cpp"))


def compiling(folder: Path, signum: int, seed: int, root: Path) -> str:
    """While the compiler is at work; Ctrl-C and a terminal that closes also reach the processes that it starts."""
    command = new_run(root, *COMPILED)

    def compiler_of(place: Path) -> Callable[[], None]:
        return lambda: os.environ.update(TORCHINDUCTOR_CACHE_DIR=str(place / "compiled"))

    process = Program("train.py", command, folder, compiler_of(folder))
    until(process, (folder / "run" / "config.yaml").is_file)  # before it, only whether there is a compiler is tried
    tried = len(sources(folder))
    until(process, lambda: len(sources(folder)) > tried)
    time.sleep(Random(seed).uniform(0, 5))
    process.send(signum, group=signum in (signal.SIGINT, signal.SIGHUP))
    process.expect(128 + signum, seconds=COMPILE_SECONDS)
    check_stopped(folder / "run")
    go_on(folder, command, compiler_of(folder))
    (folder / "other").mkdir()
    Program("train.py", command, folder / "other", compiler_of(folder)).expect(0, seconds=COMPILE_SECONDS)
    check_same(folder / "run", folder / "other" / "run")
    return "compiling"
