"""Segmenters that are trained to a plateau, and terms of their loss that need no labels."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from attnlab.metrics import class_ious
from attnlab.segmentation import Segmenter
from experiments.studies.plateau import Plateau, pairs_loss, train_to_plateau
from experiments.studies.semi_supervised import consistency_loss, soft_loss

CLASSES = ("dark", "light")
SHORT = Plateau(steps=4, every=2, patience=2, batch=4, ema=0.5)


def pairs(count, seed=0, size=16):
    """Images of dark and light squares, and which they are."""
    labels = np.random.default_rng(seed).integers(2, size=(count, 4, 4)).repeat(size // 4, 1).repeat(size // 4, 2)
    return (labels[..., None] * np.full(3, 200)).astype(np.uint8), labels.astype(np.uint8)


class Fixed(torch.nn.Module):
    """Logits that depend on nothing or, with `light`, on whether a pixel is light."""

    def __init__(self, dark, light=None):
        super().__init__()
        self.table = torch.nn.Parameter(torch.tensor([dark, light or dark]))

    def forward(self, x):
        return SimpleNamespace(logits=self.table[(x[:, 0] > 0).long()].permute(0, 3, 1, 2))


def weights(segmenter):
    return torch.cat([x.ravel() for x in segmenter.model.state_dict().values()])


def test_training_ends_where_validation_no_longer_rises():
    labeled, valid = pairs(4), pairs(3, 1)
    still = replace(SHORT, steps=50, every=1, lr=1e-12)
    assert [step for step, _ in train_to_plateau(labeled, CLASSES, valid, still).curve] == [1, 2, 3]
    longer = train_to_plateau(labeled, CLASSES, valid, replace(still, patience=4))
    assert len(longer.curve) == 5
    found = train_to_plateau(labeled, CLASSES, valid, replace(SHORT, steps=40, every=10, patience=3, lr=0.005))
    best = max(miou for _, miou in found.curve)
    assert best > 0.8 and np.nanmean(class_ious(found.evaluate(*valid))) == pytest.approx(best)
    assert np.nanmean(class_ious(found.evaluate(*valid))) > np.nanmean(
        class_ious(found.evaluate(*pairs(3, 2)[:1], valid[1]))
    )
    assert [step for step, _ in train_to_plateau(labeled, CLASSES, valid, replace(SHORT, steps=3)).curve] == [2, 3]


def test_the_best_average_is_returned_not_the_last_one():
    """Half of the validation labels are wrong ones of what is learned: it is at its best before it has learned."""
    labeled, (images, labels) = pairs(4), pairs(3, 1)
    found = train_to_plateau(
        labeled, CLASSES, (images, 1 - labels), replace(SHORT, steps=60, every=5, patience=8, lr=0.02)
    )
    step, best = max(found.curve, key=lambda look: look[1])
    assert step < found.curve[-1][0] and found.curve[-1][1] < best
    assert np.nanmean(class_ious(found.evaluate(images, 1 - labels))) == pytest.approx(best)


def test_what_is_added_counts_by_its_weight_and_changes_no_labeled_batch():
    labeled, valid = pairs(4), pairs(3, 1)

    def extra(learner, averaged, rng):
        return pairs_loss(pairs(5, 3), 4)(learner, averaged, rng)

    def twice(learner, averaged, rng):
        return 2 * extra(learner, averaged, rng)

    alone = train_to_plateau(labeled, CLASSES, valid, SHORT)
    off = train_to_plateau(labeled, CLASSES, valid, SHORT, extra, 0.0)
    torch.testing.assert_close(weights(off), weights(alone), rtol=0, atol=0)
    double = train_to_plateau(labeled, CLASSES, valid, SHORT, extra, 1.0)
    half = train_to_plateau(labeled, CLASSES, valid, SHORT, twice, 0.5)
    torch.testing.assert_close(weights(double), weights(half), rtol=0, atol=1e-6)
    assert (weights(double) - weights(alone)).abs().max() > 1e-4
    other = train_to_plateau(labeled, CLASSES, valid, SHORT, seed=1)
    assert (weights(other) - weights(alone)).abs().max() > 1e-4


def test_the_extra_term_sees_the_average_that_is_measured():
    seen = []

    def extra(learner, averaged, rng):
        seen.append((weights(learner), weights(averaged)))
        return torch.zeros(())

    settings = replace(SHORT, steps=3, every=3)
    train_to_plateau(pairs(4), CLASSES, pairs(3, 1), settings, extra, seed=3)
    (first, begun), (second, once), (_, later) = seen
    assert torch.equal(first, weights(Segmenter.new(CLASSES, "unet", 3)))
    assert torch.equal(first, begun) and torch.equal(second, once)  # an average of one is that one
    assert not torch.equal(later, seen[2][0]) and (later - (seen[2][0] + once) / 2).abs().max() < 1e-6  # decay 0.5


def test_ignored_pixels_do_not_count():
    images, labels = pairs(2)
    learner, rng = Segmenter(Fixed([1.0, 3.0]), CLASSES), np.random.default_rng(0)
    ones = np.full_like(labels, 1)
    wanted = F.cross_entropy(torch.tensor([[1.0, 3.0]]), torch.tensor([1]))
    some = ones.copy()
    some[:, :8] = 255
    for given in (ones, some):
        torch.testing.assert_close(pairs_loss((images, given), 4)(learner, learner, rng), wanted)
    assert float(pairs_loss((images, np.full_like(labels, 255)), 4)(learner, learner, rng).detach()) == 0


def test_soft_labels_are_those_of_the_teacher():
    images = pairs(3)[0]
    teacher, learner = (Segmenter(Fixed(x), CLASSES) for x in ([0.0, 1.0], [2.0, 0.0]))
    p, q = (torch.tensor(x).softmax(0) for x in ([0.0, 1.0], [2.0, 0.0]))
    loss = soft_loss(images, teacher, 4)(learner, learner, np.random.default_rng(0))
    torch.testing.assert_close(loss.detach(), -(p * q.log()).sum())
    loss.backward()
    assert learner.model.table.grad.abs().sum() > 0 and teacher.model.table.grad is None


def test_only_confident_labels_of_the_average_are_learned():
    images = np.zeros((2, 16, 16, 3), np.uint8)
    images[1] = 255
    learner, sure, unsure = (Segmenter(Fixed(x), CLASSES) for x in ([2.0, 0.0], [0.0, 5.0], [0.0, 1.0]))

    def loss(averaged, **options):
        return consistency_loss(images, 8, **options)(learner, averaged, np.random.default_rng(1)).detach()

    wanted = F.cross_entropy(torch.tensor([[2.0, 0.0]]), torch.tensor([1]))
    torch.testing.assert_close(loss(sure), wanted)
    assert loss(unsure) == 0
    torch.testing.assert_close(loss(unsure, confidence=0.7), wanted)
    of_light = Segmenter(Fixed([0.0, 1.0], [0.0, 5.0]), CLASSES)  # sure of one image of two
    assert 0.1 * wanted < loss(of_light) < 0.9 * wanted  # the mean is over all pixels


def test_labels_move_with_what_is_mixed_in():
    """Where the average tells light from dark, a learner that does too has no loss: CutMix moves labels as well."""
    images = np.zeros((2, 16, 16, 3), np.uint8)
    images[1] = 255
    teller = Segmenter(Fixed([9.0, 0.0], [0.0, 9.0]), CLASSES)
    loss = consistency_loss(images, 16)(teller, teller, np.random.default_rng(2))
    assert 0 < float(loss.detach()) < 0.01
