"""Metrics against plain loops, scikit-learn and answers worked out by hand."""

import doctest

import numpy as np
import pytest
import torch
from sklearn.metrics import auc, confusion_matrix, jaccard_score

from attnlab import metrics
from attnlab.masks import IGNORE
from attnlab.metrics import (
    THRESHOLDS,
    area_under_curve,
    best_threshold,
    bootstrap_interval,
    iou,
    miou_curve,
    pointing_game,
)


def test_the_docstrings_examples_are_true():
    result = doctest.testmod(metrics)
    assert result.attempted >= 2 and result.failed == 0


@pytest.mark.parametrize("seed", range(3))
def test_iou_is_the_jaccard_score(seed):
    mask, truth = np.random.default_rng(seed).random((2, 9, 14)) > 0.6
    assert iou(mask, truth) == pytest.approx(jaccard_score(truth.ravel(), mask.ravel()), abs=1e-12)
    assert iou(torch.tensor(mask), truth.astype(np.uint8)) == iou(mask, truth) == iou(truth, mask)


def test_iou_of_empty_masks():
    empty, full = np.zeros((3, 4), bool), np.ones((3, 4), bool)
    assert iou(empty, empty) == 1.0 and iou(full, full) == 1.0
    assert iou(empty, full) == 0.0 and iou(full, empty) == 0.0


def test_iou_refuses_what_is_not_a_mask():
    full = np.ones((3, 4), bool)
    with pytest.raises(ValueError, match=r"\(3, 4\).*\(4, 3\)"):
        iou(full, full.T)
    with pytest.raises(ValueError, match="truth > 0"):
        iou(full, full * 255)
    with pytest.raises(ValueError, match="mask > 0"):
        iou(full * 0.5, full)
    with pytest.raises(ValueError, match="no pixels"):
        iou(full[:0], full[:0])


FULL = np.ones((3, 4), bool)
MASKED = {  # what takes a mask, with all other arguments right
    "iou, mask": lambda mask: iou(mask, FULL),
    "iou, truth": lambda mask: iou(FULL, mask),
    "miou_curve, truth": lambda mask: miou_curve([np.ones((3, 4))], [mask]).tolist(),
    "miou_curve, valid": lambda mask: miou_curve([np.eye(3, 4)], [FULL], valid=[mask]).tolist(),
    "pointing_game, truth": lambda mask: pointing_game(np.eye(3, 4), mask),
}


@pytest.mark.parametrize("metric", MASKED)
def test_masks_of_every_type_are_one_mask(metric):
    """0 and 1 are no row numbers; what is neither is refused, 255 too, which elsewhere means ignored pixels."""
    mask, result = np.eye(3, 4, k=1) > 0, MASKED[metric]
    for kind in (np.uint8, np.int64, np.float32, np.float64, object):
        assert result(mask.astype(kind)) == result(mask)
    assert result(torch.tensor(mask)) == result(mask.tolist()) == result(mask)
    for wrong in (mask * 255, mask * 0.5, mask * 2, np.where(mask, np.nan, 0), -1.0 * mask):
        with pytest.raises(ValueError, match="must hold booleans or zeros and ones"):
            result(wrong)
    for wrong in (mask.T, mask[None], mask[0], mask[:, :1]):
        with pytest.raises(ValueError, match="sizes differ"):
            result(wrong)
    with pytest.raises(ValueError, match="no pixels"):
        result(mask[:0])


def test_only_valid_pixels_count():
    heat, truth = np.array([[1.0, 0.5, 0.0, 0.9]]), np.array([[1, 1, 0, 0]])
    found = miou_curve([heat], [truth], [0.4, 0.6], valid=[np.array([[1, 1, 1, 0]], np.uint8)])
    np.testing.assert_allclose(found[:, 0], [1, 0.5])
    with pytest.raises(ValueError, match="no pixel of an image is valid"):
        miou_curve([heat], [truth], valid=[0 * truth])
    with pytest.raises(ValueError, match="one mask of valid pixels for each of 1 heat maps, got 2"):
        miou_curve([heat], [truth], valid=[truth, truth])


def plain_loop(heats, truths, thresholds):
    return np.array([[iou(h / h.max() >= tau, t) for h, t in zip(heats, truths, strict=True)] for tau in thresholds])


@pytest.mark.parametrize("levels", [None, 5], ids=["distinct values", "many ties, on the thresholds"])
def test_miou_curve_equals_the_plain_loop(levels):
    rng = np.random.default_rng(1)
    shapes = [(16, 16), (12, 20), (1, 7)]
    heats = [3 * rng.random(s) - 0.5 for s in shapes]
    if levels:
        heats = [rng.integers(0, levels, s) / (levels - 1.0) for s in shapes]
        heats[2][0, 0] = 1.0
    truths = [rng.random(s) > 0.7 for s in shapes]
    thresholds = np.linspace(-0.25, 1.25, 31)
    expected = plain_loop(heats, truths, thresholds)
    np.testing.assert_array_equal(miou_curve(heats, truths, thresholds), expected)
    assert expected.shape == (31, 3) and len(np.unique(expected)) > 10
    np.testing.assert_array_equal(miou_curve(heats, truths), plain_loop(heats, truths, THRESHOLDS))


