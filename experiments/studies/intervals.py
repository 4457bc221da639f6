"""Intervals of gains over sets of scenes, corrected for how many are looked at (Holm, Scand. J. Statistics 1979)."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

__all__ = ["gain_over_sets", "half_width", "holm"]


def gain_over_sets(gains: Sequence[ArrayLike]) -> tuple[float, float, float]:
    """Return the mean gain, its standard error and its p (two-sided, Student's t), over sets.

    `gains` has the gains of each set, one per seed. Seeds of a set share its scenes and its drawn pairs, so that their
    mean is one observation, whatever their number. Of one set alone the error is NaN and p is 1.

    Examples
    --------
    >>> [round(value, 3) for value in gain_over_sets([[1, 3], [4], [6]])]
    [4.0, 1.155, 0.074]
    """
    means = np.array([np.mean(one) for one in gains], float)
    if len(means) < 2:
        return float(means.mean()), np.nan, 1.0
    mean, error = float(means.mean()), float(stats.sem(means))
    if error == 0:
        return mean, 0.0, float(mean == 0)
    return mean, error, float(2 * stats.t.sf(abs(mean) / error, len(means) - 1))


def half_width(error: float, sets: int, level: float) -> float:
    """Return the half width of the interval of a mean over sets that misses the truth with probability `level`.

    No smaller gain could have been told from 0: it is also what the design can show. NaN of one set.
    """
    return float(stats.t.isf(level / 2, sets - 1) * error) if sets > 1 else np.nan


def holm(p_values: Sequence[float], level: float = 0.05) -> tuple[list[float], list[float]]:
    """Return adjusted p, in the given order, and the level at which each was tested: that of its interval.

    The smallest p is tested at level / n, the next one at level / (n - 1), and so on until one is not significant; all
    that follow have its level. So an interval at this level is without 0 where the adjusted p is below `level`.

    Examples
    --------
    >>> adjusted, levels = holm([0.04, 0.01, 0.03])
    >>> [round(p, 2) for p in adjusted], [round(x, 4) for x in levels]
    ([0.06, 0.03, 0.06], [0.025, 0.0167, 0.025])
    """
    n, order = len(p_values), np.argsort(p_values, kind="stable")
    adjusted, levels, largest, tested = [0.0] * n, [0.0] * n, 0.0, 0.0
    for rank, i in enumerate(order):
        if largest < level:  # all before were significant
            tested = level / (n - rank)
        largest = max(largest, min(1.0, (n - rank) * float(p_values[i])))
        adjusted[i], levels[i] = largest, tested
    return adjusted, levels
