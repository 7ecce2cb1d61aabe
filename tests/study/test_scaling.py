"""The power law that is fitted to losses of several sizes."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla_lm.study.result import Estimate, Row
from mla_lm.study.scaling import fits_of, power_law
from mla_lm.study.statistics import estimate

SIZES = [1e6, 2.5e6, 4.4e6]


@given(st.floats(-0.5, 0), st.floats(1, 50))
def test_an_exact_law_is_found(exponent, factor):
    fit = power_law(SIZES, [factor * size**exponent for size in SIZES])
    assert fit.exponent.mean == pytest.approx(exponent, abs=1e-9)
    assert fit.factor == pytest.approx(factor)
    assert fit.exponent.half_width == pytest.approx(0, abs=1e-6)
    assert (fit.parameters[0], fit.parameters[-1]) == (pytest.approx(1e6), pytest.approx(4.4e6))
    assert fit.loss == pytest.approx([factor * count**exponent for count in fit.parameters])


def test_the_intervals_cover_the_truth_as_often_as_they_say():
    """Drawn runs of five seeds for each size; the exponent and the loss of the middle size."""
    random = np.random.default_rng(0)
    draws, exponents, middles = 1000, 0, 0
    parameters = np.repeat(SIZES, 5)
    for _ in range(draws):
        losses = 20 * parameters**-0.12 * np.exp(random.normal(0, 0.01, len(parameters)))
        fit = power_law(parameters.tolist(), losses.tolist())
        exponents += fit.exponent.low <= -0.12 <= fit.exponent.high
        place = len(fit.parameters) // 2
        middles += fit.low[place] <= 20 * fit.parameters[place] ** -0.12 <= fit.high[place]
    for covered in (exponents, middles):
        assert abs(covered / draws - 0.95) < 3 * math.sqrt(0.95 * 0.05 / draws)


def test_two_runs_make_a_line_without_an_interval():
    fit = power_law(SIZES[:2], [4.0, 3.5])
    assert fit.exponent.low is None
    assert fit.low == fit.high == []
    assert fit.loss[-1] == pytest.approx(3.5)


def row(kind: str, parameters: float, losses: list[float]) -> Row:
    estimates: dict[str, Estimate] = {"test_loss": estimate(losses)}
    return Row(f"{kind}_{parameters}", kind, "", [], [], {"parameters": parameters}, estimates)


def test_only_kinds_of_several_sizes_are_fitted():
    rows = [row("mla", 1e6, [4.0, 4.1]), row("mla", 2e6, [3.8, 3.9]), row("mha", 1e6, [4.0, 4.1])]
    assert list(fits_of(rows)) == ["mla"]
    assert fits_of(rows)["mla"].exponent.mean < 0
    assert fits_of(rows)["mla"].rows == ["mla_1000000.0", "mla_2000000.0"]
