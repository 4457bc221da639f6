"""Masks of maps whose right answer is known, and DBSCAN against scikit-learn's own."""

import doctest
import inspect
import re
import warnings

import numpy as np
import pytest
import torch
from sklearn.cluster import DBSCAN

from attnlab import masks
from attnlab.masks import dbscan_clusters, dbscan_mask, otsu_mask, random_walker_mask, threshold_mask
from experiments.studies import mask_settings

ALL = [threshold_mask, otsu_mask, dbscan_clusters, dbscan_mask, lambda heat: random_walker_mask(heat, RED_LEFT)]
RED_LEFT = np.zeros((12, 20, 3))  # an image whose one edge runs between columns 9 and 10
RED_LEFT[:, :10, 0] = 1


@pytest.fixture
def two_blobs():
    """A large dim blob (5 x 6), a small bright one (3 x 3) and one bright pixel alone, in a 20 x 30 map."""
    heat = np.zeros((20, 30))
    heat[2:7, 3:9] = 0.6
    heat[12:15, 20:23] = 0.9
    heat[18, 1] = 1.0
    return heat


def region(shape, rows, columns):
    mask = np.zeros(shape, bool)
    mask[rows, columns] = True
    return mask


def test_the_docstrings_examples_are_true():
    result = doctest.testmod(masks)
    assert result.attempted >= 5 and result.failed == 0


@pytest.mark.parametrize("function", ALL)
@pytest.mark.parametrize(
    ("heat", "message"),
    [
        (np.zeros((2, 3, 4)), "2-D"),
        (np.zeros((0, 5)), "empty"),
        (np.array([[1.0, np.nan]]), "1 of 2 pixels"),
        (np.array([[1.0, np.inf]]), "NaN or infinite"),
    ],
)
def test_what_is_not_a_heat_map_is_refused(function, heat, message):
    with pytest.raises(ValueError, match=message):
        function(heat)


@pytest.mark.parametrize(
    "function", [threshold_mask, otsu_mask, dbscan_mask, lambda h: random_walker_mask(h, RED_LEFT)]
)
@pytest.mark.parametrize("value", [0.0, -3.0])
def test_a_map_without_a_positive_value_gives_an_empty_mask_and_one_warning(function, value):
    with pytest.warns(UserWarning) as caught:
        mask = function(np.full((12, 20), value))
    assert mask.dtype == bool and mask.shape == (12, 20) and not mask.any()
    assert len(caught) == 1 and caught[0].filename == __file__


@pytest.mark.parametrize("function", [otsu_mask, dbscan_mask])
def test_a_flat_map_has_no_bright_pixels(function):
    with pytest.warns(UserWarning, match="flat|constant"):
        assert not function(np.full((6, 8), 0.7)).any()


def test_threshold_is_a_fraction_of_the_maximum():
    heat = np.array([[10.0, 4.0, 3.9], [-1.0, 0.0, 5.0]])
    np.testing.assert_array_equal(threshold_mask(heat), [[True, True, False], [False, False, True]])
    np.testing.assert_array_equal(threshold_mask(heat, 1.0), heat == 10)
    np.testing.assert_array_equal(threshold_mask(torch.tensor(heat, dtype=torch.float16)), threshold_mask(heat))
    with pytest.raises(ValueError, match="level is a fraction between 0 and 1, got 40"):
        threshold_mask(heat, 40)


def test_otsu_splits_two_groups():
    heat = np.random.default_rng(0).normal(0.2, 0.02, (16, 24))
    heat[4:9, 6:20] += 0.5
    np.testing.assert_array_equal(otsu_mask(heat), region(heat.shape, slice(4, 9), slice(6, 20)))


def test_the_brightest_cluster_wins_over_the_largest_and_over_noise(two_blobs):
    bright = region(two_blobs.shape, slice(12, 15), slice(20, 23))
    large = region(two_blobs.shape, slice(2, 7), slice(3, 9))
    np.testing.assert_array_equal(dbscan_mask(two_blobs), bright)
    np.testing.assert_array_equal(dbscan_mask(two_blobs, min_area=9), bright)
    np.testing.assert_array_equal(dbscan_mask(two_blobs, min_area=10), large)
    np.testing.assert_array_equal(dbscan_mask(two_blobs, keep=0.6), bright | large)
    np.testing.assert_array_equal(dbscan_mask(two_blobs, keep=0.7), bright)
    clusters = dbscan_clusters(two_blobs)
    np.testing.assert_array_equal(clusters, bright.astype(int) + 2 * large - (two_blobs == 1.0))


