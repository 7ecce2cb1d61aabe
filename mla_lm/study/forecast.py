"""How many runs, tokens and hours a study takes."""

from collections import defaultdict
from statistics import median

from mla_lm.hardware import UTILIZATION
from mla_lm.study.jobs import Plan
from mla_lm.study.slots import Slots
from mla_lm.terminal.plain_text import duration

START_SECONDS = 10.0  # of a process before its run begins: imports


class Forecast:
    """Seconds that jobs take: as long as the runs that are done took per FLOP, or by the speed of a matrix product.

    Args:
        slots: where the runs train; None: on other machines, of which nothing is known before runs are done
    """

    def __init__(self, plan: Plan, slots: Slots | None):
        self.plan, self.slots = plan, slots
        self.measured: float | None = None  # FLOP/s of a place

    def total_seconds(self) -> float | None:
        """Of all that is missing, with all places at work; None where nothing is known yet."""
        left = [job.row for job in self.plan.unfinished()]
        for row in self.plan.rows.values():
            if self.plan.lr(row) is None:
                left += [row.name] * len(self.plan.study.seeds_for(row.kind))
        by_row = self._seconds_per_flop()
        known = [seconds for of_row in by_row.values() for seconds in of_row]
        if not known and not self.slots:
            return None
        places = len(self.slots) if self.slots else 1
        total = 0.0
        for name in left:
            seconds = median(by_row.get(name) or known) if known else 1 / self._speed()
            total += START_SECONDS + seconds * self.plan.rows[name].flops
        return total / places

    def lines(self) -> list[str]:
        """What the study takes, and what is known of it by what."""
        plan = self.plan
        jobs = plan.jobs()
        done, count = plan.progress()
        tokens = sum(plan.rows[job.row].tokens for job in jobs)
        waiting = [row for row in plan.rows.values() if plan.lr(row) is None]
        tokens += sum(row.tokens * len(plan.study.seeds_for(row.kind)) for row in waiting)
        more = self._more()
        growth = f"; up to {more} more where the best learning rate lies at an end of those tried" if more else ""
        lines = [f"runs        {count} of {len(plan.rows)} rows, {done} of them done{growth}"]
        lines.append(f"tokens      {tokens:,}")
        if self.slots:
            lines.append(f"machine     {self.slots}")
        seconds = self.total_seconds()
        if done == count:
            return lines
        if seconds is None:
            return [*lines, "time        not known before a run is done"]
        return [*lines, f"time        about {hours(seconds)}, {self._by()}"]

    def _more(self) -> int:
        searches = [plan_search for row in self.plan.rows.values() if (plan_search := self._own_search(row.name))]
        return sum(s.most - len(s.tried) - len(s.missing) for s in searches if s.best is None or s.is_at_end)

    def _own_search(self, name: str):
        row = self.plan.rows[name]
        return self.plan.search(row) if row.rate_of is None else None

    def _by(self) -> str:
        runs = sum(map(len, self._seconds_per_flop().values()))
        if runs:
            return f"by the {runs} runs that are done"
        return (
            f"by a matrix product measured now, of whose speed training is taken to reach {UTILIZATION:.0%}; "
            "the first runs will tell better"
        )

    def _seconds_per_flop(self) -> dict[str, list[float]]:
        """Of each row, of its runs that are done."""
        found: dict[str, list[float]] = defaultdict(list)
        for job, summary in self.plan.finished():
            if seconds := summary.get("total_seconds"):
                found[job.row].append(seconds / self.plan.rows[job.row].flops)
        return found

    def _speed(self) -> float:
        """FLOP/s of training at one place."""
        assert self.slots
        self.measured = self.measured or self.slots.flops_per_second()
        return self.measured * UTILIZATION


def hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else duration(seconds)
