"""Measure drawn pairs: do labels fit their images, is anything copied, how far are images from real ones?"""

import numpy as np
import torch
from PIL import Image

from attnlab.metrics import class_ious
from attnlab.segmentation import Segmenter
from attnlab.segmentation.folders import checked
from attnlab.segmentation.model import UNet

__all__ = ["agreement", "features", "frechet_distance", "nearest", "shuffled"]

_THUMBNAIL = 16  # side in pixels of the thumbnails by which images are compared


def agreement(segmenter: Segmenter, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the IoU (class,) of labels with what a segmenter sees in their images; NaN for absent classes."""
    return class_ious(segmenter.evaluate(images, labels))


def features(segmenter: Segmenter, images: np.ndarray, batch: int = 64) -> np.ndarray:
    """Return the mean over pixels of the features at a segmenter's coarsest level: float64 (image, feature)."""
    level, found = segmenter.model.mid_block if isinstance(segmenter.model, UNet) else segmenter.model.segformer, []
    # SegFormer's encoder gives an object that holds its last state, the U-Net's block a tensor
    keep = level.register_forward_hook(lambda *call: found.append(getattr(call[-1], "last_hidden_state", call[-1])))
    try:
        segmenter.segment(images, batch)
    finally:
        keep.remove()
    return torch.cat([x.mean((2, 3)).double().cpu() for x in found]).numpy()


def nearest(images: np.ndarray, among: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distance of each image to the nearest one among others, (image,), and that one's number, (image,).

    It is the root mean square difference of thumbnails' colors in 0..1, the least over all flips and rotations by 90
    degrees, as training sees them. Copies of training images are nearer than new images of the same world.
    """
    found, others = _thumbnails(images), _thumbnails(among)
    turned = [np.rot90(x, k, (1, 2)) for x in (others, others[:, :, ::-1]) for k in range(4)]
    others = np.stack(turned).reshape(8, len(among), -1)
    apart = np.sqrt([((one.ravel() - others) ** 2).mean(2).min(0) for one in found])  # (image, other)
    return apart.min(1), apart.argmin(1)


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Return the Fréchet distance between Gaussians of the mean and covariance of two sets of features.

    Each is (image, feature). Heusel et al., NeurIPS 2017, there with Inception's features: it depends on the features,
    and on how many images there are. ValueError for fewer than two of a set, or another width.
    """
    if min(len(first), len(second)) < 2 or first.shape[1] != second.shape[1]:
        raise ValueError(f"features are (two or more, width) of one width, not {first.shape} and {second.shape}")
    (m1, c1), (m2, c2) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (first, second))
    c1, c2 = np.atleast_2d(c1), np.atleast_2d(c2)
    shared = np.sqrt(np.linalg.eigvals(c1 @ c2).real.clip(min=0)).sum()  # the trace of the root, singular or not
    return float(((m1 - m2) ** 2).sum() + np.trace(c1 + c2) - 2 * shared)


def shuffled(labels: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return labels in another order, none with its own image: with them `agreement` is that of chance."""
    order = np.random.default_rng(seed).permutation(len(labels))
    shifted = np.empty_like(order)
    shifted[order] = np.roll(order, 1)
    return np.asarray(labels)[shifted]


def _thumbnails(images):
    images, _ = checked(images, np.zeros(np.shape(images)[:3], np.uint8), 1)
    small = [np.asarray(Image.fromarray(x).resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BOX)) for x in images]
    return np.stack(small).astype(np.float32) / 255