def test_the_order_does_not_depend_on_the_place(two_blobs):
    for turned in (two_blobs[::-1], two_blobs[:, ::-1], two_blobs.T):
        np.testing.assert_array_equal(dbscan_mask(turned), turned == 0.9)


def test_level_is_a_fraction_of_the_maximum_and_quantile_one_of_the_pixels():
    heat = np.arange(100.0).reshape(10, 10) ** 2
    assert (dbscan_clusters(heat, quantile=0.8, min_samples=1) != 0).sum() == 20
    assert (dbscan_clusters(heat[:1, :5], quantile=0.75, min_samples=1) != 0).sum() == 2  # the quantile itself is in
    np.testing.assert_array_equal(dbscan_clusters(heat, level=0.25, min_samples=1) != 0, heat >= 0.25 * 99**2)
    np.testing.assert_array_equal(dbscan_clusters(heat, min_samples=1) != 0, heat >= 0.4 * 99**2)
    np.testing.assert_array_equal(  # where a quantile is given the level has no say
        dbscan_clusters(heat, quantile=0.8, level=0.25), dbscan_clusters(heat, quantile=0.8, level=0.9)
    )


def test_eps_decides_whether_a_diagonal_joins():
    heat = np.zeros((6, 8))
    heat[1:3, 1:3] = 1.0
    heat[3:5, 3:5] = 0.8  # touches the first square at one corner
    joined = dbscan_clusters(heat, level=0.5, eps=1.5, min_samples=3)
    apart = dbscan_clusters(heat, level=0.5, eps=1.0, min_samples=3)
    np.testing.assert_array_equal(joined, heat > 0)
    np.testing.assert_array_equal(apart, (heat == 1.0) + 2 * (heat == 0.8))


def test_a_map_that_is_zero_nearly_everywhere_does_not_select_the_background():
    heat = np.zeros((10, 14))
    heat[4:6, 2:5] = 0.3  # 6 of 140 pixels: the 0.9 quantile is zero
    np.testing.assert_array_equal(dbscan_mask(heat, quantile=0.9), heat > 0)


@pytest.mark.parametrize(
    ("quantile", "eps", "min_samples"), [(0.7, 1.0, 3), (0.8, 1.4, 3), (0.8, 2.2, 5), (0.9, 1.0, 1)]
)
def test_clusters_are_those_of_scikit_learn(quantile, eps, min_samples):
    rng = np.random.default_rng(0)
    heat = rng.random((17, 31)) + 2 * (rng.random((17, 31)) > 0.97)
    clusters = dbscan_clusters(heat, quantile, eps=eps, min_samples=min_samples)

    bright = heat >= np.quantile(heat, quantile)
    labels = DBSCAN(eps=eps, min_samples=min_samples).fit(np.argwhere(bright)).labels_
    np.testing.assert_array_equal(clusters != 0, bright)
    np.testing.assert_array_equal(clusters[bright] == -1, labels == -1)
    pairs = set(zip(labels[labels >= 0], clusters[bright][labels >= 0], strict=True))
    assert len(pairs) == labels.max() + 1 == clusters.max() > 1  # one to one
    means = [heat[clusters == n].mean() for n in range(1, clusters.max() + 1)]
    assert means == sorted(means, reverse=True)
    np.testing.assert_array_equal(dbscan_mask(heat, quantile, eps=eps, min_samples=min_samples), clusters == 1)


def test_an_empty_answer_says_why(two_blobs):
    with pytest.warns(UserWarning, match="noise; raise eps=1.0 or lower min_samples=50"):
        assert not dbscan_mask(two_blobs, eps=1.0, min_samples=50).any()
    with pytest.warns(UserWarning, match="min_area=31"):
        assert not dbscan_mask(two_blobs, min_area=31).any()
    with pytest.warns(UserWarning, match="no pixel of the heat map is bright"):
        assert not dbscan_mask(-two_blobs - 1, level=0.5).any()


def test_negative_maps_keep_their_best_cluster(two_blobs):
    np.testing.assert_array_equal(dbscan_mask(two_blobs - 5, 0.9, keep=0.9), two_blobs == 0.9)


