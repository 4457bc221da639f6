"""What may be done to drawn masks before a segmenter learns from them: one function for each lever of the study.

Labels are uint8 (image, row, column) with 255 where a pixel is ignored. Functions return new arrays.
"""

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from skimage.measure import label

from attnlab.masks import IGNORE
from attnlab.segmentation import Segmenter
from attnlab.segmentation.model import as_input

__all__ = ["TOLERANCE", "class_losses", "clean_regions", "filter_pixels", "order_rare", "pixel_losses"]

TOLERANCE = 1.25  # times the mean loss of its class that a pixel may have: FreeMask's own


@torch.no_grad()
def pixel_losses(segmenter: Segmenter, images: np.ndarray, labels: np.ndarray, batch: int = 64) -> np.ndarray:
    """Return a segmenter's cross-entropy of each pixel's label, float32 (image, row, column); 0 where it is ignored."""
    found = []
    for i in range(0, len(images), batch):
        logits = segmenter.logits(as_input(images[i : i + batch]).to(segmenter.model.device))
        targets = torch.from_numpy(labels[i : i + batch]).long().to(logits.device)
        found.append(F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none").cpu())
    return torch.cat(found).numpy()


def class_losses(losses: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Return the mean loss of the pixels of each class, float64 (class,); 0 for a class without a pixel."""
    valid = labels != IGNORE
    total = np.bincount(labels[valid], losses[valid], num_classes)
    return total / np.bincount(labels[valid], minlength=num_classes).clip(1)


def filter_pixels(
    losses: np.ndarray, labels: np.ndarray, limits: np.ndarray, tolerance: float = TOLERANCE
) -> np.ndarray:
    """Ignore pixels whose loss is more than `tolerance` times the limit of their class, `limits` (class,).

    FreeMask (Yang et al., NeurIPS 2023) takes for limits the mean losses on real pairs of the segmenter that was
    trained on them. Of a class that these do not show nothing is kept.
    """
    allowed = np.append(tolerance * np.asarray(limits), np.zeros(IGNORE + 1 - len(limits)))
    return np.where(losses > allowed[labels], IGNORE, labels).astype(np.uint8)


def clean_regions(labels: np.ndarray, least: int) -> np.ndarray:
    """Give regions of fewer than `least` pixels the label that most of the pixels around them have.

    Regions are connected by sides, what is around them by sides and corners: the cleaning of masks in JoDiffusion (Wang
    et al., AAAI 2026), there without the background and from the first class to the last one. Here larger regions come
    first, so that what lies within a cleaned one is cleaned with it. Ignored pixels neither change nor vote.
    """
    cleaned = np.array(labels, np.uint8)
    for one in cleaned:
        regions = label(one.astype(int) + 1, connectivity=1)  # 0 would be background
        sizes, boxes = np.bincount(regions.ravel()), ndimage.find_objects(regions)
        small = np.flatnonzero((sizes > 0) & (sizes < least))
        for number in small[np.argsort(-sizes[small], kind="stable")]:
            box = tuple(slice(max(0, side.start - 1), side.stop + 1) for side in boxes[number - 1])
            inside = regions[box] == number
            around = one[box][ndimage.binary_dilation(inside, np.ones((3, 3))) & ~inside]
            votes = np.bincount(around, minlength=IGNORE + 1)[:IGNORE]
            if votes.any() and one[box][inside][0] != IGNORE:
                one[box][inside] = votes.argmax()
    return cleaned


def order_rare(known: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Choose class proportions to draw pairs with, so that rare classes come more often: float32 (pair, class).

    Rows of `known` (scene, class) are drawn with a probability that is proportional to the sum over classes of the
    scene's proportion by the mean one: a scene with twice the usual share of a rare class counts as one with twice the
    usual share of a frequent class does.
    """
    known = np.asarray(known, np.float32)
    mean = known.mean(0)
    weight = np.divide(known, mean, out=np.zeros_like(known), where=mean > 0).sum(1).astype(np.float64)
    return known[rng.choice(len(known), count, p=weight / weight.sum())]
