"""How good drawn pairs are.

Do masks fit images, is anything copied, how far are images from real ones?
"""

import numpy as np
from PIL import Image

from ..segmentation import model as segment
from ..segmentation.folders import checked

SIDE = 16  # pixels of the thumbnails by which images are compared


def agreement(model, images: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """IoU (class,) of labels with what a segmenter that knows the world sees in their images; NaN of absent classes."""
    return segment.class_ious(segment.evaluate(model, images, labels, count))


def nearest(images: np.ndarray, among: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance of each image to the nearest one among others, (image,), and which one that is, (image,).

    Root mean square of thumbnails' colors in 0..1, the least over all flips and quarter turns, as training sees them.
    Copies of what a model was trained on lie nearer than new images of the same world do.
    """
    found, others = _thumbnails(images), _thumbnails(among)
    turned = [np.rot90(x, k, (1, 2)) for x in (others, others[:, :, ::-1]) for k in range(4)]
    others = np.stack(turned).reshape(8, len(among), -1)
    apart = np.sqrt([((one.ravel() - others) ** 2).mean(2).min(0) for one in found])  # (image, other)
    return apart.min(1), apart.argmin(1)


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Between Gaussians with the mean and covariance of two sets of features, (image, feature).

    Heusel et al., NeurIPS 2017, there with Inception's features: it depends on the features, and on how many images
    there are. ValueError for fewer than two of a set, or another width.
    """
    if min(len(first), len(second)) < 2 or first.shape[1] != second.shape[1]:
        raise ValueError(f"features are (two or more, width) of one width, not {first.shape} and {second.shape}")
    (m1, c1), (m2, c2) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (first, second))
    c1, c2 = np.atleast_2d(c1), np.atleast_2d(c2)
    shared = np.sqrt(np.linalg.eigvals(c1 @ c2).real.clip(min=0)).sum()  # the trace of the root, singular or not
    return float(((m1 - m2) ** 2).sum() + np.trace(c1 + c2) - 2 * shared)


def shuffled(labels: np.ndarray, seed: int = 0) -> np.ndarray:
    """The same labels, none with its own image any more: what agreement is by chance."""
    order = np.random.default_rng(seed).permutation(len(labels))
    shifted = np.empty_like(order)
    shifted[order] = np.roll(order, 1)
    return np.asarray(labels)[shifted]


def _thumbnails(images):
    images, _ = checked(images, np.zeros(np.shape(images)[:3], np.uint8), 1)
    small = [np.asarray(Image.fromarray(x).resize((SIDE, SIDE), Image.Resampling.BOX)) for x in images]
    return np.stack(small).astype(np.float32) / 255
