"""Augmentations: functions of a batch of pairs and a random generator that return new arrays.

Images are uint8 (image, row, column, rgb), labels uint8 (image, row, column) with 255 where a pixel is ignored.
"""

import numpy as np
from skimage.measure import label

from ..masks import IGNORE
from .folders import Pairs

__all__ = ["AUGMENTATIONS", "color", "copy_paste", "crop", "cutmix", "flip", "rotate90"]


def flip(images: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> Pairs:
    """Flip each pair left-right with probability 1/2."""
    flips = rng.random(len(images)) < 0.5
    return tuple(np.stack([x[:, ::-1] if f else x for x, f in zip(xs, flips, strict=True)]) for xs in (images, labels))


def rotate90(images: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> Pairs:
    """Rotate each pair by 0, 90, 180 or 270 degrees: for squares seen from above; ValueError for others."""
    if labels.shape[1] != labels.shape[2]:
        raise ValueError(f"images are {labels.shape[1:]}: rotate90 is for squares, leave it out or cut patches")
    quarters = rng.integers(4, size=len(images))
    return tuple(np.stack([np.rot90(x, k) for x, k in zip(xs, quarters, strict=True)]) for xs in (images, labels))


def crop(images: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> Pairs:
    """Crop each pair to a square of 2/3 of its side or more, and resize it back by nearest pixels."""
    cropped = []
    for image, one in zip(images, labels, strict=True):
        part = rng.uniform(2 / 3, 1)
        sides = zip(one.shape, rng.uniform(0, 1 - part, 2), strict=True)
        rows, columns = ((n * (start + part * (np.arange(n) + 0.5) / n)).astype(int) for n, start in sides)
        cropped.append((image[rows][:, columns], one[rows][:, columns]))
    return tuple(np.stack(x) for x in zip(*cropped, strict=True))


def color(images: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> Pairs:
    """Scale brightness and contrast by factors of 0.75 to 1.25, and each color channel by one of 0.9 to 1.1."""
    shape = (len(images), 1, 1, 1)
    x, mean = images.astype(np.float32), images.mean((1, 2, 3), keepdims=True)
    x = mean + (x - mean) * rng.uniform(0.75, 1.25, shape)
    x = x * rng.uniform(0.75, 1.25, shape) * rng.uniform(0.9, 1.1, (len(images), 1, 1, 3))
    return x.round().clip(0, 255).astype(np.uint8), labels


def cutmix(images: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> Pairs:
    """Paste a rectangle of another pair, at most half the image, into half of the pairs (Yun et al., ICCV 2019)."""
    mixed = images.copy(), labels.copy()
    height, width = labels.shape[1:]
    for i in np.flatnonzero(rng.random(len(images)) < 0.5):
        side = np.sqrt(rng.uniform(0, 0.5))
        rows, columns = max(1, int(side * height)), max(1, int(side * width))
        top, left, other = rng.integers(height - rows + 1), rng.integers(width - columns + 1), rng.integers(len(images))
        box = np.s_[top : top + rows, left : left + columns]
        mixed[0][i][box], mixed[1][i][box] = images[other][box], labels[other][box]
    return mixed


def copy_paste(images: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> Pairs:
    """Paste some connected regions of another pair of the batch, where they were, into half of the pairs.

    As Ghiasi et al., CVPR 2021, with connected regions of a class for instances. Regions of more than 1/8 of the
    image, which things stand on, are not copied.
    """
    pasted = images.copy(), labels.copy()
    for i in np.flatnonzero(rng.random(len(images)) < 0.5):
        other = rng.integers(len(images))
        image, one = images[other], labels[other]
        regions = label(one.astype(int) + 1, connectivity=1)
        sizes = np.bincount(regions.ravel())
        small = [n for n in range(1, len(sizes)) if sizes[n] <= one.size / 8 and one[regions == n][0] != IGNORE]
        chosen = np.isin(regions, [n for n in small if rng.random() < 0.5])
        pasted[0][i][chosen], pasted[1][i][chosen] = image[chosen], one[chosen]
    return pasted


AUGMENTATIONS = {"flip": flip, "rotate90": rotate90, "crop": crop, "color": color, "cutmix": cutmix}
AUGMENTATIONS["copy-paste"] = copy_paste
