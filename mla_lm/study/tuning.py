"""The search for a learning rate: the declared rates, then beyond an end of the range while the best lies there."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass
class Search:
    """How far the search for a row's learning rate has come.

    Attributes:
        tried: validation loss of each rate that has an outcome, infinite where training diverged
        missing: rates to run next; none: the search has come to its end
        most: rates that may be tried
    """

    tried: dict[float, float] = field(default_factory=dict)
    missing: list[float] = field(default_factory=list)
    most: int = 1

    @property
    def best(self) -> float | None:
        """The rate of the lowest loss; None while rates are missing, and where training diverged at all of them."""
        finite = [rate for rate, loss in self.tried.items() if math.isfinite(loss)]
        return None if self.missing or not finite else min(finite, key=lambda rate: (self.tried[rate], rate))

    @property
    def is_at_end(self) -> bool:
        """Whether the best rate is the lowest or highest tried, so that a better one may lie beyond."""
        return self.best is not None and self.best in (min(self.tried), max(self.tried))


def search(declared: Sequence[float], most: int, outcome: Callable[[float], float | None]) -> Search:
    """Follow the search as far as there are outcomes. It depends on them alone, so a study can go on with it anywhere.

    Args:
        declared: at least two different rates
        most: rates to try at most, the declared ones included
        outcome: of a rate: its validation loss, infinity if training diverged, None if it has not been run
    """
    found = Search(most=most)
    rates = sorted(declared)
    while rates:
        for rate in rates:
            if (loss := outcome(rate)) is None:
                found.missing.append(rate)
            else:
                found.tried[rate] = loss
        rates = [] if found.missing or len(found.tried) >= most else beyond(found.tried)
    return found


def beyond(tried: dict[float, float]) -> list[float]:
    """The next rate where the best of those tried is the lowest or the highest, as far from it as its neighbour."""
    rates = sorted(tried)
    best = min(rates, key=lambda rate: (tried[rate], rate))
    if best == rates[0]:  # where training diverged at all of them, too
        return [rounded(rates[0] ** 2 / rates[1])]
    return [rounded(rates[-1] ** 2 / rates[-2])] if best == rates[-1] else []


def rounded(rate: float) -> float:
    """To four digits, so that a rate has one name."""
    return float(f"{rate:.4g}")
