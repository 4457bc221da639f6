"""The reference segmenters: measured by hand-made masks, at work on scenes and on what the model draws."""

import numpy as np
import pytest

import attnlab as al
from attnlab.metrics import class_ious
from attnlab.scenes import aerial, street
from experiments.bundled.steer import shown_classes
from experiments.bundled.street_segmenter import measure_segmenter


@pytest.fixture(scope="module")
def segmenter():
    return al.load_segmenter("street", device="cpu")


def test_labels_of_held_out_scenes(segmenter):
    """Far below the card's figures: broken weights or a wrong order of classes would not pass."""
    assert segmenter.classes == street.CLASSES
    scenes = [street.render(seed) for seed in range(street.HELD_OUT, street.HELD_OUT + 40)]
    result = measure_segmenter(segmenter, np.stack([s.image for s in scenes]), np.stack([s.labels for s in scenes]))
    assert result["mIoU"] > 0.6 and result["IoU"]["sky"] > 0.9


def test_the_aerial_one():
    segmenter = al.load_segmenter("aerial", device="cpu")
    assert segmenter.classes == aerial.CLASSES
    scenes = [aerial.render(seed, 64) for seed in range(aerial.HELD_OUT, aerial.HELD_OUT + 20)]
    images, labels = np.stack([s.image for s in scenes]), np.stack([s.labels for s in scenes])
    assert np.nanmean(class_ious(segmenter.evaluate(images, labels))) > 0.5
    with pytest.raises(FileNotFoundError, match="choose street or aerial"):
        al.load_segmenter("moon")


def test_generated_images(segmenter, pipe):
    """It sees the fire and the smoke that were asked for, whether images come from PIL or as an array."""
    prompts = ["a burning house with fire and smoke"] * 4
    images = pipe(prompts, generator=[al.seed(i) for i in range(4)], num_inference_steps=10, guidance_scale=4.0).images
    labels = segmenter.segment(images)
    assert labels.shape == (4, 64, 64) and labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, segmenter.segment(np.stack([np.asarray(i) for i in images]), batch=3))
    found = shown_classes(labels, len(segmenter.classes))
    assert found[:, street.CLASSES.index("fire")].all() and found[:, street.CLASSES.index("smoke")].sum() >= 3


def test_measure_by_hand():
    """Two classes: a third of the small object is missed, and one sky pixel is called a car."""

    class Answer:
        classes = ("sky", "car")

        def segment(self, images):
            return np.array(found, np.uint8)[None]

    truth, found = np.zeros((64, 64), int), np.zeros((64, 64), int)
    truth[10:13, 10:14] = 1
    found[10:12, 10:14], found[40, 40] = 1, 1
    result = measure_segmenter(Answer(), None, truth[None].astype(np.uint8))
    assert result["IoU"]["car"] == pytest.approx(8 / 13)
    assert result["recall of small objects"] == {"car": {"objects": 1, "recall": 1.0}}


def test_shown():
    labels = np.zeros((2, 100, 100), np.uint8)
    labels[0, :10, :10], labels[1, :5, :5] = 1, 1  # 1% is enough to be named, 0.25% is not
    assert shown_classes(labels, 3).tolist() == [[True, True, False], [True, False, False]]


def test_wrong_input(segmenter):
    with pytest.raises(ValueError, match=r"not float64 \(1, 64, 64, 3\)"):
        segmenter.segment(np.zeros((1, 64, 64, 3)))
