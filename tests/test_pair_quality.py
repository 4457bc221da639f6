"""Measures of drawn pairs, each against what it has to be."""

import numpy as np
import pytest

from attnlab.metrics import class_ious
from attnlab.scenes import aerial
from attnlab.segmentation import load_segmenter
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


def test_precision_and_recall_of_points_on_a_line():
    """With k = 1 the balls of the real 0, 1, 5 have the radii 1, 1, 4, those of the drawn ones what is said below."""
    real = np.array([[0.0], [1], [5]])
    both = pair_quality.precision_and_recall(real, np.array([[0.5], [2], [20], [21]]), k=1)
    assert both == (1 / 2, 2 / 3)  # radii 1.5, 1.5, 1, 1: 0 and 1 are within 1.5 of 0.5, nobody is near 5
    narrow = pair_quality.precision_and_recall(real, np.array([[0.0], [0.1], [0.2]]), k=1)
    assert narrow == (1, 1 / 3)  # all are likely, most of what there is they miss
    assert pair_quality.precision_and_recall(real, real, k=2) == (1, 1)
    far = pair_quality.precision_and_recall(real, np.array([[30.0], [100]]), k=1)
    assert far == (0, 1)  # balls of 70 reach everything: few and scattered images have a high recall
    with pytest.raises(ValueError, match="more than k=3"):
        pair_quality.precision_and_recall(real, real)


def test_agreement_is_compared_with_that_on_scenes_of_like_content():
    judge = load_segmenter("aerial", "cpu")
    scenes = [aerial.render(s) for s in range(5_000_000, 5_000_012)]
    held_out = np.stack([s.image for s in scenes]), np.stack([s.labels for s in scenes])
    some = tuple(x[2:6] for x in held_out)
    fits, alike = pair_quality.relative_agreement(judge, some, held_out, k=1)  # each is its own nearest
    of_some, of_all = (np.nanmean(class_ious(judge.evaluate(*x))) for x in (some, held_out))
    assert fits == alike == pytest.approx(of_some) and abs(of_some - of_all) > 0.01
    wrong = some[0], pair_quality.shuffled(some[1])
    worse, alike = pair_quality.relative_agreement(judge, wrong, held_out, k=1)
    assert worse < 0.5 * fits and alike == pytest.approx(of_some)
    assert pair_quality.relative_agreement(judge, some, held_out, k=12)[1] == pytest.approx(of_all)  # three times all

    found = pair_quality.describe_pairs(judge, wrong, some, held_out)
    assert found["agreement"] == pytest.approx(worse)
    seen = [pair_quality.features(judge, x) for x in (held_out[0], some[0])]
    assert (found["precision"], found["recall"]) == pair_quality.precision_and_recall(*seen) == (1, 1)
    assert found["relative agreement"] == found["agreement"] / found["agreement of held-out scenes of like content"]
    apart = found["distances, 5th percentile and median"]
    assert apart["drawn"] == pytest.approx([0, 0], abs=1e-6)  # they are copies
    distances = pair_quality.nearest(held_out[0], some[0])[0]
    assert apart["held-out"] == pytest.approx(np.percentile(distances, [5, 50]).tolist())
    shares = found["class proportions"]
    assert shares["labeled"] == pytest.approx(
        (np.bincount(some[1].ravel(), minlength=7) / some[1].size).tolist(), abs=1e-6
    )
    assert shares["drawn"] == pytest.approx(shares["labeled"]) and shares["held-out"] != shares["labeled"]
