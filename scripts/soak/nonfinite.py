"""NaN and inf, planted in the weights or the gradients of a run."""

import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

import torch

from mla_lm.training.module import LanguageModel
from scripts.soak.programs import Broken, Program, before
from scripts.soak.runs import STEPS, VALIDATE_EVERY, check_same, checkpoints_of, go_on, new_run, reference
from scripts.soak.trials import Row, failures, held, run_trials

TEST = "NaN and inf planted at a random step, in training and in validation"
NAMED = {
    "training": ("loss", "gradient norm", "learning rate", "window"),  # the last: where the step's windows lie
    "validation": ("loss",),
}
VALUES = (math.nan, math.inf)


def soak(root: Path, folder: Path, quick: bool, random: Random) -> Row:
    places = [("weight", "training"), ("gradient", "training"), ("weight", "validation")]
    cases = [
        (what, stage, value, random.getrandbits(32))
        for what, stage in places
        for value in VALUES
        for _ in range(1 if quick else 5)
        if not quick or (value is math.inf) == (what == "gradient")
    ]
    outcomes = run_trials(partial(stopped, root=root), cases, folder / "stopped", seconds=400)
    cases = [(random.getrandbits(32),) for _ in range(1 if quick else 5)]
    skips = run_trials(partial(skipped, root=root), cases, folder / "skipped", seconds=200)
    return Row(
        f"{held(outcomes)} stopped and named, last and best checkpoint finite, bit-equal when resumed; "
        f"{held(skips)} went on to the end with on_nonfinite=skip",
        failures(outcomes + skips),
    )


def stopped(folder: Path, what: str, stage: str, value: float, seed: int, root: Path) -> None:
    random, command = Random(seed), new_run(root)
    unit = VALIDATE_EVERY if stage == "validation" else 1
    step = random.randrange(unit, STEPS, unit)
    process = Program("train.py", command, folder, lambda: plant(what, stage, value, step, random))
    message = process.expect(1).stderr
    if not re.search(rf"\bstep {step}\b", message):
        raise Broken(f"step {step} is not named: {message.strip()}")
    if missing := [word for word in NAMED[stage] if word not in message]:
        raise Broken(f"no {missing[0]} is named: {message.strip()}")
    check_finite(folder / "run")
    go_on(folder, command)
    check_same(folder / "run", reference(root))


def skipped(folder: Path, seed: int, root: Path) -> None:
    """Gradients that are no numbers, in three steps."""
    random = Random(seed)
    steps = random.sample(range(1, STEPS), 3)

    def plants() -> None:
        for step in steps:
            plant("gradient", "training", random.choice(VALUES), step, random)

    Program("train.py", new_run(root, "on_nonfinite=skip"), folder, plants).expect(0)
    check_finite(folder / "run")


def plant(what: str, stage: str, value: float, step: int, random: Random) -> None:
    """In a process that is about to train: put `value` into a matrix, or its gradient, at this step."""

    def act(module: LanguageModel) -> None:
        if module.global_step != (step - 1 if stage == "training" else step):
            return
        matrices = [weight for name, weight in module.net.named_parameters() if "blocks." in name and weight.ndim == 2]
        matrix = random.choice(matrices)
        row, column = (random.randrange(size) for size in matrix.shape)
        if what == "weight":
            matrix.data[row, column] = value
        else:
            spoil_next_gradient(matrix, lambda gradient: gradient[row].__setitem__(column, value))

    before("training_step" if stage == "training" else "validation_step", act)


def spoil_next_gradient(weight: torch.Tensor, spoil: Callable[[torch.Tensor], object]) -> None:
    def hook(gradient: torch.Tensor) -> torch.Tensor:
        handle.remove()
        gradient = gradient.clone()
        spoil(gradient)
        return gradient

    handle = weight.register_hook(hook)


def check_finite(run: Path) -> None:
    """Raises Broken where a checkpoint holds a value that is no finite number."""
    for name, checkpoint in checkpoints_of(run).items():
        for key in ("state_dict", "optimizer_states"):
            if not finite(checkpoint[key]):
                raise Broken(f"{run / 'checkpoints' / name}: {key} has values that are not finite")


def finite(tree: object) -> bool:
    if isinstance(tree, dict | list | tuple):
        return all(map(finite, tree.values() if isinstance(tree, dict) else tree))
    if isinstance(tree, torch.Tensor):
        return bool(tree.isfinite().all())
    return not isinstance(tree, float) or math.isfinite(tree)
