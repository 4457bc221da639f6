"""Measure drawn pairs: do labels fit their images, is anything copied, how far are images from real ones?

Plain agreement rewards simple pictures: `relative_agreement` compares with held-out scenes of like content, and
`precision_and_recall` says whether drawn images are likely ones, and whether they are as various.
"""

import numpy as np
import torch
from PIL import Image
from scipy.spatial.distance import cdist

from attnlab.joint import class_proportions
from attnlab.metrics import class_ious
from attnlab.segmentation import Segmenter
from attnlab.segmentation.folders import Pairs, checked
from attnlab.segmentation.model import UNet

__all__ = ["agreement", "describe_pairs", "features", "frechet_distance", "nearest", "precision_and_recall"]
__all__ += ["relative_agreement", "shuffled"]

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


def precision_and_recall(real: np.ndarray, drawn: np.ndarray, k: int = 3) -> tuple[float, float]:
    """Return which fraction of drawn images is like a real one, and of real images like a drawn one.

    Features are (image, feature). An image is like those of a set if, for one of them, it is no farther away than that
    one's k-th nearest neighbor within the set (Kynkäänniemi et al., NeurIPS 2019, equations 1 and 2). ValueError for
    sets of k images or fewer.
    """
    if min(len(real), len(drawn)) <= k:
        raise ValueError(f"sets of {len(real)} and {len(drawn)} images: give more than k={k} of each")
    across = cdist(real, drawn)
    radii = [np.sort(cdist(x, x), 1)[:, k] for x in (real, drawn)]  # the nearest one is the image itself
    precision = (across <= radii[0][:, None]).any(0).mean()
    return float(precision), float((across <= radii[1]).any(1).mean())


def relative_agreement(segmenter: Segmenter, drawn: Pairs, held_out: Pairs, k: int = 5) -> tuple[float, float]:
    """Return the mIoU of a segmenter with drawn labels, and that with the labels of held-out scenes of like content.

    Each drawn image is compared with the k held-out ones that are nearest in the segmenter's `features`: simple
    pictures are compared with simple scenes. Labels that fit as well as exact ones do have twice the same number.
    """
    distance = cdist(*(features(segmenter, images) for images, _ in (drawn, held_out)))
    alike = np.argsort(distance, 1, kind="stable")[:, :k]
    of_held_out = segmenter.evaluate(*held_out)[alike.ravel()]
    return tuple(float(np.nanmean(class_ious(x))) for x in (segmenter.evaluate(*drawn), of_held_out))


def describe_pairs(segmenter: Segmenter, drawn: Pairs, labeled: Pairs, held_out: Pairs) -> dict:
    """Measure drawn pairs beside the labeled ones that their model learned from, and held-out ones.

    Distances are those of `nearest` to the labeled images; copies are seen in the lowest ones, beside the median.
    """
    fits, as_held_out = relative_agreement(segmenter, drawn, held_out)
    precision, recall = precision_and_recall(*(features(segmenter, x) for x, _ in (held_out, drawn)))
    num_classes = len(segmenter.classes)
    return {
        "agreement": fits,
        "agreement of held-out scenes of like content": as_held_out,
        "relative agreement": fits / as_held_out,
        "precision": precision,
        "recall": recall,
        "distances, 5th percentile and median": {
            name: np.percentile(nearest(pairs[0], labeled[0])[0], (5, 50)).tolist()
            for name, pairs in (("drawn", drawn), ("held-out", held_out))
        },
        "class proportions": {
            name: np.nanmean(class_proportions(pairs[1], num_classes), 0).tolist()
            for name, pairs in (("drawn", drawn), ("labeled", labeled), ("held-out", held_out))
        },
    }


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
