"""Land from above repeats from its seed, is labeled exactly, and is hard: colors alone do not tell classes apart."""

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from attnlab.scenes import aerial

SEEDS = range(aerial.HELD_OUT, aerial.HELD_OUT + 150)


@pytest.fixture(scope="module")
def scenes():
    return [aerial.render(seed) for seed in SEEDS]


@pytest.mark.parametrize("size", [32, 64, 100])
def test_pure_function_of_the_seed(size):
    first = aerial.render(11, size)
    aerial.render(12, size)
    again = aerial.render(11, size)
    assert first.image.shape == (size, size, 3) and first.image.dtype == np.uint8
    assert first.labels.shape == (size, size) and first.labels.dtype == np.uint8
    assert (first.image == again.image).all() and (first.labels == again.labels).all()
    assert (aerial.render(12, size).image != first.image).any()


@pytest.mark.parametrize("seed", range(3, 9))
def test_same_land_at_every_size(seed):
    small, large = aerial.render(seed, 64), aerial.render(seed, 128)
    agree = np.any([large.labels[i::2, j::2] == small.labels for i in (0, 1) for j in (0, 1)], axis=0)
    assert agree.mean() > 0.97
    shrunk = large.image.reshape(64, 2, 64, 2, 3).mean((1, 3))
    assert np.abs(shrunk.mean((0, 1)) - small.image.mean((0, 1))).max() < 8  # the same light


def test_classes_are_as_rare_as_on_land(scenes):
    share = np.bincount(np.stack([s.labels for s in scenes]).ravel(), minlength=7) / (150 * 64 * 64)
    of = dict(zip(aerial.CLASSES, share, strict=True))
    assert 0.003 < of["vehicle"] < 0.015 and 0.04 < of["tree"] < 0.15 and 0.05 < of["building"] < 0.2
    assert of["grass"] + of["ground"] > 0.4 and all(share > 0)


def test_vehicles_stand_on_roads(scenes):
    """Beside a vehicle, two pixels off, is mostly road, or another vehicle."""
    beside = []
    for scene in scenes:
        rows, columns = np.nonzero(scene.mask("vehicle"))
        for shift in (-2, 2):
            inside = (columns + shift >= 0) & (columns + shift < 64)
            beside += scene.labels[rows[inside], columns[inside] + shift].tolist()
    known = [aerial.CLASSES.index(name) for name in ("road", "vehicle")]
    assert np.isin(beside, known).mean() > 0.7


def test_shadows_darken_and_change_no_label(monkeypatch):
    town = next(seed for seed in SEEDS if aerial.render(seed).mask("building").mean() > 0.15)
    shaded = aerial.render(town)
    monkeypatch.setattr(aerial._Land, "cast", lambda self, points, height: None)
    bare = aerial.render(town)
    np.testing.assert_array_equal(shaded.labels, bare.labels)
    darker = shaded.image.astype(int).sum(-1) < bare.image.astype(int).sum(-1) - 12
    assert 0.02 < darker.mean() < 0.5


def test_colors_alone_do_not_tell_classes(scenes):
    """Nearest neighbors in color, from 75 scenes to 75 others: far from the truth, so that few labels are too few."""
    rng = np.random.default_rng(0)
    pixels, labels = (np.stack([getattr(s, name) for s in scenes]) for name in ("image", "labels"))
    some = rng.integers(64 * 64, size=(150, 100))
    x = np.stack([p.reshape(-1, 3)[i] for p, i in zip(pixels, some, strict=True)])
    y = np.stack([p.ravel()[i] for p, i in zip(labels, some, strict=True)])
    model = KNeighborsClassifier(15).fit(x[:75].reshape(-1, 3), y[:75].ravel())
    found, truth = model.predict(x[75:].reshape(-1, 3)), y[75:].ravel()
    ious = [np.mean(found[(found == k) | (truth == k)] == truth[(found == k) | (truth == k)]) for k in range(7)]
    assert np.mean(ious) < 0.4


@pytest.mark.parametrize(("seed", "size"), [(-1, 64), (0, 31)])
def test_bad_input(seed, size):
    with pytest.raises(ValueError, match="wants seed >= 0 and size >= 32"):
        aerial.render(seed, size)
