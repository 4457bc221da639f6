"""Varied pairs for training: functions of a batch and a generator that return new arrays.

Images are uint8 (image, row, column, rgb), labels uint8 (image, row, column) with 255 where undecided.
"""

from collections.abc import Callable, Sequence

import numpy as np
from skimage.measure import label

from ..masks import IGNORE

Batch = tuple[np.ndarray, np.ndarray]


def flip(images: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> Batch:
    """Each pair left-right or as it is."""
    flips = rng.random(len(images)) < 0.5
    return tuple(np.stack([x[:, ::-1] if f else x for x, f in zip(xs, flips, strict=True)]) for xs in (images, labels))


def turn(images: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> Batch:
    """Each pair turned by a number of quarters, for squares seen from above."""
    quarters = rng.integers(4, size=len(images))
    return tuple(np.stack([np.rot90(x, k) for x, k in zip(xs, quarters, strict=True)]) for xs in (images, labels))


def crop(images: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> Batch:
    """Each pair cut to a square of two thirds of its side or more, and stretched back; nearest pixels."""
    found = [], []
    for image, one in zip(images, labels, strict=True):
        height, width = one.shape
        part = rng.uniform(2 / 3, 1)
        top, left = rng.uniform(0, 1 - part, 2)
        rows = (height * (top + part * (np.arange(height) + 0.5) / height)).astype(int)
        columns = (width * (left + part * (np.arange(width) + 0.5) / width)).astype(int)
        found[0].append(image[rows][:, columns])
        found[1].append(one[rows][:, columns])
    return np.stack(found[0]), np.stack(found[1])


def color(images: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> Batch:
    """Brightness and contrast by a factor of 0.75 to 1.25, each color channel by one of 0.9 to 1.1."""
    shape = (len(images), 1, 1, 1)
    x, mean = images.astype(np.float32), images.mean((1, 2, 3), keepdims=True)
    x = mean + (x - mean) * rng.uniform(0.75, 1.25, shape)
    x = x * rng.uniform(0.75, 1.25, shape) * rng.uniform(0.9, 1.1, (len(images), 1, 1, 3))
    return x.round().clip(0, 255).astype(np.uint8), labels


def cutmix(images: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> Batch:
    """Into half of the pairs a rectangle of another one of the batch (Yun et al., ICCV 2019), half of it at most."""
    images, labels, (height, width) = images.copy(), labels.copy(), labels.shape[1:]
    before = images.copy(), labels.copy()
    for i in np.flatnonzero(rng.random(len(images)) < 0.5):
        side = np.sqrt(rng.uniform(0, 0.5))
        rows, columns = max(1, int(side * height)), max(1, int(side * width))
        top, left, other = rng.integers(height - rows + 1), rng.integers(width - columns + 1), rng.integers(len(images))
        box = np.s_[top : top + rows, left : left + columns]
        images[i][box], labels[i][box] = before[0][other][box], before[1][other][box]
    return images, labels


def copy_paste(images: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> Batch:
    """Into half of the pairs some connected regions of another one of the batch, where they were.

    As Ghiasi et al., CVPR 2021, with the regions of classes for instances. Regions of more than an eighth of the image,
    which things stand on, are not copied.
    """
    images, labels = images.copy(), labels.copy()
    before = images.copy(), labels.copy()
    for i in np.flatnonzero(rng.random(len(images)) < 0.5):
        other = rng.integers(len(images))
        image, one = before[0][other], before[1][other]
        regions = label(one.astype(int) + 1, connectivity=1)
        sizes = np.bincount(regions.ravel())
        small = [n for n in range(1, len(sizes)) if sizes[n] <= one.size / 8 and one[regions == n][0] != IGNORE]
        chosen = [n for n in small if rng.random() < 0.5]
        pasted = np.isin(regions, chosen)
        images[i][pasted], labels[i][pasted] = image[pasted], one[pasted]
    return images, labels


WAYS: dict[str, Callable[[np.ndarray, np.ndarray, np.random.Generator], Batch]] = {
    "flip": flip,
    "turn": turn,
    "crop": crop,
    "color": color,
    "cutmix": cutmix,
    "copy-paste": copy_paste,
}


def check(ways: Sequence[str]) -> None:
    """ValueError where there is no such way."""
    if unknown := [way for way in ways if way not in WAYS]:
        raise ValueError(f"no augmentation {', '.join(map(repr, unknown))}; there are {', '.join(WAYS)}")
