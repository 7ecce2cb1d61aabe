"""Malicious runs and model folders, given to train.py and every tool."""

import os
from collections import Counter
from functools import partial
from pathlib import Path
from random import Random

from scripts.soak.attacks import CANARY, MODELS, RUNS, SECRET, SECRET_NAME
from scripts.soak.programs import Broken, Program, limit_memory
from scripts.soak.runs import STEPS, copied, new_run, reference
from scripts.soak.trials import Row, failures, held, run_trials

TEST = "malicious checkpoints, configs, tokenizers and exports, given to train.py and every tool"
# How each program is given ./run or ./model.
OPENERS = {
    "train.py ckpt_path=": ("train.py", "ckpt_path=run", f"trainer.max_steps={STEPS + 1}"),
    "train.py init_from=": ("train.py", "init_from=run", "hydra.run.dir=new", "trainer.max_steps=1"),
    "generate": ("scripts.generate", "run", "--prompt", "a", "--max-tokens", "2"),
    "evaluate": ("scripts.evaluate", "run", "--json", "figures.json"),
    "export": ("scripts.export", "run", "exported"),
    "compare": ("scripts.compare", "run"),
    "convert": ("scripts.convert", "run", "converted", "--kv-compressed-dim", "8", "--rope-dim", "4"),
    "import_hf": ("scripts.import_hf", "model", "imported"),
}
# What opens the files that another user's run names, if it is told so: then the attack gets further.
TRUST = {
    "train.py ckpt_path=": "trust=true", "train.py init_from=": "trust=true", "evaluate": "--trust",
    "export": "--trust", "convert": "--trust",
}  # fmt: skip


def soak(root: Path, folder: Path, quick: bool, random: Random) -> Row:
    model = folder / "model"
    Program("scripts.export", [reference(root), model], reference(root).parent).expect(0)
    cases = [(attack, opener, "") for attack in RUNS for opener in OPENERS if opener != "import_hf"]
    cases += [(attack, opener, trust) for attack in RUNS for opener, trust in TRUST.items()]
    cases += [(attack, "import_hf", "") for attack in MODELS]
    if quick:
        cases = random.sample(cases, 16)
    outcomes = run_trials(partial(trial, root=root, model=model), cases, folder / "trials", seconds=600)
    statuses = Counter(outcome.value for outcome in outcomes)
    return Row(
        f"{held(outcomes)} ended with status 0 ({statuses[0]}) or with 2 and a message ({statuses[2]}); "
        f"{sum('was run' in seen for seen in failures(outcomes))} executed, "
        f"{sum('got out' in seen for seen in failures(outcomes))} secrets out",
        failures(outcomes),
    )


def trial(folder: Path, attack: str, opener: str, trust: str, root: Path, model: Path) -> int:
    copied(reference(root), folder / "run")
    copied(model, folder / "model")
    (RUNS | MODELS)[attack](folder)
    name, *arguments = OPENERS[opener]
    if "init_from=run" in arguments:
        arguments = new_run(root, *arguments)
    process = Program(name, [*arguments, *trust.split()], folder, prepare)
    try:
        result = process.expect(0, 2)
    finally:
        check_harmless(folder)
    if result.returncode and not result.stderr.strip():
        raise Broken("it is refused without a message")
    if "index" in attack and not result.returncode:
        raise Broken("files outside the folder, or no safetensors, were taken for its weights")
    return result.returncode


def prepare() -> None:
    os.environ[SECRET_NAME] = SECRET
    limit_memory()


def check_harmless(folder: Path) -> None:
    """Raises Broken where code was run, or the secret is in any file or its name."""
    if (folder / CANARY).exists():
        raise Broken("its code was run")
    for file in sorted(folder.rglob("*")):
        if SECRET in file.name or (file.is_file() and SECRET.encode() in file.read_bytes()):
            raise Broken(f"the secret got out, into {file.relative_to(folder)}")
