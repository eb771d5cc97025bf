"""What differences between runs are worth: intervals over seeds and over text, and power.

Differences are paired: two methods under one seed see the same data in the same order, and are
scored on the same text.
"""

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

POWER = 0.8
MOST_SEEDS = 10_000
_CHUNK = 1 << 22  # numbers drawn at once


class Interval(NamedTuple):
    """A mean and its 95% interval; infinitely wide for a single value."""

    mean: float
    low: float
    high: float


def student(values: Sequence[float]) -> Interval:
    """Mean +- t(n-1, 0.975) s / sqrt(n)."""
    from scipy.stats import t

    mean, n = fmean(values), len(values)
    if n < 2:
        return Interval(mean, -math.inf, math.inf)
    half = float(t.ppf(0.975, n - 1)) * stdev(values) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def p_value(differences: Sequence[float]) -> float:
    """Of the two-sided t test that their mean is 0; 1 where all of them are 0."""
    from scipy.stats import t

    n, mean, sd = len(differences), fmean(differences), stdev(differences)
    if sd == 0:
        return 1.0 if mean == 0 else 0.0
    return float(2 * t.sf(abs(mean) * math.sqrt(n) / sd, n - 1))


def holm(p: Sequence[float]) -> list[float]:
    """The p values of m tests corrected so that the chance of one false finding is at most 5%.

    The k-th smallest, from 0, becomes the largest of (m - i) p_i over i <= k, 1 at most.
    """
    order = sorted(range(len(p)), key=p.__getitem__)
    corrected, least = [0.0] * len(p), 0.0
    for k, place in enumerate(order):
        least = max(least, min(1.0, (len(p) - k) * p[place]))
        corrected[place] = least
    return corrected


class Bootstrap(NamedTuple):
    """Percentiles of the resampled mean; `low` and `high` bound 95% of it."""

    low: float
    p20: float
    p50: float
    p80: float
    high: float


def paired_bootstrap(
    differences: npt.NDArray[np.float64], resamples: int = 10_000, *, seed: int = 0
) -> Bootstrap:
    """Percentiles of the mean difference under another draw of seeds and of text.

    A resample draws seeds with replacement, then units of text with replacement. They cross: the
    same units are scored under every seed. With m of seeds and k of units drawn so many times each,
    its mean is m^T d k / (S U).

    Args:
        differences: d (S seeds, U units).
    """
    seeds, units = differences.shape
    generator = np.random.default_rng(seed)
    means = []
    step = max(1, _CHUNK // units)
    for first in range(0, resamples, step):
        count = min(step, resamples - first)
        m = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=count)
        k = generator.multinomial(units, np.full(units, 1 / units), size=count)
        means.append((m @ differences * k).sum(1) / (seeds * units))
    found = np.percentile(np.concatenate(means), [2.5, 20, 50, 80, 97.5])
    return Bootstrap(*found.tolist())


def power(gap: float, sd: float, n: int) -> float:
    """Chance that a two-sided paired t test of n seeds at 5% finds a mean difference `gap`.

    Under it t is noncentral with n - 1 degrees of freedom, centred at |gap| sqrt(n) / sd.
    """
    from scipy.stats import nct, t

    centre, critical = abs(gap) * math.sqrt(n) / sd, float(t.ppf(0.975, n - 1))
    if centre > 50 * critical:  # certain, and beyond what the noncentral t computes
        return 1.0
    # The lower tail is the upper one of the mirror image; its cdf gives NaN from a centre of 8 on.
    return float(nct.sf(critical, n - 1, centre) + nct.sf(critical, n - 1, -centre))


def seeds_needed(gap: float, sd: float) -> float:
    """The fewest seeds, at least 2, with which such a test finds `gap` four times in five.

    Args:
        sd: of the difference, over seeds.

    Returns:
        Infinity beyond MOST_SEEDS.
    """
    if sd == 0:
        return 2 if gap else math.inf
    low, high = 1, 2  # power(low) is too little
    while power(gap, sd, high) < POWER:
        if high == MOST_SEEDS:
            return math.inf
        low, high = high, min(2 * high, MOST_SEEDS)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(gap, sd, middle) >= POWER else (middle, high)
    return high