WRONG = {  # values of each setting that are no answer to what it asks
    "quantile": [90, -0.1, "x", True, float("nan"), [0.5]],
    "level": [-0.1, 40, "0.5", None, True],
    "keep": [2, "all"],
    "low": [-1, None, "x"],
    "high": [1.1, float("inf")],
    "eps": [0, "x", None, float("inf"), float("nan")],
    "min_samples": [0, 2.5, "x", True],
    "min_area": [-1, "x", None],
    "beta": [0, "x", float("inf")],
}


@pytest.mark.parametrize(
    ("method", "name", "value"),
    [(method, n, v) for method, names in masks.METHODS.items() for n in names for v in WRONG[n]],
)
def test_a_setting_of_another_type_or_range_is_named(two_blobs, method, name, value):
    """Before there is a map, and by the function itself."""
    image = {"image": np.zeros((20, 30, 3))} if method == "random_walker" else {}
    for ask in (
        lambda: masks.check_mask({"method": method, name: value}),
        lambda: masks.mask_by({"method": method, name: value}, two_blobs, **image),
        lambda: getattr(masks, f"{method}_mask")(two_blobs, **image, **{name: value}),
    ):
        with pytest.raises(ValueError, match=rf"{name} (is|counts) .*, got {re.escape(repr(value))}"):
            ask()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "random_walker", "low": 0.8}, "low must be less than high, got low=0.8 and high=0.7"),
        ({"method": "random_walker", "high": 0.3}, "low must be less than high, got low=0.3 and high=0.3"),
        ({"method": "dbscan", "epsilon": 2}, "mask method dbscan has no epsilon; it has eps, keep, level"),
        ({"method": "otsu", 3: 2}, "mask method otsu has no 3; it has no settings"),
        ({"method": ["otsu"]}, "write {method: one of threshold, otsu"),
        ({}, "mask is {}: write"),
        ("otsu", "mask is 'otsu': write"),
    ],
)
def test_settings_that_are_none_are_refused(settings, message):
    for ask in (masks.check_mask, lambda settings: masks.mask_by(settings, np.eye(3))):
        with pytest.raises(ValueError, match=re.escape(message)):
            ask(settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "dbscan", "quantile": None, "keep": None, "level": np.float32(0.5), "min_samples": np.int64(3)},
        {"method": "threshold", "level": 1},
        {"method": "random_walker", "low": 0, "high": 1, "beta": 1e-300},
        {"method": "dbscan", "min_area": 2.5, "eps": 3},
        {"method": "zero"},
    ],
)
def test_right_settings_pass(settings):
    masks.check_mask(settings)


def test_a_map_of_nan_has_no_mask_of_zero():
    with pytest.raises(ValueError, match="1 of 4 pixels"):
        masks.mask_by({"method": "zero"}, [[1, 2], [3, np.nan]])


@pytest.fixture
def ramp():
    """A map that falls from column 0 to 19 without seeing the edge of RED_LEFT: at 0.5 it would end at column 7."""
    return np.tile(np.linspace(1, 0, 20) ** 1.5, (12, 1))


@pytest.mark.parametrize("dtype", [float, np.uint8])
def test_random_walker_moves_the_border_to_the_edge(ramp, dtype):
    image = (RED_LEFT * (255 if dtype is np.uint8 else 1)).astype(dtype)
    assert threshold_mask(ramp, 0.5)[0].sum() == 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the solver's remarks stay inside
        mask = random_walker_mask(ramp, image)
    np.testing.assert_array_equal(mask, region((12, 20), slice(None), slice(0, 10)))


