"""Rows of a result, from the run folders of each: estimates over seeds, curves, and paired differences."""

import json
import math
import platform
from typing import Any

import numpy as np

from mla_lm.data.config import DataConfig
from mla_lm.errors import UserError
from mla_lm.runs.folder import RunFolder
from mla_lm.study.collect import Run
from mla_lm.study.result import Curve, Estimate, Row
from mla_lm.study.statistics import estimate, paired_difference
from mla_lm.study.window_losses import WindowLosses, window_losses

FIGURES = {  # of a row, by the key of summary.json or of Run.figures
    "parameters": "parameters",
    "flops_per_token": "flops_per_token",
    "cache_bytes_per_token": "kv_cache_bytes_per_token",
    "cache_vs_mha": "kv_cache_vs_mha",
    "tokens_seen": "tokens_seen",
}
ESTIMATES = (
    *(f"{split}_{measure}" for split in ("val", "test") for measure in ("loss", "perplexity", "bits_per_byte")),
    "tokens_per_second",
    "peak_memory_bytes",
)
MACHINE = {  # of a result, by the key of summary.json
    "processor": "processor",
    "device": "accelerator",
    "threads": "threads",
    "precision": "precision",
    "torch": "torch_version",
    "commit": "git_commit",
}
NOT_RECORDED = "not recorded"  # by a run from before the key existed


def row_of(name: str, runs: list[Run], size: str | None = None) -> Row:
    """The row of runs that differ in their seed alone, without curve and difference.

    Unfinished runs count for nothing, nor does a second run of the same seed; the row's notes say so.

    Args:
        runs: at least one is finished
        size: by default layers x width
    """
    counted = counted_runs(runs)
    first = counted[0]
    model = first.config.model
    figures = {key: first.figures[own] for key, own in FIGURES.items() if first.figures[own] is not None}
    values: dict[str, list[Any]] = {key: [run.figures.get(key) for run in counted] for key in ESTIMATES}
    return Row(
        name=name,
        kind=first.kind,
        size=size or f"{model.num_layers} x {model.d_model}",
        runs=[str(run.folder.path) for run in counted],
        seeds=[run.config.seed for run in counted],
        figures=figures | {"lr": first.config.optimizer.lr},
        estimates={key: estimate(own) for key, own in values.items() if _are_numbers(own)},
        notes=_notes(runs, counted),
    )


def counted_runs(runs: list[Run]) -> list[Run]:
    """The finished ones, the first of each seed."""
    by_seed: dict[int, Run] = {}
    for run in runs:
        if not run.unfinished:
            by_seed.setdefault(run.config.seed, run)
    return list(by_seed.values())


def _are_numbers(values: list[Any]) -> bool:
    return all(type(value) in (int, float) and math.isfinite(value) for value in values)


def _notes(runs: list[Run], counted: list[Run]) -> list[str]:
    unfinished = sum(run.unfinished is not None for run in runs)
    repeated = len(runs) - unfinished - len(counted)
    notes = []
    if unfinished:
        notes.append(f"{unfinished} of {len(runs)} runs {_are(unfinished)} unfinished and left out")
    if repeated:
        notes.append(f"{repeated} of {len(runs)} runs {_are(repeated)} of a seed that is there already, and left out")
    if len(counted) < 2:
        notes.append("one seed: no interval")
    return notes + _of_several_machines(counted)


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _of_several_machines(runs: list[Run]) -> list[str]:
    """A note if runs whose losses are compared were made on different processors or numbers of threads.

    The same seed on two kinds of CPU ends in different losses.
    """
    machines = dict.fromkeys((recorded(run, "processor"), recorded(run, "threads")) for run in runs)
    if len(machines) < 2:
        return []
    named = "; ".join(f"{processor}, {threads} threads" for processor, threads in machines)
    return [f"runs of different processors or numbers of threads: {named}"]


def recorded(run: Run, key: str) -> Any:
    """A value of summary.json, if the run recorded it."""
    value = run.figures.get(key)
    return NOT_RECORDED if value is None else value


