"""Masks averaged down to cells: coverage by hand, ignored pixels left out, bad masks named."""

import numpy as np
import pytest

from attnlab.learning.targets import as_masks, coverage


def test_coverage_is_of_a_cells_valid_pixels():
    mask = np.zeros((4, 8), np.uint8)
    mask[:2, :3] = 1
    mask[2:, 4:] = 255
    mask[2, 6] = 1
    inside, valid = coverage(as_masks([mask], (2, 4), 1), (2, 4))
    np.testing.assert_allclose(inside[0], [[1, 0.5, 0, 0], [0, 0, 0, 1]])
    np.testing.assert_allclose(valid[0], [[1, 1, 1, 1], [1, 1, 0, 0.25]])


def test_a_smaller_mask_is_repeated():
    inside, _ = coverage(as_masks([[[True, False]]], (2, 4), 1), (2, 4))
    np.testing.assert_array_equal(inside[0], [[1, 1, 0, 0]] * 2)


half = np.arange(64).reshape(8, 8) < 20


@pytest.mark.parametrize(
    ("masks", "says"),
    [
        ([half, half], "2 masks for 1 images"),
        ([np.zeros((8, 8))], r"masks\[0\] is empty: leave that image out"),
        ([half * np.uint8(255)], "for a mask of 0 and 255 write mask > 0"),
        ([np.ones((8, 8))], "full"),
        ([half[:4]], "4 x 8 pixels, the maps 16 x 16"),
        ([half * 0.5], "other values than True and False"),
        ([np.where(half, np.nan, 0)], "or NaN"),
        ([half[0]], "one plane"),
    ],
)
def test_bad_masks(masks, says):
    with pytest.raises(ValueError, match=says):
        as_masks(masks, (16, 16), 1)


def test_proportions_may_be_a_pixel_off():
    as_masks([np.eye(512, 341)], (64, 43), 1)
