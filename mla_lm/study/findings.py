"""What a study has found: its finished runs as a `Result`."""

import math
from datetime import date

from mla_lm.study.collect import Run, load
from mla_lm.study.decoding import add_decoding
from mla_lm.study.jobs import Plan
from mla_lm.study.manifest import notes_on_rate, tried
from mla_lm.study.planned_rows import PlannedRow
from mla_lm.study.result import Result, Row
from mla_lm.study.row_figures import add_difference, add_position, corpora_of, curve_of, machine_of, row_of
from mla_lm.study.scaling import fits_of


def findings(plan: Plan, command: str, measure: bool) -> Result | None:
    """Gather the rows that have a finished seed; None while there are none.

    The first time, that measures the test losses of all runs, window by window.

    Args:
        command: that makes the study
        measure: whether to measure decoding speeds and greedy samples, too

    Raises:
        UserError: a run is damaged.
    """
    runs = {name: _runs(plan, planned) for name, planned in plan.rows.items()}
    runs = {name: group for name, group in runs.items() if any(run.unfinished is None for run in group)}
    rows = {name: _row(plan, plan.rows[name], group) for name, group in runs.items()}
    for name, row in rows.items():
        base = plan.rows[name].baseline
        if base in rows:
            add_difference(row, runs[name], rows[base], runs[base])
        if measure:
            add_decoding(row, runs[name][0])
    if not rows:
        return None
    views = {view: [name for name in rows if view in plan.rows[name].views] for view in plan.study.views}
    everything = [run for group in runs.values() for run in group]
    equal = [row for name, row in rows.items() if "parameters" in plan.rows[name].views and not plan.rows[name].rate_of]
    return Result(
        title=plan.study.title,
        command=command,
        date=date.today().isoformat(),
        rows=list(rows.values()),
        views={view: names for view, names in views.items() if names},
        corpus=corpora_of(everything),
        machine=machine_of(everything),
        configs={name: group[0].folder.config_file.read_text() for name, group in runs.items()},
        failed=[f"{job} is {'failed' if job in plan.given_up else 'unfinished'}" for job in plan.unfinished()],
        fits=fits_of(equal),
    )


def _runs(plan: Plan, planned: PlannedRow) -> list[Run]:
    """The seeds of a row that have begun, the finished first, as the first run speaks for its row."""
    folders = [plan.run(job) for job in plan.seed_jobs(planned)]
    begun = [load(folder) for folder in folders if folder.config_file.is_file()]
    return sorted(begun, key=lambda run: run.unfinished is not None)


def _row(plan: Plan, planned: PlannedRow, runs: list[Run]) -> Row:
    row = row_of(planned.name, runs, planned.size)
    row.curve = curve_of(runs)
    add_position(row, runs)
    losses = tried(plan, planned)
    row.tried = {f"{rate:g}": loss for rate, loss in losses.items() if math.isfinite(loss)}
    row.notes += notes_on_rate(plan, planned)
    return row