def test_miou_curve_at_its_ends_and_at_a_perfect_map():
    truth = np.zeros((4, 6), bool)
    truth[1:3, 2:5] = True  # 6 of 24 pixels
    curve = miou_curve([np.where(truth, 2.0, 1.0)], [truth], [0, 0.5, 0.51, 1.0])
    np.testing.assert_allclose(curve[:, 0], [0.25, 0.25, 1.0, 1.0])


def test_miou_curve_of_a_map_without_positive_values():
    truth = np.eye(3, dtype=bool)
    ious = miou_curve([np.zeros((3, 3)), -np.ones((3, 3))], [truth, ~truth & truth])
    np.testing.assert_array_equal(ious, np.tile([0.0, 1.0], (101, 1)))


def test_miou_curve_says_what_is_wrong():
    heat, truth = np.ones((3, 4)), np.ones((3, 4), bool)
    with pytest.raises(ValueError, match="2 maps and 1 truths"):
        miou_curve([heat, heat], [truth])
    with pytest.raises(ValueError, match="0 maps"):
        miou_curve([], [])
    with pytest.raises(ValueError, match="sizes differ"):
        miou_curve([heat], [truth.T])
    with pytest.raises(ValueError, match="NaN"):
        miou_curve([heat * np.nan], [truth])
    with pytest.raises(ValueError, match="one map at a time"):
        miou_curve([heat[None]], [truth[None]])
    for thresholds in ([0.5, 0.4], [0.5, 0.5], [], [np.nan], [0.1, np.inf], 0.5):
        with pytest.raises(ValueError, match="increasing"):
            miou_curve([heat], [truth], thresholds)


def test_area_is_the_trapezoid_rule():
    values = np.random.default_rng(2).random((101, 3))
    areas = area_under_curve(THRESHOLDS, values)
    np.testing.assert_allclose(areas, [auc(THRESHOLDS, v) for v in values.T])
    assert area_under_curve(THRESHOLDS, values.mean(axis=1)) == pytest.approx(areas.mean())
    with pytest.raises(ValueError, match=r"\(101,\) and \(5,\)"):
        area_under_curve(THRESHOLDS, values[:5, 0])


def test_best_threshold_looks_at_the_mean_over_images():
    ious = np.array([[0.9, 0.0], [0.5, 0.6], [0.6, 0.5], [0.0, 0.8]])  # means 0.45, 0.55, 0.55, 0.4
    assert best_threshold([0.1, 0.2, 0.3, 0.4], ious) == 0.2  # the lowest of equals
    assert best_threshold([0.1, 0.2, 0.3, 0.4], ious[:, 0]) == 0.1
    with pytest.raises(ValueError, match="NaN"):
        best_threshold([0.1, 0.2], [np.nan, 1.0])
    for wrong in ([0.2, 0.1], [0.1, np.nan]):
        with pytest.raises(ValueError, match="increasing"):
            best_threshold(wrong, [0.0, 1.0])


def test_pointing_game():
    heat = np.array([[0.1, 0.9, 0.2], [0.3, 0.4, 0.5]])
    truth = np.array([[0, 1, 0], [0, 0, 0]])
    assert pointing_game(heat, truth) is True
    assert pointing_game(heat[:, ::-1].T, truth[:, ::-1].T) is True
    assert pointing_game(heat, 1 - truth) is False
    assert pointing_game(np.ones((2, 3)), truth) is False  # a flat map points nowhere
    assert pointing_game(np.ones((2, 3)), np.ones((2, 3))) is True
    with pytest.raises(ValueError, match="sizes differ"):
        pointing_game(heat, truth.T)


def test_bootstrap_is_repeatable_and_orders_its_ends():
    values = np.random.default_rng(3).random(40)
    low, high = bootstrap_interval(values)
    assert (low, high) == bootstrap_interval(values) == bootstrap_interval(values, seed=np.random.default_rng(0))
    assert (low, high) != bootstrap_interval(values, seed=1)
    assert low < values.mean() < high
    narrow = bootstrap_interval(values, level=0.5)
    assert low < narrow[0] < narrow[1] < high
    assert bootstrap_interval([0.25] * 5) == (0.25, 0.25)