def test_random_walker_agrees_with_its_seeds(ramp):
    image = np.random.default_rng(0).random((12, 20, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mask = random_walker_mask(ramp, image, low=0.2, high=0.6)
        unwalked = random_walker_mask(ramp > 0.5, image)  # nothing left to walk
    assert mask[ramp >= 0.6].all() and not mask[ramp <= 0.2].any()
    np.testing.assert_array_equal(unwalked, ramp > 0.5)


def test_random_walker_without_background_or_edges_thresholds(ramp):
    with pytest.warns(UserWarning, match="thresholding"):
        np.testing.assert_array_equal(random_walker_mask(ramp + 2, RED_LEFT), threshold_mask(ramp + 2, 0.5))
    with pytest.warns(UserWarning, match="one color"):
        np.testing.assert_array_equal(random_walker_mask(ramp, np.ones((12, 20, 3))), threshold_mask(ramp, 0.5))


def test_random_walker_names_what_does_not_fit(ramp):
    with pytest.raises(ValueError, match=r"\(6, 20\).*\(12, 20\).*upscale"):
        random_walker_mask(ramp[:6], RED_LEFT)
    with pytest.raises(ValueError, match="rgb"):
        random_walker_mask(ramp, RED_LEFT[..., 0])
    with pytest.raises(ValueError, match=r"0\.\.1"):
        random_walker_mask(ramp, RED_LEFT * 255)
    with pytest.raises(ValueError, match="low must be less than high"):
        random_walker_mask(ramp, RED_LEFT, low=0.7, high=0.3)
    with pytest.raises(ValueError, match="beta"):
        random_walker_mask(ramp, RED_LEFT, beta=0)


def test_vote():
    """Five maps over four pixels: all for it, four, three, none."""
    heats = np.array([[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 0.9, 0.1], [1, 0.8, 0, 0], [1, 0, 0, 0.3]])[:, None]
    assert masks.vote_mask(heats, level=0.4, agree=0.8).tolist() == [[1, 1, masks.IGNORE, 0]]
    assert masks.vote_mask(heats, level=0.4, agree=0.6).tolist() == [[1, 1, 1, 0]]
    assert masks.vote_mask([heats[0]]).dtype == np.uint8
    for wrong, message in (
        ({"heats": []}, "one or more maps"),
        ({"heats": [np.ones((2, 2)), np.ones((2, 3))]}, "of one shape"),
        ({"heats": heats, "agree": 0.5}, "a majority"),
        ({"heats": heats, "agree": "most"}, "a majority"),
        ({"heats": heats, "level": 2}, "level is a fraction"),
    ):
        with pytest.raises(ValueError, match=message):
            masks.vote_mask(**wrong)


def test_settings_of_a_method_are_those_of_its_function():
    for method, settings in masks.METHODS.items():
        if method != "zero":
            parameters = inspect.signature(getattr(masks, f"{method}_mask")).parameters
            assert tuple(name for name in parameters if name not in ("heat", "image")) == settings


def test_a_mask_by_settings_is_that_of_the_function(two_blobs, ramp):
    options = {"quantile": 0.9, "keep": 0.6}
    np.testing.assert_array_equal(
        masks.mask_by({"method": "dbscan", **options}, two_blobs), dbscan_mask(two_blobs, **options)
    )
    walked = masks.mask_by({"method": "random_walker", "low": 0.2}, ramp, RED_LEFT)
    np.testing.assert_array_equal(walked, random_walker_mask(ramp, RED_LEFT, low=0.2))
    np.testing.assert_array_equal(masks.mask_by({"method": "otsu"}, two_blobs), otsu_mask(two_blobs))
    np.testing.assert_array_equal(masks.mask_by({"method": "zero"}, ramp - 0.5), ramp > 0.5)
    with pytest.warns(UserWarning, match="constant"):
        assert not masks.mask_by({"method": "otsu"}, np.ones((3, 4))).any()
    with pytest.raises(ValueError, match="method: one of threshold, otsu, dbscan, random_walker, zero"):
        masks.mask_by({"method": "vote"}, ramp)


def test_a_sweep_tries_every_combination_on_every_map(two_blobs):
    """On two maps whose best settings are known: both blobs at their level, in one map twice as bright."""
    truth = (two_blobs > 0) & (two_blobs < 1)
    cases = [mask_settings.MaskCase(scale * two_blobs, np.zeros((20, 30, 3)), truth) for scale in (1, 2)]
    grid = {"method": ("dbscan",), "level": (0.5, 0.8), "keep": (None, 0.5)}
    found = mask_settings.sweep(cases, grid)
    assert [(one["level"], one["keep"]) for one, _ in found] == [(0.5, None), (0.5, 0.5), (0.8, None), (0.8, 0.5)]
    np.testing.assert_allclose([iou for _, iou in found], [9 / 39, 1, 9 / 39, 9 / 39])
    empty = {"method": ("dbscan",), "min_samples": (99,)}
    assert [iou for _, iou in mask_settings.sweep(cases, empty)] == [0]


def test_grids_are_of_settings_that_masks_take():
    for grid in mask_settings.GRIDS.values():
        for name, values in grid.items():
            for value in values:
                masks.check_mask({"method": grid["method"][0]} | {name: value})
