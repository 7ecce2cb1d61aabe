"""Small runs on a small corpus, and their comparison bit by bit."""

import argparse
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from mla_lm.runs.checkpoint import load_checkpoint
from mla_lm.runs.folder import RunFolder
from scripts.soak.programs import Broken, Program

STEPS, VALIDATE_EVERY, SAVE_EVERY = 32, 6, 4
# A step takes some 10 ms and a checkpoint a few MB. Dropout draws random numbers, and a step has two micro-batches.
SMALL = (
    "model=mla_tiny", "model.num_layers=2", "model.d_model=128", "model.seq_len=32", "model.ff_hidden=384",
    "model.attention.kv_compressed_dim=32", "model.attention.rope_dim=8", "model.attention.nope_dim=24",
    "model.attention.value_dim=32", "model.dropout=0.1",
    "trainer.accelerator=cpu", "trainer.precision=32-true", f"trainer.max_steps={STEPS}",
    "tokens_per_step=128", "micro_batch_tokens=64",
    f"val_every_n_steps={VALIDATE_EVERY}", f"checkpoint.every_n_steps={SAVE_EVERY}", "log_every_n_steps=1",
    "samples.max_tokens=4",
    "data=text", "data.tokenizer.vocab_size=300", "data.val_tokens=512", "logger=none", "compile=false",
)  # fmt: skip
MEASURED = ("seconds", "memory/peak_mib", "train/tokens_per_second", "train/mfu")


def prepare_root(root: Path) -> None:
    """What all rows share: corpus.txt, about 100 kB of Python, its token cache, and a run that is not interrupted."""
    shutil.copy(argparse.__file__, root / "corpus.txt")
    reference(root).parent.mkdir()
    Program("train.py", new_run(root), reference(root).parent).expect(0)


def new_run(root: Path, *overrides: str) -> list[str]:
    """train.py's command line for a small run in ./run on the corpus in `root`; later overrides count."""
    data = (f"data.files={root / 'corpus.txt'}", f"data.cache_dir={root / 'cache'}")
    last = {argument.split("=")[0]: argument for argument in (*SMALL, *data, "hydra.run.dir=run", *overrides)}
    return list(last.values())


def reference(root: Path) -> Path:
    """The run that was not interrupted."""
    return root / "reference" / "run"


def go_on(folder: Path, command: list[str], prepare: Callable[[], object] | None = None) -> None:
    """Resume ./run as its user would, to its end: from its checkpoint, or by the same command where it has none."""
    run = RunFolder(folder / "run")
    if not run.summary().get("finished"):
        Program("train.py", ["ckpt_path=run"] if run.is_begun else command, folder, prepare).expect(0)


def copied(run: Path, to: Path) -> Path:
    """A copy of a folder, the programs' output left out."""
    return Path(shutil.copytree(run, to, ignore=shutil.ignore_patterns("log")))


def checkpoints_of(run: Path) -> dict[str, dict]:
    """All checkpoints under their own names, by name; UserError for a damaged one."""
    return {file.name: load_checkpoint(file) for file in sorted((run / "checkpoints").glob("[!.]*.ckpt"))}


def steps_done(run: Path) -> int:
    """Training steps in metrics.jsonl."""
    file = run / "metrics.jsonl"
    return file.read_text().count('"train/loss"') if file.is_file() else 0


def rows_of(run: Path) -> list[dict]:
    """metrics.jsonl without measured times."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in MEASURED} for row in rows]


def check_same(run: Path, other: Path) -> None:
    """Raises Broken unless weights, optimizer, random state, losses and test loss are equal bit by bit."""
    for name in ("last.ckpt", "best.ckpt"):
        here, there = (load_checkpoint(folder / "checkpoints" / name) for folder in (run, other))
        for key in ("global_step", "state_dict", "optimizer_states", "random_state"):
            if not equal(here[key], there[key]):
                raise Broken(f"{run / 'checkpoints' / name}: {key} is not that of the uninterrupted run")
    here, there = rows_of(run), rows_of(other)
    for a, b in zip(here, there, strict=False):
        if a != b:
            raise Broken(f"{run / 'metrics.jsonl'} has {a}, the uninterrupted run {b}")
    if len(here) != len(there):
        raise Broken(f"{run / 'metrics.jsonl'} has {len(here)} rows, that of the uninterrupted run {len(there)}")
    if RunFolder(run).summary()["test_loss"] != RunFolder(other).summary()["test_loss"]:
        raise Broken(f"{run / 'summary.json'} has another test_loss than the uninterrupted run")


def equal(a: Any, b: Any) -> bool:
    """Whether nested dicts and lists of tensors and numbers are the same, bit by bit."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, torch.Tensor):
        same_kind = isinstance(b, torch.Tensor) and (a.dtype, a.shape) == (b.dtype, b.shape)
        return same_kind and a.numpy().tobytes() == b.numpy().tobytes()
    return a == b


def files_in(folder: Path) -> Iterator[Path]:
    """Every file below a folder but the programs' output."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and "log" not in path.parts)
