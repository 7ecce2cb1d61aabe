"""Tasks of EleutherAI's lm-evaluation-harness, and the scores of a run on them."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# The harness is optional. If it is not installed, pyright mistakes lm_eval.py in this folder for it.

import difflib
import random
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import torch
from lm_eval import evaluate
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.tasks import TaskManager
from lm_eval.tasks.manager import TaskDict
from lm_eval.utils import make_table
from tokenizers import Tokenizer

from mla_lm.config import TrainConfig
from mla_lm.data.network import from_cache_only, reach_hub
from mla_lm.errors import UserError
from mla_lm.inference.lm_eval import RunLM
from mla_lm.model.transformer import Transformer


def task_manager(include_path: str | None) -> TaskManager:
    """The harness's own tasks, and those that YAML files below `include_path` define.

    Raises:
        UserError: there is no such folder.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise UserError(f"--include-path {include_path} is no folder: give one with YAML files of tasks")
    return TaskManager(include_path=include_path)


def evaluate_tasks(
    run: tuple[Transformer, Tokenizer, TrainConfig], names: list[str], manager: TaskManager, limit: int | None = None
) -> dict[str, Any]:
    """Evaluate a run on tasks, with the settings of `lm_eval.simple_evaluate`.

    Args:
        run: the result of `load_run`
        names: tasks, groups and tags; * stands for any characters in a name, ? for any one
        limit: most documents per task

    Returns:
        the results of `lm_eval.evaluate`, with `cut_requests`, the number of requests whose context was too long for
        the model and was cut from the left, and `lm_eval_version`

    Raises:
        UserError: a task is unknown, cannot be loaded, or needs what the model cannot do.
    """
    random.seed(DEFAULT_RANDOM_SEED)  # some tasks shuffle while they are loaded
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    tasks = load_tasks(names, manager)
    for name, task in tasks["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise UserError(f"the task {name} runs code that a model writes, or shows it images: neither is done here")
        task.set_config(key="num_fewshot", value=task.get_config("num_fewshot") or 0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    model = RunLM(run)
    results = evaluate(model, tasks, limit=limit, log_samples=False)
    return {**results, "cut_requests": model.cut, "lm_eval_version": lm_eval.__version__}


def results_table(results: dict[str, Any]) -> str:
    """Format the result of `evaluate_tasks` as the harness does."""
    text = "\n".join(make_table(results, column) for column in ("results", "groups") if column in results)
    if cut := results["cut_requests"]:
        text += f"\n{cut} requests had a context too long for the model: it was cut from the left"
    return text


def load_tasks(names: list[str], manager: TaskManager) -> TaskDict:
    """Load the tasks and their data; data that is not cached is downloaded.

    Raises:
        UserError: a task is unknown or cannot be loaded.
    """
    found: dict[str, None] = {}  # keeps each name once, in order
    for name in names:
        matches = manager.match_tasks([name])
        if not matches:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            nearest = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"unknown task {name}{nearest}\n  lm-eval ls tasks [--include_path DIR] lists them all")
        found |= dict.fromkeys(matches)
    reached = reach_hub()()
    try:
        with from_cache_only(not reached):
            return manager.load(list(found))
    except Exception as error:  # may come from a task's own code or several libraries
        from huggingface_hub.constants import ENDPOINT

        lines = f"{error}".strip().splitlines() or [type(error).__name__]
        offline = f"\n  {ENDPOINT} cannot be reached, so only data that are cached can be read"
        offline = offline if not reached and isinstance(error, OSError) else ""
        raise UserError(f"{', '.join(names)} cannot be loaded: {lines[0]}{offline}") from error