def test_bootstrap_has_the_width_of_the_standard_error_and_covers_the_known_mean():
    rng = np.random.default_rng(4)
    samples = rng.normal(0.6, 0.1, (100, 60))
    intervals = np.array([bootstrap_interval(s, resamples=300, seed=rng) for s in samples])
    covered = ((intervals[:, 0] < 0.6) & (0.6 < intervals[:, 1])).mean()
    assert 0.87 <= covered < 1.0  # nominal 0.95; three standard errors of 100 trials are 0.065
    width = np.diff(intervals, axis=1).mean()
    assert width == pytest.approx(2 * 1.96 * 0.1 / np.sqrt(60), rel=0.08)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": 95}, "0.95"),
        ({"level": "95 %"}, "level='95 %': give a number between 0 and 1"),
        ({"resamples": 0}, "resamples=0: give a whole number, 1 or more"),
        ({"resamples": 20.0}, "resamples=20.0: give a whole number"),
        ({"resamples": True}, "resamples=True: give a whole number"),
        ({"values": []}, "shape"),
        ({"values": [np.nan]}, "finite"),
    ],
)
def test_bootstrap_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(**({"values": [0.1, 0.2]} | options))


def test_mean_over_classes_weighs_classes_alike():
    """Images of the first class outnumber the second's; an interval is as wide as the bootstrap of a lone class."""
    rng = np.random.default_rng(0)
    values = np.full((60, 2), np.nan)
    values[:, 0], values[:10, 1] = rng.normal(0.2, 0.1, 60), 0.8
    mean, low, high = metrics.mean_over_classes(values)
    assert mean == pytest.approx((values[:, 0].mean() + 0.8) / 2) and low < mean < high
    alone = metrics.bootstrap_interval(values[:, 0])
    assert high - low == pytest.approx((alone[1] - alone[0]) / 2, rel=0.15)
    assert metrics.mean_over_classes(values) == (mean, low, high)
    assert metrics.mean_over_classes([[np.nan], [0.5], [0.5]]) == (0.5, 0.5, 0.5)  # the first may be drawn alone
    for wrong in ([0.5], np.full((3, 2), np.nan), [[np.inf]]):
        with pytest.raises(ValueError, match=r"values must be \(image, class\)"):
            metrics.mean_over_classes(wrong)


def test_confusion_is_scikit_learns():
    rng = np.random.default_rng(5)
    labels, predicted = rng.integers(0, 4, (2, 3, 7, 5)).astype(np.uint8)
    labels[rng.random(labels.shape) < 0.2] = IGNORE
    valid = labels != IGNORE
    expected = confusion_matrix(labels[valid], predicted[valid], labels=range(5))  # class 4 is nowhere
    matrix = metrics.confusion(labels, predicted, 5)
    np.testing.assert_array_equal(matrix, expected)
    assert matrix.dtype == np.int64 and metrics.confusion(labels[0], predicted[0], 5).shape == (5, 5)
    each = metrics.confusion(labels, predicted, 5, per_image=True)
    np.testing.assert_array_equal(each[1], metrics.confusion(labels[1], predicted[1], 5))
    np.testing.assert_array_equal(each.sum(0), matrix)
    ious = metrics.class_ious(matrix)
    np.testing.assert_allclose(ious[:4], jaccard_score(labels[valid], predicted[valid], average=None))
    assert np.isnan(ious[4])
    np.testing.assert_array_equal(metrics.class_ious(each), ious)


def test_confusion_says_what_is_wrong():
    labels = np.zeros((2, 3), np.uint8)
    with pytest.raises(ValueError, match="sizes differ"):
        metrics.confusion(labels, labels.T, 2)
    with pytest.raises(ValueError, match=r"predicted must be class numbers from 0 to 1, there is \[2\]"):
        metrics.confusion(labels, labels + 2, 2)
    with pytest.raises(ValueError, match="labels must be class numbers"):
        metrics.confusion(labels + 2, labels, 2)
    for wrong in (labels + 0.5, labels + np.nan, labels - 1.0):
        with pytest.raises(ValueError, match="labels must be class numbers from 0 to 1, there is"):
            metrics.confusion(wrong, labels, 2)
        with pytest.raises(ValueError, match="predicted must be class numbers"):
            metrics.confusion(labels, wrong, 2)
    assert metrics.confusion(labels * 1.0, labels > 0, 2).tolist() == [[6, 0], [0, 0]]
    with pytest.raises(ValueError, match="num_classes=0: give a whole number, 1 or more"):
        metrics.confusion(labels, labels, 0)
    for wrong in ([1, 2], [[1, 2, 3]], [[1, -2], [0, 1]], [[1, np.nan], [0, 1]], np.zeros((0, 2, 2))):
        with pytest.raises(ValueError, match="as `confusion` gives"):
            metrics.class_ious(wrong)
    with pytest.raises(ValueError, match="a stack"):
        metrics.confusion(labels, labels, 2, per_image=True)
    assert metrics.confusion(labels + 255, labels + 7, 2).sum() == 0  # what is predicted there does not matter
