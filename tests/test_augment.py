"""Augmentations: labels go with their pixels, and each does what it says."""

import numpy as np
import pytest

from attnlab.segmentation import augment

COLORS = np.array([(10, 20, 30), (200, 40, 60), (0, 255, 90), (90, 90, 200)], np.uint8)


def batch(count=8, size=12, seed=0):
    """Images whose colors say their labels."""
    labels = np.random.default_rng(seed).integers(0, 4, (count, size // 3, size // 3)).repeat(3, 1).repeat(3, 2)
    return COLORS[labels], labels.astype(np.uint8)


@pytest.mark.parametrize("name", ["flip", "rotate90", "crop", "cutmix", "copy-paste"])
def test_labels_go_with_their_pixels(name):
    images, labels = batch()
    before = images.copy(), labels.copy()
    found = augment.AUGMENTATIONS[name](images, labels, np.random.default_rng(1))
    np.testing.assert_array_equal(found[0], COLORS[found[1]])
    assert (found[1] != labels).any() and found[0].dtype == found[1].dtype == np.uint8
    assert (images == before[0]).all() and (labels == before[1]).all()  # what was given is as it was
    again = augment.AUGMENTATIONS[name](images, labels, np.random.default_rng(1))
    np.testing.assert_array_equal(found[1], again[1])


def test_flips_and_turns_are_those_of_the_square():
    images, labels = batch(200)
    with pytest.raises(ValueError, match=r"images are \(6, 12\): rotate90 is for squares"):
        augment.rotate90(images[:, :6], labels[:, :6], np.random.default_rng(0))
    for name, count in (("flip", 2), ("rotate90", 4)):
        found = augment.AUGMENTATIONS[name](images, labels, np.random.default_rng(0))[1]
        turns = [np.rot90(labels, k, (1, 2)) for k in range(4)] if name == "rotate90" else [labels, labels[:, :, ::-1]]
        which = [[(one == turned[i]).all() for turned in turns].index(True) for i, one in enumerate(found)]
        assert len(set(which)) == count and min(np.bincount(which)) > 200 / count / 2


def test_colors_change_and_labels_do_not():
    images, labels = batch()
    found = augment.color(images, labels, np.random.default_rng(0))
    assert found[1] is labels and found[0].dtype == np.uint8
    assert np.abs(found[0].astype(int) - images).mean() > 3
    flat = np.full((50, 4, 4, 3), 100, np.uint8)
    value = augment.color(flat, labels, np.random.default_rng(0))[0]
    assert value.min() >= 67 and value.max() <= 138  # 100 by 0.75 and 0.9, by 1.25 and 1.1


def test_contrast_is_about_the_mean_of_an_image():
    """Brightness and channels scale an image as a whole: what is left in the spread is the contrast."""
    images = np.tile(np.array([100, 140], np.uint8)[None, None, :, None], (200, 2, 2, 3))
    found = augment.color(images, np.zeros((200, 2, 4)), np.random.default_rng(0))[0].astype(float)
    contrast = (found[:, 0, 1] - found[:, 0, 0]) / found.mean((1, 2)) * 120 / 40
    assert contrast.min() == pytest.approx(0.75, abs=0.04) and contrast.max() == pytest.approx(1.25, abs=0.04)
    assert 0.13 < contrast.mean(1).std() < 0.16  # of an even distribution: 0.5 / sqrt(12)


def test_cutmix_moves_one_rectangle():
    labels = np.arange(8, dtype=np.uint8)[:, None, None] * np.ones((1, 12, 12), np.uint8)
    images = np.repeat(labels[..., None], 3, axis=-1)
    found = augment.cutmix(images, labels, np.random.default_rng(0))[1]
    changed = [i for i in range(8) if (found[i] != i).any()]
    assert 1 <= len(changed) <= 7
    for i in changed:
        rows, columns = np.nonzero(found[i] != i)
        box = found[i][rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert len(np.unique(box)) == 1 and box.size <= 72


def test_copied_regions_are_whole_and_small():
    labels = np.zeros((2, 16, 16), np.uint8)
    labels[0, 2:5, 2:5], labels[0, 8:, :], labels[0, 0, 15] = 1, 2, 255  # small, half of the image, ignored
    images = np.repeat(labels[..., None], 3, axis=-1)
    seen = set()
    for seed in range(40):
        found = augment.copy_paste(images, labels, np.random.default_rng(seed))[1][1]
        seen.add(tuple(np.bincount(found.ravel(), minlength=256).nonzero()[0]))
        assert (found == 1).sum() in (0, 9)
    assert seen == {(0,), (0, 1)}  # never the half, never what is ignored


def test_regions_that_meet_at_a_corner_are_copied_by_themselves():
    labels = np.zeros((2, 16, 16), np.uint8)
    labels[0, 2:5, 2:5] = labels[0, 5:8, 5:8] = 1
    images = np.repeat(labels[..., None], 3, axis=-1)
    found = [augment.copy_paste(images, labels, np.random.default_rng(seed))[1][1] for seed in range(60)]
    assert {int((one == 1).sum()) for one in found} == {0, 9, 18}
