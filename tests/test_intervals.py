"""Intervals over sets and Holm's correction, against hand-computed values and scipy."""

import numpy as np
import pytest
from scipy import stats

from experiments.studies import intervals


def test_gains_are_of_sets_not_of_seeds():
    mean, error, p = intervals.gain_over_sets([[1, 3, 2], [4], [6, 6]])
    wanted = stats.ttest_1samp([2, 4, 6], 0)
    assert mean == 4 and error == pytest.approx(2 / np.sqrt(3)) and p == pytest.approx(wanted.pvalue)
    low, high = wanted.confidence_interval(0.95)
    half = intervals.half_width(error, 3, 0.05)
    assert (mean - half, mean + half) == pytest.approx((low, high))
    one = intervals.gain_over_sets([[1, 2]])
    assert one[0] == 1.5 and np.isnan(one[1]) and one[2] == 1 and np.isnan(intervals.half_width(one[1], 1, 0.05))
    assert intervals.gain_over_sets([[0], [0]]) == (0, 0, 1) and intervals.gain_over_sets([[1], [1]]) == (1, 0, 0)


def test_holm_by_hand():
    adjusted, levels = intervals.holm([0.3, 0.001, 0.02, 0.011])
    assert adjusted == pytest.approx([0.3, 0.004, 0.04, 0.033])  # 0.001 * 4, 0.011 * 3, 0.02 * 2, 0.3 * 1
    assert levels == pytest.approx([0.05, 0.0125, 0.025, 0.05 / 3])
    adjusted, levels = intervals.holm([0.02, 0.001, 0.03])
    assert adjusted == pytest.approx([0.04, 0.003, 0.04]) and levels == pytest.approx([0.025, 0.05 / 3, 0.05])
    adjusted, levels = intervals.holm([0.04, 0.02, 0.03])  # none: 0.02 * 3 is above 0.05
    assert adjusted == pytest.approx([0.06] * 3) and levels == pytest.approx([0.05 / 3] * 3)
    assert intervals.holm([0.01, 0.04, 0.03])[0] == pytest.approx([0.03, 0.06, 0.06])
    assert intervals.holm([]) == ([], []) and intervals.holm([0.9, 0.8])[0] == [1, 1]


def test_intervals_are_without_zero_where_holm_is_significant():
    rng = np.random.default_rng(0)
    for _ in range(100):
        sets = rng.normal(rng.uniform(0, 2, (6, 1)), 1, (6, 5))  # of six arms, of very different effects
        found = [intervals.gain_over_sets(one[:, None]) for one in sets]
        adjusted, levels = intervals.holm([p for *_, p in found])
        for (mean, error, _), p, level in zip(found, adjusted, levels, strict=True):
            assert (abs(mean) > intervals.half_width(error, 5, level)) == (p < 0.05)
