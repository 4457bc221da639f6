"""Validate masks, average them down to the resolution of a map, and compare maps with them."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike

from .. import metrics
from ..maps.heatmaps import minmax, upscale
from ..masks import IGNORE

__all__ = ["as_masks", "best_threshold_and_iou", "coverage", "valid_iou"]


def as_masks(masks: Sequence[ArrayLike], size, count: int, name: str = "masks", absent=False) -> list[np.ndarray]:
    """Return masks as uint8 (row, column) of 0, 1 and IGNORE (255), one for each of `count` images.

    ValueError for another number of masks; for one that is not 2-D, holds other values, is (unless `absent`) full, or
    empty but for ignored pixels; and for other proportions than those of maps of `size`, (row, column).
    """
    if len(masks) != count:
        raise ValueError(f"{name} has {len(masks)} masks for {count} images: give one for each")
    return [_as_mask(np.asarray(mask), size, f"{name}[{i}]", absent) for i, mask in enumerate(masks)]


def _as_mask(mask, size, name, absent):
    if mask.ndim != 2 or mask.size == 0:
        raise ValueError(f"{name} is (row, column), one plane, not of shape {mask.shape}")
    if mask.dtype != bool and not np.isin(mask, (0, 1, IGNORE)).all():
        raise ValueError(
            f"{name} holds other values than True and False, 0, 1 and {IGNORE}, or NaN; of a gray image take mask > 127"
        )
    (rows, columns), (height, width) = mask.shape, size
    if abs(rows * width - columns * height) > max(rows, columns, height, width):  # a pixel of rounding on either side
        raise ValueError(
            f"{name} has {rows} x {columns} pixels, the maps {height} x {width}: a mask may have any size, but covers "
            "the whole image, so its proportions must be the maps'"
        )
    mask = mask.astype(np.uint8)
    if not (mask == 1).any() and not absent:
        hint = f"for a mask of 0 and 255 write mask > 0, as {IGNORE} is ignored" if mask.any() else ""
        raise ValueError(f"{name} is empty: leave that image out, or give it to fit_tokens; {hint}".rstrip("; "))
    if not (mask == 0).any() and not absent:
        raise ValueError(f"{name} is full: a word can only be learned where the image shows something else as well")
    return mask


def coverage(masks: Sequence[np.ndarray], size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the fraction of each cell's valid pixels that lie in the mask, and the fraction that is valid.

    Of masks from `as_masks`; both float64 (image, row, column) of `size`, 0..1.
    """
    planes = (torch.from_numpy(np.stack([mask == 1, mask != IGNORE])).double() for mask in masks)
    inside, valid = torch.stack([F.adaptive_avg_pool2d(of_image, size) for of_image in planes], 1)
    return inside / valid.clamp(min=1e-9), valid


def valid_iou(heat: np.ndarray, mask: np.ndarray, threshold: float | None = None) -> float:
    """Return the IoU of map >= threshold (a fraction of its range; None: map > 0) with a mask, on valid pixels."""
    found = upscale(heat, mask.shape) > 0 if threshold is None else minmax(heat, mask.shape) >= threshold
    valid = mask != IGNORE
    return metrics.iou(found[valid], mask[valid] == 1) if valid.any() else np.nan


def best_threshold_and_iou(heats: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> tuple[float, float]:
    """Return the threshold, a fraction of each map's range, with the highest mean IoU on valid pixels; and that IoU."""
    heats = [minmax(heat, mask.shape) for heat, mask in zip(heats, masks, strict=True)]
    ious = metrics.miou_curve(heats, [mask == 1 for mask in masks], valid=[mask != IGNORE for mask in masks])
    return metrics.best_threshold(metrics.THRESHOLDS, ious), float(ious.mean(1).max())
