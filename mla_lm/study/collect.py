"""Run folders gathered into rows: which runs there are, which differ in their seed alone, and what a row is called."""

import json
import os
from collections import Counter
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mla_lm.config import TrainConfig, differing
from mla_lm.errors import UserError
from mla_lm.keys import flatten
from mla_lm.model.size import model_size
from mla_lm.runs.folder import RunFolder, find_run

SIZE = ("model.num_layers", "model.d_model")


@dataclass
class Run:
    """A run, finished or not.

    Attributes:
        figures: the content of summary.json, and flops_per_token; empty where there is no summary
        unfinished: why its figures do not count, and what to do about it; None: they do
    """

    folder: RunFolder
    config: TrainConfig
    figures: dict[str, Any]
    unfinished: str | None = None

    @cached_property
    def keys(self) -> dict[str, Any]:
        """The configuration by dotted keys."""
        return flatten(asdict(self.config))

    @property
    def kind(self) -> str:
        """Of attention."""
        return self.config.model.attention.kind


def runs_in(path: str) -> list[RunFolder]:
    """The run that a path names, or the runs side by side in a folder."""
    parent = Path(path).expanduser().absolute()
    children = sorted(parent.glob("*/config.yaml"), key=lambda file: (len(file.parent.name), file))  # 2 before 10
    if children and not (parent / "config.yaml").exists():
        return [RunFolder(child.parent) for child in children]
    return [find_run(path)[0]]


def load(folder: RunFolder) -> Run:
    """Read a run's configuration and figures.

    Raises:
        UserError: they are damaged, or contradict each other.
    """
    summary, config = folder.summary(), folder.config()
    if not summary:
        return Run(
            folder,
            config,
            {},
            f"{folder.path} has no summary.json: it was imported, converted, or killed before its end.\n"
            "  scripts.evaluate measures such a model; train.py ckpt_path=RUN goes on with a run that was killed",
        )
    if not summary.get("finished"):
        go_on = f"python train.py ckpt_path={folder.path} goes on with it"
        return Run(folder, config, summary, f"{folder.path} has not finished: {go_on}")
    if summary["attention"] != config.model.attention.kind:
        raise UserError(
            f"{folder.summary_file} is damaged: it is of {summary['attention']}, config.yaml of another kind"
        )
    try:
        size = model_size(config.model, config.mean_window_length)
    except UserError as error:  # it may be of a kind that another version has
        raise UserError(f"{folder.config_file}: {error}") from error
    return Run(folder, config, {**summary, "flops_per_token": size.flops_per_token})


def same_but_for_seed(runs: list[Run]) -> list[list[Run]]:
    """Group runs whose data and configurations are equal except for the seed, in the order of their first run.

    A run without a summary does not say what its data were, so its configuration alone decides.
    """
    keys = [key for key in differing([run.config for run in runs]) if key != "seed"]
    groups: dict[tuple[str, Any], list[Run]] = {}
    for run in sorted(runs, key=lambda run: not run.figures):  # those with a summary first, in their order
        settings, data = json.dumps([run.keys[key] for key in keys]), run.figures.get("data_fingerprint")
        if data is None:
            data = next((known for other, known in groups if other == settings), None)
        groups.setdefault((settings, data), []).append(run)
    return list(groups.values())


def named_rows(groups: list[list[Run]]) -> dict[str, list[Run]]:
    """Each group under a name: its folder, or its kind of attention, and the settings that set it apart.

    The kind stands for several runs, and for a job of a sweep, whose folder is only a number. Where two groups would
    have the same name, their first folders tell them apart.
    """
    folders = distinct_names([group[0].folder.path for group in groups])
    settings = [
        [f"{key}={shortened(shown(group[0].keys[key]))}" for key in telling_keys(group[0], groups)] for group in groups
    ]
    by_kind = [len(group) > 1 or group[0].folder.path.name.isdecimal() for group in groups]
    titles = [group[0].kind if kind else folder for group, folder, kind in zip(groups, folders, by_kind, strict=True)]
    names = [", ".join([title, *own]) for title, own in zip(titles, settings, strict=True)]
    twice = {name for name, count in Counter(names).items() if count > 1}
    return {
        ", ".join([folder, *own]) if name in twice else name: group
        for name, folder, own, group in zip(names, folders, settings, groups, strict=True)
    }


def distinct_names(paths: list[Path]) -> list[str]:
    """The names of folders, with those of the folders above where two are called the same."""
    names = [path.name for path in paths]
    if len(set(names)) == len(names):
        return names
    shared = os.path.commonpath([path.parent for path in paths])
    return [str(path.relative_to(shared)) for path in paths]


def telling_keys(run: Run, groups: list[list[Run]]) -> list[str]:
    """The keys that distinguish a run. Its model's keys distinguish it from the most similar models only.

    What differs between kinds of attention, and besides depth and width between sizes, the columns tell; the steps too.
    """
    others = [group[0] for group in groups]
    same_kind = [other for other in others if other.kind == run.kind]
    same_size = [other for other in same_kind if all(other.keys[key] == run.keys[key] for key in SIZE)]
    keys = [key for key in differing([other.config for other in same_kind]) if key in SIZE]
    keys += [key for key in differing([other.config for other in same_size]) if key.startswith("model.")]
    keys += [key for key in differing([other.config for other in others]) if not key.startswith("model.")]
    return [key for key in keys if key not in ("seed", "trainer.max_steps")]


def shown(value: Any) -> str:
    """A value as it would be typed on train.py's command line."""
    return value if isinstance(value, str) else json.dumps(value)


def shortened(text: str, most: int = 40) -> str:
    """The end of a long value, where one path differs from another."""
    return text if len(text) <= most else "..." + text[3 - most :]
