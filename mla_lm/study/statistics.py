"""Means with 95% intervals: over seeds, and of the difference between two rows over seeds and test windows.

Figures of several seeds get Student's t interval of their mean. It covers what the seed changes, the initialisation and
the order of the data, on the test text as it is.

A difference between two rows of runs is paired: seed with seed, and window with window of the same test split. Seeds
and windows are crossed samples, so the mean difference varies with both, and the interval covers both. Each has its own
t interval, of the mean over seeds and of the mean over the text, and their half-widths add in quadrature (Howe 1974,
Journal of the American Statistical Association 69, 789; known as MOVER, Zou et al. 2009, Computational Statistics and
Data Analysis 53, 3755). Each of the two variances holds what seeds and windows do together, so the interval is slightly
too wide rather than too narrow. Satterthwaite's degrees of freedom for the sum of the variances would give a narrower
one, which is too narrow with two or three seeds.

Neighbouring windows are often of one document, on which the same model is better, so blocks of whole documents are what
counts as independent (clustered standard errors, arXiv 2411.00640).
"""

import math
from collections.abc import Sequence
from functools import cache
from statistics import fmean, stdev

import numpy as np

from mla_lm.study.result import Estimate

CONFIDENCE = 0.95
BLOCKS = 32  # at most; half as many where documents are long


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of one value per seed, with its 95% interval if there are at least two."""
    if len(values) < 2:
        return Estimate(list(values), fmean(values))
    return _around(list(values), t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values)))


def paired_difference(
    nats: np.ndarray, baseline_nats: np.ndarray, tokens: np.ndarray, documents: np.ndarray
) -> Estimate:
    """The mean difference in loss between two rows of runs, with its 95% interval over seeds and windows.

    There is no interval with fewer than two seeds or two windows.

    Args:
        nats: (S, W) summed loss of each seed in each test window
        baseline_nats: (S, W) of the same seeds and windows, subtracted from it
        tokens: (W,) tokens that each window predicts
        documents: (W,) number of the document that each window begins in

    Returns:
        the estimate, in nats per token; its values are the differences of the single seeds
    """
    differences = nats - baseline_nats
    by_seed = (differences.sum(1) / tokens.sum()).tolist()
    if len(by_seed) < 2 or len(tokens) < 2:
        return Estimate(by_seed, fmean(by_seed))
    over_seeds = estimate(by_seed).half_width or 0.0
    starts = block_starts(documents)
    # A block may have more tokens than another, so the mean over blocks is a ratio of sums.
    block_nats, block_tokens = np.add.reduceat(differences.mean(0), starts), np.add.reduceat(tokens, starts)
    deviations = block_nats - fmean(by_seed) * block_tokens
    blocks = len(starts)
    error = math.sqrt(blocks / (blocks - 1) * (deviations**2).sum()) / tokens.sum()
    return _around(by_seed, math.hypot(over_seeds, t_quantile(blocks - 1) * error))


def block_starts(documents: np.ndarray) -> list[int]:
    """Divide at least two windows into blocks of neighbours; return the first window of each.

    A block ends with a document, once it has 1/32 of the windows. In a long document it ends at 1/16 of them.

    Args:
        documents: (W,) number of the document that each window begins in
    """
    least = max(1, len(documents) // BLOCKS)
    starts = [0]
    for window in range(1, len(documents)):
        length = window - starts[-1]
        if length >= 2 * least or (length >= least and documents[window] != documents[window - 1]):
            starts.append(window)
    return starts if len(starts) > 1 else [0, len(documents) // 2]


def _around(values: list[float], half_width: float) -> Estimate:
    middle = fmean(values)
    return Estimate(values, middle, middle - half_width, middle + half_width)


@cache
def t_quantile(degrees: float, confidence: float = CONFIDENCE) -> float:
    """The t below which |T| lies with this probability, for Student's distribution with `degrees` >= 1 of freedom.

    With T = sqrt(degrees) tan(angle), the density of the angle is proportional to cos(angle)**(degrees - 1), a smooth
    function that Gauss-Legendre integrates to 12 digits for up to 200 degrees; bisection finds the angle.
    """
    places, weights = np.polynomial.legendre.leggauss(64)
    scale = 2 / math.sqrt(math.pi) * math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2))
    low, high = 0.0, math.pi / 2
    while (angle := (low + high) / 2) not in (low, high):
        inside = scale * angle / 2 * float(weights @ np.cos(angle / 2 * (places + 1)) ** (degrees - 1))
        low, high = (angle, high) if inside < confidence else (low, angle)
    return math.sqrt(degrees) * math.tan(low)
