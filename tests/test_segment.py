"""The segmenter: it learns what can be learned, repeats with its seed, and is scored as scikit-learn scores."""

import numpy as np
import pytest
import torch
from sklearn.metrics import jaccard_score

from attnlab.joint.quality import frechet_distance
from attnlab.segmentation import augment
from attnlab.segmentation import model as segment


def squares(count, seed=0, size=32):
    """Images of noise with a red and a green square; labels 1 and 2."""
    rng = np.random.default_rng(seed)
    images, labels = (
        rng.integers(0, 90, (count, size, size, 3), dtype=np.uint8),
        np.zeros((count, size, size), np.uint8),
    )
    for image, label in zip(images, labels, strict=True):
        for number in (1, 2):
            y, x = rng.integers(0, size - 12, 2)
            image[y : y + 12, x : x + 12, number - 1] = 250
            label[y : y + 12, x : x + 12] = number
    return images, labels


@pytest.mark.parametrize("kind", segment.KINDS)
def test_it_learns_and_repeats(kind, tmp_path):
    images, labels = squares(40)
    before = torch.get_rng_state()
    model = segment.train(images, labels, 3, kind=kind, steps=60, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    tests = squares(10, seed=9)
    ious = segment.class_ious(segment.evaluate(model, *tests, 3))
    assert ious.min() > 0.6
    again = segment.train(images, labels, 3, kind=kind, steps=60, seed=1)
    np.testing.assert_array_equal(segment.predict(model, tests[0]), segment.predict(again, tests[0]))
    other = segment.new_model(3, seed=2, kind=kind).eval()
    assert not np.array_equal(segment.predict(other, tests[0]), segment.predict(model, tests[0]))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    np.testing.assert_array_equal(segment.predict(loaded, tests[0]), segment.predict(model, tests[0]))


def test_extra_pairs_are_half_of_every_batch():
    images, labels = squares(4)
    extra = np.zeros_like(images), np.full_like(labels, 2)
    x, y = segment._draw([(images, labels), extra], 10, (), np.random.default_rng(0))
    assert x.shape == (10, 3, 32, 32) and (y.flatten(1) == 2).all(1).sum() == 5
    flipped = [any(np.array_equal(one, other[:, ::-1]) for other in labels) for one in y[:5].numpy()]
    assert 0 < sum(flipped) < 5  # images and labels are turned together
    for a, b in zip(x[:5], y[:5], strict=True):
        assert (a[0][b == 1] > 0.9).sum() > 90  # red is still where the label says 1


def test_scores_are_scikit_learns():
    rng = np.random.default_rng(0)
    images, truth = (
        rng.integers(0, 255, (5, 16, 16, 3), dtype=np.uint8),
        rng.integers(0, 3, (5, 16, 16), dtype=np.uint8),
    )
    truth[:, :2] = 255
    model = segment.new_model(4, seed=0).eval()
    confusion = segment.evaluate(model, images, truth, 4)
    known, found = truth != 255, segment.predict(model, images)
    assert confusion.sum() == known.sum() and confusion.shape == (5, 4, 4)
    expected = jaccard_score(truth[known], found[known], labels=range(4), average=None, zero_division=0)
    np.testing.assert_allclose(np.nan_to_num(segment.class_ious(confusion)), expected)
    assert np.isnan(segment.class_ious(np.zeros((1, 2, 2), int))).all()


def test_pairs_have_to_fit():
    images, labels = squares(2)
    for wrong, message in [
        ((images[..., 0], labels), r"images are uint8 \(image, row, column, rgb\)"),
        ((images, labels[:, :5]), "a label map has its image's size"),
        ((images, labels + 7), "labels are 0 to 2 or 255"),
    ]:
        with pytest.raises(ValueError, match=message):
            segment.train(*wrong, 3, steps=1)


def test_ways_of_mixing(monkeypatch):
    """What each batch is drawn from, by the color of its images: the pairs are black, the extra ones white."""
    labels, seen = np.zeros((30, 16, 16), np.uint8), []
    labels[:, :8] = 1
    black, white = (np.full((30, 16, 16, 3), value, np.uint8) for value in (0, 255))
    whole = segment.as_input
    monkeypatch.setattr(segment, "as_input", lambda x: seen.append(x[:, 0, 0, 0] > 0) or whole(x))
    for mix in segment.MIXES:
        segment.train(black[:10], labels[:10], 2, extra=(white, labels), mix=mix, steps=4, batch=8, progress=False)
    half, pool, pretrain = (np.stack(seen[i : i + 4]) for i in (0, 4, 8))
    assert (half.sum(1) == 4).all()
    assert 0.5 < pool.mean() < 0.95  # three of four pairs are white
    assert pretrain[:2].all() and not pretrain[2:].any()
    with pytest.raises(ValueError, match="mix='third': choose one of half, pool, pretrain"):
        segment.train(black, labels, 2, mix="third")
    with pytest.raises(ValueError, match="kind='forest': choose one of segformer, unet"):
        segment.train(black, labels, 2, kind="forest")
    with pytest.raises(ValueError, match="no augmentation 'blur'"):
        segment.train(black, labels, 2, ways=["blur"])


def test_ways_of_varying_are_applied_in_order(monkeypatch):
    images, labels = squares(4)
    calls = []
    for way in ("turn", "color"):
        whole = augment.WAYS[way]
        monkeypatch.setitem(augment.WAYS, way, lambda *a, way=way, whole=whole: calls.append(way) or whole(*a))
    segment.train(images, labels, 3, ways=["color", "turn"], steps=2, batch=4, progress=False)
    assert calls == ["color", "turn"] * 2


@pytest.mark.parametrize("kind", segment.KINDS)
def test_features_tell_worlds_apart(kind):
    model = segment.new_model(3, kind=kind).eval()
    (a, _), (b, _), (dark, _) = squares(60), squares(60, seed=1), squares(60, seed=2)
    of = [segment.features(model, x) for x in (a, b, dark // 4)]
    assert of[0].shape == (60, 128 if kind == "segformer" else 96) and of[0].dtype == np.float64
    assert frechet_distance(of[0], of[2]) > 2 * frechet_distance(of[0], of[1])
    again = segment.features(model, a, batch=7)
    np.testing.assert_allclose(again, of[0], atol=0.02 * np.abs(of[0]).max())  # other batches round otherwise
