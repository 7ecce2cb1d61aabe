"""Finished runs side by side; runs that differ in their seed alone become one row."""

import csv
import io
import json
import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from mla_lm.config import TrainConfig, differing
from mla_lm.errors import UserError
from mla_lm.keys import flatten
from mla_lm.model.size import model_size
from mla_lm.runs.folder import RunFolder, find_run

# key of Run.figures, heading, format
COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("attention", "attention", str),
    ("parameters", "parameters", "{:,}".format),
    ("flops_per_token", "FLOPs/token", lambda flops: f"{flops / 1e6:,.1f}M"),
    ("tokens_seen", "tokens", "{:,}".format),
    ("val_perplexity", "val ppl", "{:.2f}".format),
    ("test_perplexity", "test ppl", "{:.2f}".format),
    ("val_bits_per_byte", "val bits/byte", "{:.4f}".format),
    ("test_bits_per_byte", "test bits/byte", "{:.4f}".format),
    ("kv_cache_bytes_per_token", "cache B/token", "{:,.0f}".format),
    ("kv_cache_vs_mha", "vs MHA", "{:.3f}".format),
    ("tokens_per_second", "tokens/s", "{:,.0f}".format),
)
OF_ONE_TOKENIZER = ("val_perplexity", "test_perplexity")
SIZE = ("model.num_layers", "model.d_model")


@dataclass
class Run:
    """A run that came to its end."""

    folder: RunFolder
    config: TrainConfig
    figures: dict[str, Any]  # summary.json, and flops_per_token

    @property
    def keys(self) -> dict[str, Any]:
        """The configuration by dotted keys."""
        return flatten(asdict(self.config))


def runs_in(path: str) -> list[RunFolder]:
    """The run that a path names, or the runs side by side in a folder."""
    parent = Path(path).expanduser().absolute()
    children = sorted(parent.glob("*/config.yaml"), key=lambda file: (len(file.parent.name), file))  # 2 before 10
    if children and not (parent / "config.yaml").exists():
        return [RunFolder(child.parent) for child in children]
    return [find_run(path)[0]]


def load(folder: RunFolder) -> Run:
    """Raises UserError for a run that has not finished, or was none of training."""
    summary, config = folder.summary(), folder.config()
    if not summary:
        raise UserError(
            f"{folder.path} has no summary.json: it was imported, converted, or killed before its end.\n"
            "  scripts.evaluate measures such a model; train.py ckpt_path=RUN goes on with a run that was killed"
        )
    if not summary.get("finished"):
        raise UserError(f"{folder.path} has not finished: python train.py ckpt_path={folder.path} goes on with it")
    if summary["attention"] != config.model.attention.kind:
        raise UserError(
            f"{folder.summary_file} is damaged: it is of {summary['attention']}, config.yaml of another kind"
        )
    return Run(folder, config, {**summary, "flops_per_token": model_size(config.model).flops_per_token})


def same_but_for_seed(runs: list[Run]) -> list[list[Run]]:
    """Group runs whose data and configurations are equal except for the seed, in the order of their first run."""
    keys = [key for key in differing([run.config for run in runs]) if key != "seed"]
    groups = defaultdict(list)
    for run in runs:
        groups[json.dumps([run.figures["data_fingerprint"], [run.keys[key] for key in keys]])].append(run)
    return list(groups.values())


def named_rows(groups: list[list[Run]]) -> dict[str, list[Run]]:
    """Each group under a name: its first run's folder, how many runs it has, and what sets it apart from the others."""
    paths = [group[0].folder.path for group in groups]
    folders = [path.name for path in paths]
    if len(set(folders)) < len(folders):
        shared = os.path.commonpath([path.parent for path in paths])
        folders = [str(path.relative_to(shared)) for path in paths]
    rows = {}
    for folder, group in zip(folders, groups, strict=True):
        if len(group) > 1:
            differ_in_seed = len({run.config.seed for run in group}) == len(group)
            folder += f" ({len(group)} {'seeds' if differ_in_seed else 'runs'})"
        keys = telling_keys(group[0], groups)
        settings = [f"{key}={shortened(shown(group[0].keys[key]))}" for key in keys]
        rows[", ".join([folder, *settings])] = group
    return rows


def telling_keys(run: Run, groups: list[list[Run]]) -> list[str]:
    """The keys that distinguish a run. Its model's keys distinguish it from the most similar models only.

    What differs between kinds of attention, and besides depth and width between sizes, the columns tell; the steps too.
    """
    others = [group[0] for group in groups]
    same_kind = [other for other in others if other.config.model.attention.kind == run.config.model.attention.kind]
    same_size = [other for other in same_kind if all(other.keys[key] == run.keys[key] for key in SIZE)]
    keys = [key for key in differing([other.config for other in same_kind]) if key in SIZE]
    keys += [key for key in differing([other.config for other in same_size]) if key.startswith("model.")]
    keys += [key for key in differing([other.config for other in others]) if not key.startswith("model.")]
    return [key for key in keys if key not in ("seed", "trainer.max_steps")]


def shown(value: Any) -> str:
    """As it would be typed on train.py's command line."""
    return value if isinstance(value, str) else json.dumps(value)


def shortened(text: str, most: int = 40) -> str:
    """The end of a long value, where one path differs from another."""
    return text if len(text) <= most else "..." + text[3 - most :]


def cells_of(row: list[Run], columns: list[tuple]) -> list[str]:
    """A row of the table: of one run, or the mean and the standard deviation over several seeds."""
    cells = []
    for key, _, form in columns:
        values = [run.figures[key] for run in row]
        if None in values:
            cells.append("-")
        elif len(set(values)) == 1:
            cells.append(form(values[0]))
        else:
            cells.append(f"{form(mean(values))} ± {form(stdev(values))}")
    return cells


def caption(runs: list[Run]) -> str:
    """What differs between the data of the runs, and what that means."""
    keys = [key for key in differing([run.config for run in runs]) if key.startswith(("data.", "init_from"))]
    return (
        f"Across data, only bits per byte compares; these differ in {', '.join(keys) or 'the text of their files'}.\n"
        "A validation sample is of data.val_tokens tokens, other text for other tokenizers; test is of a whole split."
    )


def every_run(runs: list[Run]) -> str:
    """All figures of each run, seeds apart, and the settings by which the runs differ, as CSV."""
    keys = differing([run.config for run in runs])
    rows = [{"run": run.folder.path} | {key: shown(run.keys[key]) for key in keys} | run.figures for run in runs]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
