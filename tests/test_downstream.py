"""The study of what synthetic pairs are worth: exact scenes, and every arm trained on what it says."""

import numpy as np

import attnlab as al
from attnlab import segment
from attnlab.tiny import downstream


def test_scenes_have_exact_labels_of_the_classes():
    images, labels = downstream.scenes(5, downstream.TESTS)
    assert images.shape == (5, 64, 64, 3) and labels.dtype == np.uint8
    number, checked = downstream.TESTS, 0
    while checked < 5:
        scene = al.scenes.street.render(number)
        if max(scene.mask(name).mean() for name in downstream.CLASSES) >= downstream.SEEN:
            np.testing.assert_array_equal(images[checked], scene.image)
            for i, name in enumerate(downstream.CLASSES, 1):
                np.testing.assert_array_equal(labels[checked] == i, scene.mask(name))
            checked += 1
        number += 1


def test_the_oracle_labels_the_same_images():
    images, labels = downstream.scenes(8, downstream.TRAINING)
    again, found = downstream.with_truth((images, labels), al.load_oracle("cpu"))
    assert again is images
    assert segment.class_ious(confusion(labels, found)).min() > 0.6


def confusion(truth, found, count=4):
    pairs = truth.astype(int) * count + found
    return np.bincount(pairs.ravel(), minlength=count**2).reshape(1, count, count)


def test_each_arm_has_its_pairs(monkeypatch):
    real, tests = downstream.scenes(6, downstream.TRAINING), downstream.scenes(2, downstream.TESTS)
    seen = []

    def train(images, labels, count, *, extra, steps, seed):
        seen.append((len(images), None if extra is None else len(extra[0]), steps, seed))
        return segment.new_model(count, seed).eval()

    monkeypatch.setattr(segment, "train", train)
    found = downstream.study(real, {"more": downstream.scenes(3, 0)}, tests, sizes=(2, 4), seeds=(0, 1), steps=7)
    assert set(found) == {(2, ""), (2, "more"), (4, ""), (4, "more"), (0, "more")}
    assert all(ious.shape == (2, 4) for ious in found.values())
    assert seen[::2] == [(2, None, 7, 0), (2, 3, 7, 0), (4, None, 7, 0), (4, 3, 7, 0), (3, None, 7, 0)]
