"""Terms of a segmenter's loss that need no labels: soft predictions of another one, and consistency of its own."""

import numpy as np
import torch
import torch.nn.functional as F

from attnlab.masks import IGNORE
from attnlab.segmentation import Segmenter
from attnlab.segmentation.augment import AUGMENTATIONS, cutmix, flip
from attnlab.segmentation.model import as_input

from .plateau import GEOMETRY, ExtraLoss

__all__ = ["consistency_loss", "soft_loss"]


def soft_loss(images: np.ndarray, teacher: Segmenter, batch: int) -> ExtraLoss:
    """Return the cross-entropy with what another segmenter predicts for the same pixels, probabilities and all.

    The images may be drawn: their own masks are not looked at.
    """

    def loss(learner, averaged, rng):
        x = as_input(AUGMENTATIONS["color"](*_weak(images, batch, rng), rng)[0])
        with torch.no_grad():
            wanted = teacher.logits(x).softmax(1)
        return F.cross_entropy(learner.logits(x), wanted)

    return loss


def consistency_loss(images: np.ndarray, batch: int, confidence: float = 0.95) -> ExtraLoss:
    """Return the cross-entropy on strongly augmented images with labels of weakly augmented ones.

    FixMatch (Sohn et al., NeurIPS 2020) as UniMatch has it for pixels (Yang et al., CVPR 2023), without its dropout of
    features and its second strong view: pixels whose most likely class has less than `confidence` do not count, but the
    mean is over all. Strong views are colored twice and mixed by CutMix, with their labels. Labels are those of the
    averaged weights, as in Mean Teacher (Tarvainen and Valpola, NeurIPS 2017).
    """

    def loss(learner, averaged, rng):
        weak, _ = _weak(images, batch, rng)
        with torch.no_grad():
            likely, labels = averaged.logits(as_input(weak)).softmax(1).max(1)
        pseudo = torch.where(likely >= confidence, labels, IGNORE).byte().numpy()
        strong = AUGMENTATIONS["color"](*AUGMENTATIONS["color"](weak, pseudo, rng), rng)
        x, y = cutmix(*strong, rng)
        total = F.cross_entropy(
            learner.logits(as_input(x)), torch.from_numpy(y).long(), ignore_index=IGNORE, reduction="sum"
        )
        return total / y.size

    return loss


def _weak(images, batch, rng):
    """Draw images, flipped, rotated and cropped, and labels that say nothing."""
    x = images[rng.integers(len(images), size=batch)]
    x, y = flip(x, np.full(x.shape[:3], IGNORE, np.uint8), rng)
    for name in GEOMETRY:
        x, y = AUGMENTATIONS[name](x, y, rng)
    return x, y
