"""The search for a learning rate, on losses that are known."""

import math
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from mla_lm.study.tuning import search

rates = st.builds(
    lambda lowest, factor, count: [float(f"{lowest * factor**n:.4g}") for n in range(count)],
    st.floats(1e-4, 1e-2),
    st.floats(1.3, 3),
    st.integers(2, 5),
)


def run_through(declared: list[float], most: int, loss) -> tuple:
    """Run what is missing until nothing is; the search, and the rates in the order they were run."""
    outcomes: dict[float, float] = {}
    while (found := search(declared, most, outcomes.get)).missing:
        outcomes |= {rate: loss(rate) for rate in found.missing}
    return found, list(outcomes)


@given(rates, st.floats(-12, 0), st.integers(0, 20), st.floats(0.1, 3))
def test_the_best_lies_inside_what_was_tried_or_the_limit_is_reached(declared, optimum, more, curvature):
    """For any loss with one minimum: all declared rates are run, each once, and no more than allowed."""
    most = len(declared) + more
    found, order = run_through(declared, most, lambda rate: curvature * (math.log(rate) - optimum) ** 2)
    assert set(declared) <= set(order)
    assert len(order) == len(set(order)) == len(found.tried) <= most
    assert found.best == min(found.tried, key=found.tried.__getitem__)
    inside = min(found.tried) < found.best < max(found.tried)
    assert inside is not found.is_at_end
    assert inside or len(order) == most
    grid = sorted(found.tried)
    factor = declared[1] / declared[0]
    assert all(math.isclose(b / a, factor, rel_tol=0.02) for a, b in pairwise(grid))


@given(rates, st.integers(0, 5), st.integers(0, 9), st.randoms(use_true_random=False))
def test_a_search_goes_on_from_any_of_its_outcomes(declared, more, known, random):
    """Whichever outcomes are there, what is missing completes them to the same search."""
    most = len(declared) + more
    loss = {}

    def drawn(rate: float) -> float:
        return loss.setdefault(rate, random.choice([random.random(), math.inf]))

    whole, order = run_through(declared, most, drawn)
    outcomes = {rate: loss[rate] for rate in random.sample(order, min(known, len(order)))}
    while (found := search(declared, most, outcomes.get)).missing:
        assert set(found.missing) <= set(order)
        outcomes |= {rate: loss[rate] for rate in found.missing[:1]}
    assert found == whole


def test_where_all_rates_diverge_lower_ones_are_tried():
    found, order = run_through([1e-3, 2e-3], 4, lambda rate: math.inf if rate > 6e-4 else rate)
    assert order == [1e-3, 2e-3, 5e-4, 2.5e-4]
    assert found.best == 2.5e-4
    nothing, _ = run_through([1e-3, 2e-3], 4, lambda rate: math.inf)
    assert nothing.best is None
    assert not nothing.missing


def test_a_diverged_rate_is_an_end_of_the_range():
    found, order = run_through([1e-3, 2e-3, 4e-3], 7, {1e-3: 3.0, 2e-3: 2.0, 4e-3: math.inf}.__getitem__)
    assert found.best == 2e-3
    assert not found.is_at_end
    assert len(order) == 3
