"""Compare images by small color thumbnails: near duplicates are found whatever their size, encoding, flip or turn.

A difference hash (`difference_hash`) asks which of two blocks is brighter, which in a flat sky is noise: encoded copies
differ in as many bits as other images do. Thumbnails have no such jumps.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

__all__ = ["TURNS", "WITHIN", "NearPairs", "near_pairs", "thumbnail"]

WITHIN = 6.0
"""Root of the mean squared difference of near duplicates' thumbnails, at most: gray levels, 0..255."""

TURNS = tuple(f"{flip}{turn}" for flip in ("", "flipped") for turn in ("", " 90", " 180", " 270"))
"""What is done to an image before it is compared: flipped from left to right, then turned to the left by degrees."""

_SIDE = 8  # pixels of a thumbnail's side: blocks that small crops and encoders hardly change
_LARGE = 512  # pixels of a side from which on an image is shrunk by Pillow first, which is quicker
_SQUARE = np.arange(_SIDE**2).reshape(_SIDE, _SIDE)
_TURNED = np.stack([np.rot90(x, k).ravel() for x in (_SQUARE, _SQUARE[:, ::-1]) for k in range(4)])  # (turn, pixel)
_ORBITS, _SIZES = np.unique(_TURNED.min(0), return_counts=True)  # pixels that turns move to one another
_CELLS, _BLOCK = 2**22, 2**12  # distances, and pairs of thumbnails, that are held at once


class NearPairs(NamedTuple):
    """Pairs of thumbnails that are near to each other: arrays (pair,)."""

    first: np.ndarray  # positions in the first set
    second: np.ndarray  # positions in the second set
    distance: np.ndarray  # gray levels
    turn: np.ndarray  # number in TURNS of what is done to the second


def thumbnail(image: Image.Image) -> np.ndarray:
    """Shrink an image to the mean colors of 8 x 8 blocks: uint8 (row, column, rgb).

    The thumbnail of a turned image is the turned thumbnail, up to rounding.
    """
    image = image.convert("RGB").resize([min(n, _LARGE) for n in image.size], Image.Resampling.BOX)
    rows, columns = _shares(image.height), _shares(image.width)  # Pillow's own blocks have whole pixels alone
    means = np.einsum("yr,rcx->ycx", rows, np.asarray(image, np.float32), optimize=True)
    return np.einsum("xc,ycz->yxz", columns, means, optimize=True).round().astype(np.uint8)


def _shares(count):
    """Return the share of each of `count` pixels in the mean of each block: (block, pixel)."""
    edges = np.arange(_SIDE + 1) * count / _SIDE
    ends = np.clip(np.arange(1, count + 1), edges[:-1, None], edges[1:, None])
    starts = np.clip(np.arange(count), edges[:-1, None], edges[1:, None])
    return ((ends - starts) * _SIDE / count).astype(np.float32)


def near_pairs(first: np.ndarray, second: np.ndarray | None = None, within: float = WITHIN) -> Iterator[NearPairs]:
    """Yield all pairs of thumbnails that are near to each other, whichever way the second is flipped or turned.

    None is missed: brightness, and means over all turns, which are compared first, differ by no more than thumbnails.

    Parameters
    ----------
    first, second : (image, row, column, rgb) array of uint8
        Thumbnails. Without a second set, those of the first with one another, each pair once: the first comes before.
    within : float
        Largest distance: root of the mean squared difference, gray levels.
    """
    sets = [_pixels(one) for one in ((first,) if second is None else (first, second))]
    means = [_means_over_turns(one) for one in sets]
    bright = [one.mean((1, 2)) for one in sets]
    orders = [np.argsort(one, kind="stable") for one in bright]
    by_brightness = bright[0][orders[0]]
    rows = max(1, _CELLS // max(1, len(first)))
    for start in tqdm(range(0, len(orders[-1]), rows), "comparing", delay=5, leave=False, unit="block"):
        own = orders[-1][start : start + rows]
        low, high = bright[-1][own[0]] - within - 0.1, bright[-1][own[-1]] + within + 0.1
        others = orders[0][slice(*np.searchsorted(by_brightness, [low, high]))]
        j, i = np.nonzero(_squares(means[-1][own], means[0][others]) <= within**2 + 0.1)
        i, j = others[i], own[j]
        if second is None:
            i, j = i[i < j], j[i < j]
        for k in range(0, len(i), _BLOCK):
            yield _compare(sets[0], sets[-1], i[k : k + _BLOCK], j[k : k + _BLOCK], within)


def _pixels(thumbnails):
    """Return thumbnails as float32 (image, pixel, rgb)."""
    return np.asarray(thumbnails, np.float32).reshape(-1, _SIDE**2, 3)


def _means_over_turns(pixels):
    """Return what all turns of a thumbnail have in common, scaled so that distances are at most the thumbnails'."""
    means = np.zeros((len(pixels), len(_ORBITS), 3), np.float32)
    for turned in _TURNED:
        means += pixels[:, turned[_ORBITS]] / len(_TURNED)
    means *= np.sqrt(_SIZES / _SIDE**2 / 3)[:, None].astype(np.float32)
    return means.reshape(len(pixels), -1)


def _squares(a, b):
    """Return squared distances (row of a, row of b)."""
    return (a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * a @ b.T


def _compare(first, second, i, j, within):
    """Compare pairs in all turns of the second; return those that are near."""
    mine, others = first[i], second[j]
    squares = np.stack([((mine - others[:, turned]) ** 2).mean((1, 2)) for turned in _TURNED])
    near = squares.min(0) <= within**2
    return NearPairs(i[near], j[near], np.sqrt(squares.min(0)[near]), squares.argmin(0)[near])
