"""Masks as a map's cells see them, and what a usable mask is.

A mask covers the whole image, whatever its size: a cell of a map holds the share of the mask's pixels that lie in it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike

from ..masks import IGNORE


def as_masks(masks: Sequence[ArrayLike], size: tuple[int, int], count: int, name: str = "masks") -> list[np.ndarray]:
    """Masks as uint8 (row, column) of 0, 1 and UNDECIDED (255), one for each of `count` images.

    ValueError where the number is another, a mask is no plane of booleans, 0, 1 and 255, is empty but for undecided
    pixels or full, or is of another shape than maps of `size`, (row, column), stretched.
    """
    if len(masks) != count:
        raise ValueError(f"{name} has {len(masks)} masks for {count} images: give one for each")
    return [as_mask(mask, size, f"{name}[{i}]") for i, mask in enumerate(masks)]


def as_mask(mask: ArrayLike, size: tuple[int, int], name: str = "mask", absent: bool = False) -> np.ndarray:
    """One of `as_masks`; `absent` lets it be empty, or full."""
    mask = np.asarray(mask)
    if mask.ndim != 2 or mask.size == 0:
        raise ValueError(f"{name} is (row, column), one plane, not of shape {mask.shape}")
    if mask.dtype != bool and not np.isin(mask, (0, 1, IGNORE)).all():
        raise ValueError(
            f"{name} holds other values than True and False, 0 and 1 ({IGNORE}: undecided), or NaN; of a gray image "
            "take mask > 127"
        )
    (rows, columns), (height, width) = mask.shape, size
    if abs(rows * width - columns * height) > max(rows, columns, height, width):  # a pixel of rounding on either side
        raise ValueError(
            f"{name} has {rows} x {columns} pixels, the maps {height} x {width}: a mask may have any size, but covers "
            "the whole image, so its proportions must be the maps'"
        )
    mask = mask.astype(np.uint8)
    if not (mask == 1).any() and not absent:
        hint = f"for a mask of 0 and 255 write mask > 0, as {IGNORE} is undecided here" if mask.any() else ""
        raise ValueError(f"{name} is empty: leave that image out, or give it to fit_tokens; {hint}".rstrip("; "))
    if not (mask == 0).any() and not absent:
        raise ValueError(f"{name} is full: a word can only be learned where there is something else beside it")
    return mask


def shares(masks: Sequence[np.ndarray], size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of `as_masks`: the share of each cell's decided pixels that lie in the mask, and the share that is decided.

    Both float64 (image, row, column) of `size`, 0..1.
    """

    def averaged(planes):
        return torch.cat([F.adaptive_avg_pool2d(torch.from_numpy(p)[None].double(), size) for p in planes])

    inside, decided = averaged([m == 1 for m in masks]), averaged([m != IGNORE for m in masks])
    return inside / decided.clamp(min=1e-9), decided
