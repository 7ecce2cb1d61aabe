"""Intervals: against tables and arithmetic by hand, and how often they cover the truth in drawn data."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla_lm.study.statistics import BLOCKS, block_starts, estimate, paired_difference, t_quantile

finite = st.floats(-100, 100)


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    # Student's distribution as in any table: 97.5%, and so 95% between -t and t
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (30, 2.042), (60, 2.000), (120, 1.980)],
)
def test_t_quantile_is_that_of_the_table(degrees, quantile):
    assert t_quantile(degrees) == pytest.approx(quantile, abs=6e-4)


def test_t_quantile_in_closed_form():
    """Of one degree of freedom T is Cauchy's, of two P(|T| < t) = t / sqrt(2 + t^2), of many it is nearly normal."""
    for confidence in (0.5, 0.9, 0.95, 0.99):
        assert t_quantile(1, confidence) == pytest.approx(math.tan(math.pi / 2 * confidence), rel=1e-11)
        assert t_quantile(2, confidence) == pytest.approx(confidence * math.sqrt(2 / (1 - confidence**2)), rel=1e-11)
    assert t_quantile(1000) == pytest.approx(1.959964, rel=2e-3)
    assert t_quantile(2.5) == pytest.approx(3.574655, abs=1e-6)  # between 2 and 3, as scipy 1.17 has it


def test_estimate_by_hand():
    found = estimate([1.0, 2.0, 3.0])
    assert (found.mean, found.half_width) == (2.0, pytest.approx(4.302653 / math.sqrt(3)))
    assert (found.low, found.high) == (pytest.approx(2 - found.half_width), pytest.approx(2 + found.half_width))


def test_one_value_has_no_interval():
    found = estimate([1.5])
    assert (found.values, found.mean, found.low, found.high, found.half_width) == ([1.5], 1.5, None, None, None)


@given(values=st.lists(finite, min_size=2, max_size=8), shift=finite)
def test_an_interval_moves_with_its_values(values, shift):
    before, after = estimate(values), estimate([value + shift for value in values])
    assert after.mean == pytest.approx(before.mean + shift, abs=1e-9)
    assert after.half_width == pytest.approx(before.half_width, abs=1e-9)


def test_the_mean_of_several_seeds_is_covered_in_95_of_100_draws():
    draws = np.random.default_rng(0).normal(3.0, 0.2, size=(4000, 5))
    covered = [found.low < 3.0 < found.high for found in map(estimate, draws.tolist())]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.01)


DOCUMENTS = np.arange(320) // 7  # of windows, seven each


def crossed(random: np.random.Generator, seeds: int, per_seed: float, per_document: float, each: float) -> np.ndarray:
    """Differences of 320 windows, (seeds, 320), whose mean is 0; those of one document are alike."""
    of_documents = random.normal(0, per_document, 46)[DOCUMENTS]
    return random.normal(0, per_seed, (seeds, 1)) + of_documents + random.normal(0, each, (seeds, 320))


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize(
    ("per_seed", "per_document"),
    [(0.1, 0.0), (0.1, 0.4), (0.1, 1.0), (0.02, 1.0)],
    ids=lambda deviation: f"{deviation}",
)
def test_a_paired_difference_is_covered_in_95_of_100_draws(seeds, per_seed, per_document):
    """Whether the seeds or the text is what varies; where both do, the interval is a little too wide."""
    random, tokens = np.random.default_rng(seeds), np.full(320, 10)
    nats = [10 * crossed(random, seeds, per_seed, per_document, 0.3) for _ in range(1000)]
    found = [paired_difference(3 + own, np.full_like(own, 3.0), tokens, DOCUMENTS) for own in nats]
    covered = np.mean([one.low < 0 < one.high for one in found])
    assert 0.93 < covered < 0.995


def test_seeds_alone_or_windows_alone_would_not_cover():
    random, tokens = np.random.default_rng(0), np.ones(320)
    drawn = [crossed(random, 3, 0.05, 1.0, 0.3) for _ in range(1000)]
    over_seeds = np.mean([one.low < 0 < one.high for one in (estimate(own.mean(1).tolist()) for own in drawn)])
    windows = [(own.mean(), 1.96 * own.mean(0).std(ddof=1) / math.sqrt(320)) for own in drawn]
    over_windows = np.mean([abs(middle) < half for middle, half in windows])
    both = np.mean(
        [one.low < 0 < one.high for one in (paired_difference(own, 0 * own, tokens, DOCUMENTS) for own in drawn)]
    )
    assert over_seeds < 0.8
    assert over_windows < 0.8  # as independent, though seven are of one document
    assert both > 0.935


def test_a_paired_difference_by_hand():
    """Two seeds, two windows of two tokens: the differences per token are 1, 2 and 1, 4."""
    nats = np.array([[12.0, 14.0], [22.0, 28.0]])
    baseline = np.array([[10.0, 10.0], [20.0, 20.0]])
    found = paired_difference(nats, baseline, np.array([2, 2]), np.array([0, 0]))
    assert (found.values, found.mean) == ([1.5, 2.5], 2.0)
    over_seeds, over_windows = 12.706205 * 0.5, 12.706205 * 1.0  # t(1) times the error of the means 1.5, 2.5 and 1, 3
    assert found.half_width == pytest.approx(math.hypot(over_seeds, over_windows))


@given(seeds=st.integers(1, 4), windows=st.integers(1, 3 * BLOCKS), data=st.data())
def test_a_paired_difference_is_that_of_the_losses(seeds, windows, data):
    """Windows count by their tokens, and there is an interval if and only if there are two seeds and two windows."""
    random = np.random.default_rng(data.draw(st.integers(0, 1000)))
    tokens = random.integers(1, 9, windows)
    documents = random.integers(0, 2, windows).cumsum()
    nats, baseline = (random.uniform(0, 5, (seeds, windows)) * tokens for _ in range(2))
    found = paired_difference(nats, baseline, tokens, documents)
    assert found.mean == pytest.approx((nats.sum() - baseline.sum()) / seeds / tokens.sum())
    assert (found.half_width is not None) == (seeds > 1 and windows > 1)
    back = paired_difference(baseline, nats, tokens, documents)
    assert back.mean == pytest.approx(-found.mean)
    assert back.half_width == (found.half_width and pytest.approx(found.half_width))


@given(lengths=st.lists(st.integers(1, 200), min_size=1, max_size=100))
def test_blocks_are_of_whole_documents_unless_these_are_long(lengths):
    documents = np.repeat(np.arange(len(lengths)), lengths)
    if len(documents) < 2:
        return
    starts = block_starts(documents)
    sizes, least = np.diff([*starts, len(documents)]), max(1, len(documents) // BLOCKS)
    assert 2 <= len(starts) <= 2 * BLOCKS
    assert starts[0] == 0
    assert (sizes > 0).all()
    if len(documents) >= BLOCKS:
        assert (sizes <= 2 * least).all()
        assert (sizes[:-1] >= least).all()
        assert all(documents[s] != documents[s - 1] for s, n in zip(starts[1:], sizes, strict=False) if n < 2 * least)


def test_equal_runs_differ_by_nothing():
    nats = np.random.default_rng(0).uniform(0, 5, (3, 40))
    found = paired_difference(nats, nats.copy(), np.ones(40), np.arange(40))
    assert (found.mean, found.low, found.high) == (0, 0, 0)
