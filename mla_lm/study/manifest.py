"""manifest.json in a study's folder: which run belongs to which row, in which part, and where it was made."""

import json
import math
from collections import defaultdict
from typing import Any

from mla_lm.files import write_atomically
from mla_lm.runs.report import finite_or_none
from mla_lm.study.jobs import Job, Plan, as_typed
from mla_lm.study.planned_rows import PlannedRow
from mla_lm.study.slots import Slots


def write_manifest(plan: Plan) -> None:
    """Write the state of all runs.

    Raises:
        UserError: it cannot be written.
    """
    text = json.dumps(manifest(plan), indent=1) + "\n"
    write_atomically(plan.folder / "manifest.json", lambda file: file.write(text.encode()))


def manifest(plan: Plan) -> dict[str, Any]:
    views: dict[str, list[str]] = defaultdict(list)
    for row in plan.rows.values():
        for view in row.views:
            views[view].append(row.name)
    rows = [_row(plan, row) for row in plan.rows.values()]
    return {"study": plan.name, "title": plan.study.title, "views": views, "rows": rows}


def _row(plan: Plan, row: PlannedRow) -> dict[str, Any]:
    losses = {f"{rate:g}": finite_or_none(loss) for rate, loss in tried(plan, row).items()}
    return {
        "name": row.name,
        "kind": row.kind,
        "size": row.size,
        "views": row.views,
        "baseline": row.baseline,
        "overrides": row.overrides,
        "steps": row.steps,
        "tokens": row.tokens,
        "lr": plan.lr(row),
        "rate_of": row.rate_of,
        "tried": losses,
        "notes": notes(plan, row),
        "runs": [_run(plan, job) for job in [*plan.tuning_jobs(row), *plan.seed_jobs(row)]],
    }


def tried(plan: Plan, row: PlannedRow) -> dict[float, float]:
    """Learning rates and their validation losses, infinite where training diverged; empty where nothing is tuned."""
    found = plan.search(row)
    return dict(sorted(found.tried.items())) if found else {}


def _run(plan: Plan, job: Job) -> dict[str, Any]:
    outcome, run = plan.outcome(job), plan.run(job)
    summary = run.summary() if run.is_finished else {}
    status = "missing" if outcome is None else "finished" if math.isfinite(outcome) else "diverged"
    if job in plan.given_up:
        status = "failed"
    return {
        "folder": str(run.path.relative_to(plan.folder)),
        "role": job.role,
        "lr": job.lr,
        "seed": job.seed,
        "status": status,
        "val_loss": outcome if status == "finished" else None,
        "processor": summary.get("processor"),
        "threads": summary.get("threads"),
        "command": as_typed(plan.overrides(job), summary.get("threads")),
    }


def notes_on_rate(plan: Plan, row: PlannedRow) -> list[str]:
    """Where a row's learning rate comes from, unless it was tuned as it should be."""
    found = plan.search(row)
    if row.rate_of:
        return [f"at the learning rate of {row.rate_of}"]
    if found is None:
        return ["at the learning rate that was declared, which was not tuned"]
    diverged = [f"{rate:g}" for rate, loss in tried(plan, row).items() if math.isinf(loss)]
    lines = [f"training diverged at learning rate {', '.join(diverged)}"] if diverged else []
    if found.is_at_end:
        lines.append(f"the best learning rate lies at an end of the {len(found.tried)} tried, which is the limit")
    return lines


def notes(plan: Plan, row: PlannedRow) -> list[str]:
    """What a reader of the row's figures has to know."""
    lines = notes_on_rate(plan, row)
    seeds = plan.seed_jobs(row)
    done = [job for job in seeds if plan.run(job).is_finished]
    if seeds and len(done) < len(seeds):
        lines.append(f"{len(seeds) - len(done)} of {len(seeds)} seeds are unfinished")
    if len(plan.study.seeds_for(row.kind)) < 2:
        lines.append("one seed: no interval")
    return lines + _of_machines(plan, row)


def _of_machines(plan: Plan, row: PlannedRow) -> list[str]:
    """Seeds that were made on another kind of processor, or with other threads, than those of the baseline."""
    if row.baseline is None:
        return []
    own, other = machines(plan, row), machines(plan, plan.rows[row.baseline])
    mixed = [str(seed) for seed in own if seed in other and own[seed] != other[seed]]
    if not mixed:
        return []
    return [f"seeds {', '.join(mixed)} ran on another kind of processor, or with other threads, than {row.baseline}"]


def machines(plan: Plan, row: PlannedRow) -> dict[int, tuple[str | None, int | None]]:
    """Processor and threads of each finished seed of a row; on a GPU threads change nothing."""
    found = {}
    for job in plan.seed_jobs(row):
        if plan.run(job).is_finished:
            summary = plan.run(job).summary()
            on_cpu = summary.get("accelerator") == "cpu"
            found[job.seed] = (summary.get("processor"), summary.get("threads") if on_cpu else None)
    return found


def machine_lines(plan: Plan, slots: Slots | None) -> list[str]:
    """A warning where seeds are still to be run on another machine than those that are done."""
    done = {machine for row in plan.rows.values() for machine in machines(plan, row).values()}
    if slots is None or done <= {slots.machine()} or not any(job.role == "seed" for job in plan.ready()):
        return []
    return [
        f"warning: the seeds that are done ran on {' and on '.join(sorted(map(machine_words, done)))}; "
        f"this is {machine_words(slots.machine())}.",
        "  The same seed ends in another loss on another machine, so rows of both are marked.",
    ]


def machine_words(machine: tuple[str | None, int | None]) -> str:
    processor, threads = machine
    return f"{processor or 'an unknown processor'}" + (f" with {threads} threads" if threads else "")