def add_difference(row: Row, runs: list[Run], baseline: Row, baseline_runs: list[Run], trusted: bool = False) -> None:
    """Set the difference of a row's test loss to another row's, or say in its notes why there is none.

    With at least two seeds in common, the losses of their runs in each test window are read, or measured once.

    Args:
        runs, baseline_runs: of the two rows; of the same test split in windows of the same length
        trusted: whether the paths of a run that was made elsewhere may be opened
    """
    others = {run.config.seed: run for run in counted_runs(baseline_runs)}
    pairs = [(run, others[run.config.seed]) for run in counted_runs(runs) if run.config.seed in others]
    if not pairs:
        row.notes.append(f"no seed in common with {baseline.name}, so no difference")
        return
    row.baseline = baseline.name
    differences = [own.figures["test_loss"] - other.figures["test_loss"] for own, other in pairs]
    row.difference = Estimate(differences, sum(differences) / len(differences))
    if len(pairs) < 2:
        if min(len(row.seeds), len(baseline.seeds)) > 1:  # else it is said already
            row.notes.append(f"one seed in common with {baseline.name}: no interval of the difference")
    else:
        try:
            row.difference = _over_windows(
                [tuple(window_losses(run.folder, trusted) for run in pair) for pair in pairs]
            )
        except UserError as error:
            row.notes.append(f"no interval of the difference: {str(error).splitlines()[0]}")
    machines = _of_several_machines([run for pair in pairs for run in pair])
    row.notes += [f"{note} (with {baseline.name})" for note in machines if note not in row.notes]


def _over_windows(pairs: list[tuple[WindowLosses, ...]]) -> Estimate:
    """Raises UserError if runs were measured on other windows, as a damaged test_windows.safetensors may say."""
    tokens = pairs[0][0].tokens
    if not all(np.array_equal(losses.tokens, tokens) for pair in pairs for losses in pair):
        raise UserError("the runs have different test windows")
    own, other = (np.stack([pair[side].nats for pair in pairs]) for side in (0, 1))
    return paired_difference(own, other, tokens, pairs[0][0].documents)


def add_position(row: Row, runs: list[Run], trusted: bool = False) -> None:
    """Set a row's mean test loss at each position in the window, from losses that are read, or measured once.

    Its notes say if they cannot be measured.
    """
    try:
        losses = [window_losses(run.folder, trusted) for run in counted_runs(runs)]
    except UserError as error:  # the text has changed since, for example: all else is known
        row.notes.append(f"no loss by position: {str(error).splitlines()[0]}")
        return
    counts = np.maximum(losses[0].position_tokens, 1)  # a test split shorter than a window reaches no further
    row.position = (sum(one.position_nats for one in losses) / len(losses) / counts).tolist()


def curve_of(runs: list[Run]) -> Curve | None:
    """Validation over training, at the steps that all seeds have; None if there are none.

    Raises:
        UserError: metrics.jsonl is damaged.
    """
    counted = counted_runs(runs)
    curves = [_validations(run.folder) for run in counted]
    tokens = sorted(set.intersection(*map(set, curves)))
    if not tokens:
        return None
    seconds, loss, bits_per_byte = (
        [estimate([curve[count][place] for curve in curves]) for count in tokens] for place in range(3)
    )
    flops = [count * counted[0].figures["flops_per_token"] for count in tokens]
    return Curve(tokens, [spent.mean for spent in seconds], flops, loss, bits_per_byte)


def _validations(run: RunFolder) -> dict[int, tuple[float, float, float]]:
    """By tokens seen: seconds, loss and bits per byte of the validation then.

    Raises:
        UserError: metrics.jsonl is damaged.
    """
    try:
        rows = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
        found = [
            [row[key] for key in ("tokens", "seconds", "val/loss", "val/bits_per_byte")]
            for row in rows
            if "val/loss" in row
        ]
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{run.metrics_file} is damaged: {error}") from error
    if not all(map(_are_numbers, found)):
        raise UserError(f"{run.metrics_file} is damaged: a validation has a value that is no number")
    return {tokens: (seconds, loss, bits) for tokens, seconds, loss, bits in found}


def machine_of(runs: list[Run]) -> dict[str, Any]:
    """What the finished runs were made on, several values joined, and the Python of this process."""
    finished = [run for run in runs if not run.unfinished]
    machine: dict[str, Any] = {}
    for key, own in MACHINE.items():
        values = list(dict.fromkeys(recorded(run, own) for run in finished))
        machine[key] = values[0] if len(values) == 1 else "; ".join(map(str, values))
    return machine | {"python": platform.python_version()}


def corpora_of(runs: list[Run]) -> dict[str, str]:
    """Each fingerprint of text, split and tokenizer, with a description that names no files of this machine."""
    return {run.figures["data_fingerprint"]: described(run.config.data) for run in runs if not run.unfinished}


def described(data: DataConfig) -> str:
    """The data of a run in words."""
    names = [f"{part.source} ({part.path})" if part.source == "hub" else part.source for part in (data.parts or [data])]
    tokenizer = data.tokenizer
    size = f" of {tokenizer.vocab_size:,} tokens" if tokenizer.kind == "bpe" else ""
    return f"{' + '.join(names)}, tokenizer {tokenizer.kind}{size}"
