"""What is done to drawn masks, on masks set by hand."""

import numpy as np
import torch
import torch.nn.functional as F

from attnlab.segmentation import Segmenter
from attnlab.segmentation.model import as_input
from experiments.studies import pair_levers


def test_pixels_with_more_than_the_usual_loss_of_their_class_are_ignored():
    labels = np.array([[[0, 0, 1], [1, 255, 2]]], np.uint8)
    losses = np.array([[[0.1, 0.3, 1.0], [3.0, 0.0, 0.5]]])
    limits = pair_levers.class_losses(losses, labels, 4)
    np.testing.assert_allclose(limits, [0.2, 2.0, 0.5, 0])
    found = pair_levers.filter_pixels(losses, labels, limits)
    assert found.tolist() == [[[0, 255, 1], [255, 255, 2]]]  # 0.3 > 1.25 * 0.2, 3 > 1.25 * 2; 0.5 is not above 0.625
    assert pair_levers.filter_pixels(losses, labels, limits, 2).tolist() == labels.tolist()
    unseen = pair_levers.filter_pixels(losses, labels, [0.2, 2.0])  # the labeled scenes show no third class
    assert unseen[0, 1, 2] == 255 and unseen.dtype == np.uint8 and labels[0, 0, 1] == 0


def test_losses_of_pixels_are_those_of_the_labels():
    rng = np.random.default_rng(0)
    images, labels = rng.integers(256, size=(3, 16, 16, 3)).astype(np.uint8), np.ones((3, 16, 16), np.uint8)
    labels[0, 0, 0] = 255
    segmenter = Segmenter.new(("a", "b"), "unet")
    found = pair_levers.pixel_losses(segmenter, images, labels, batch=2)
    with torch.no_grad():
        wanted = -F.log_softmax(segmenter.logits(as_input(images)), 1)[:, 1]
    assert found[0, 0, 0] == 0
    np.testing.assert_allclose(found.ravel()[1:], wanted.numpy().ravel()[1:], atol=0.02)  # in bfloat16


def test_small_regions_take_the_label_around_them():
    labels = np.zeros((1, 8, 8), np.uint8)
    labels[0, :, 4:] = 1
    labels[0, 1, 1:3] = 2  # two pixels within 0
    labels[0, 5, 3] = 3  # at the border: five of its neighbors are 0, three are 1
    labels[0, 6, 6] = 0  # within 1
    labels[0, 3, 1:4] = 4  # three pixels stay
    labels[0, 7, 0] = 255
    found = pair_levers.clean_regions(labels, 3)
    wanted = np.zeros((1, 8, 8), np.uint8)
    wanted[0, :, 4:] = 1
    wanted[0, 3, 1:4] = 4
    wanted[0, 7, 0] = 255
    np.testing.assert_array_equal(found, wanted)
    assert labels[0, 1, 1] == 2  # the masks that were given stay
    speck = np.full((1, 3, 3), 255, np.uint8)
    speck[0, 1, 1] = 2
    np.testing.assert_array_equal(pair_levers.clean_regions(speck, 5), speck)  # nobody votes
    nested = np.zeros((1, 7, 7), np.uint8)
    nested[0, 2:5, 2:5], nested[0, 3, 3] = 1, 2  # a ring of eight pixels around one
    assert set(np.unique(pair_levers.clean_regions(nested, 9))) == {0}  # the ring first, then all around the one is 0
    assert pair_levers.clean_regions(nested, 8)[0, 3, 3] == 1


def test_rare_classes_are_ordered_more_often():
    known = np.array([[1, 0], [1, 0], [1, 0], [0.6, 0.4]], np.float32)  # means 0.9 and 0.1
    found = pair_levers.order_rare(known, 20_000, np.random.default_rng(0))
    share = (found[:, 1] > 0).mean()
    weight = 0.6 / 0.9 + 0.4 / 0.1
    assert abs(share - weight / (weight + 3 / 0.9)) < 0.01 and share > 0.5  # of one in four scenes
    assert found.dtype == np.float32 and found.shape == (20_000, 2)
    absent = pair_levers.order_rare(np.array([[1, 0], [1, 0]]), 3, np.random.default_rng(0))
    assert absent.tolist() == [[1, 0]] * 3
