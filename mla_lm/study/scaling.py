"""A power law of loss against parameters, fitted to runs of several sizes."""

import math
from collections.abc import Sequence

import numpy as np

from mla_lm.study.result import Estimate, Fit, Row
from mla_lm.study.statistics import t_quantile

POINTS = 33  # of the line, over the sizes that there are


def fits_of(rows: Sequence[Row]) -> dict[str, Fit]:
    """A fit for each kind that has rows of at least two sizes, to the test losses of all their seeds."""
    fits = {}
    for kind in dict.fromkeys(row.kind for row in rows):
        fitted = [row for row in rows if row.kind == kind]
        points = [(row.figures["parameters"], row.estimates["test_loss"].values) for row in fitted]
        if len({parameters for parameters, _ in points}) > 1:
            parameters = [count for count, losses in points for _ in losses]
            fits[kind] = power_law(parameters, [loss for _, losses in points for loss in losses])
            fits[kind].rows = [row.name for row in fitted]
    return fits


def power_law(parameters: Sequence[float], losses: Sequence[float]) -> Fit:
    """Fit loss = factor * parameters ** exponent by least squares in the logarithms, where it is a line.

    The intervals are Student's, of 95%: of the exponent, and of the mean loss at each point of the line. They cover the
    spread of the runs about the line, not whether loss follows a power law. Fewer than three runs have none.

    Args:
        parameters, losses: of each run; at least two different numbers of parameters
    """
    x, y = np.log(parameters), np.log(losses)
    middle, spread = x.mean(), ((x - x.mean()) ** 2).sum()
    exponent = float(((x - middle) * (y - y.mean())).sum() / spread)
    at = np.linspace(x.min(), x.max(), POINTS)
    line = y.mean() + exponent * (at - middle)
    factor = math.exp(y.mean() - exponent * middle)
    counts = np.exp(at).tolist()
    if len(x) < 3:
        return Fit(Estimate([], exponent), factor, counts, np.exp(line).tolist())
    residuals = y - y.mean() - exponent * (x - middle)
    t, deviation = t_quantile(len(x) - 2), math.sqrt((residuals**2).sum() / (len(x) - 2))
    half = t * deviation / math.sqrt(spread)
    band = t * deviation * np.sqrt(1 / len(x) + (at - middle) ** 2 / spread)
    return Fit(
        Estimate([], exponent, exponent - half, exponent + half),
        factor,
        counts,
        np.exp(line).tolist(),
        np.exp(line - band).tolist(),
        np.exp(line + band).tolist(),
    )
