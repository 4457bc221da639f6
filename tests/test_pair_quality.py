"""Measures of drawn pairs, each against what it has to be."""

import numpy as np
import pytest

from experiments.studies import pair_quality


def pictures(count, seed=0, size=32):
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return blocks.repeat(size // 4, 1).repeat(size // 4, 2)


def test_copies_are_near_and_new_images_are_not():
    real, new = pictures(20), pictures(20, seed=1)
    turned = np.rot90(real[:5], axes=(1, 2))[:, :, ::-1]
    distance, which = pair_quality.nearest(turned, real)
    assert distance.max() < 1e-6 and which.tolist() == [0, 1, 2, 3, 4]
    far, _ = pair_quality.nearest(new, real)
    assert far.min() > 0.1
    by_hand = min(
        np.sqrt(((new[0] / 255 - np.rot90(x[:, ::flip], k) / 255) ** 2).mean())
        for x in real
        for flip in (1, -1)
        for k in range(4)
    )
    assert far[0] == pytest.approx(by_hand, abs=1e-5)


def test_frechet_distance_of_known_gaussians():
    """Means 3 apart in one direction, deviations 1 and 2 in another: 9 + (2 - 1)²."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200_000, 3))
    y = rng.normal(size=(200_000, 3)) * (1, 2, 1) + (3, 0, 0)
    assert pair_quality.frechet_distance(x, y) == pytest.approx(10, rel=0.02)
    assert abs(pair_quality.frechet_distance(x, x)) < 1e-8
    assert pair_quality.frechet_distance(x[:, :1], y[:, :1]) == pytest.approx(9, rel=0.02)
    with pytest.raises(ValueError, match="two or more"):
        pair_quality.frechet_distance(x[:1], y)


def test_nobody_keeps_its_own_labels():
    labels = np.arange(50)[:, None, None] * np.ones((1, 2, 2), int)
    found = pair_quality.shuffled(labels)
    assert sorted(found[:, 0, 0]) == list(range(50)) and (found[:, 0, 0] != np.arange(50)).all()
