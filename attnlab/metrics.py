"""Measure how well maps and masks match a ground truth: IoU, mIoU-threshold curves, pointing game, intervals.

    ious = miou_curve(heats, truths)                       # (threshold, image)
    ious.mean(axis=1)                                      # the mIoU-threshold curve
    np.percentile(ious, [5, 95], axis=1)                   # its band
    area_under_curve(THRESHOLDS, ious.mean(axis=1))        # its area
    tau = best_threshold(THRESHOLDS, ious)                 # choose tau on some images, report on others

A heat map is a float (row, column) array, a mask or truth a boolean array (or one of zeros and ones) of the same
shape. IoU is a fraction in 0..1; published tables usually print it times 100.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real

import numpy as np
from numpy.typing import ArrayLike

__all__ = [
    "THRESHOLDS", "area_under_curve", "as_mask", "best_threshold", "bootstrap_interval", "check_counts",
    "class_ious", "confusion", "iou", "mean_over_classes", "miou_curve", "pointing_game",
]  # fmt: skip

THRESHOLDS = np.linspace(0, 1, 101)
"""Thresholds of the thesis's curves: 0, 0.01, ... 1, as fractions of each map's maximum."""
THRESHOLDS.setflags(write=False)


def as_mask(mask: ArrayLike, name: str = "mask") -> np.ndarray:
    """Return a mask as booleans.

    ValueError where it has no pixels, or holds other values than True and False, 0 and 1; NaN and 255 are others.

    Parameters
    ----------
    mask, name : array, str
        The mask, and what an error calls it.
    """
    mask = np.asarray(mask)
    if mask.size == 0:
        raise ValueError(f"the {name} has no pixels, its shape is {mask.shape}")
    if mask.dtype != bool and not np.isin(mask, (0, 1)).all():
        raise ValueError(f"the {name} must hold booleans or zeros and ones; for a 0/255 image write `{name} > 0`")
    return mask.astype(bool)


def iou(mask: ArrayLike, truth: ArrayLike) -> float:
    """Return the intersection over union (Jaccard index) of two masks, 0..1.

    Two empty masks agree: their IoU is 1.

    Parameters
    ----------
    mask, truth : array of bool
        Masks of one shape, with any number of axes, as booleans or zeros and ones.

    Examples
    --------
    >>> iou([[1, 1, 0, 0]], [[0, 1, 1, 0]])
    0.3333333333333333
    """
    mask, truth = as_mask(mask, "mask"), as_mask(truth, "truth")
    _check_same_shape(mask, truth)
    union = np.count_nonzero(mask | truth)
    return float(np.count_nonzero(mask & truth) / union) if union else 1.0


def miou_curve(
    heats: Sequence[ArrayLike],
    truths: Sequence[ArrayLike],
    thresholds: ArrayLike = THRESHOLDS,
    valid: Sequence[ArrayLike] | None = None,
) -> np.ndarray:
    """Return the IoU of every image at every threshold.

    The mean over images is the thesis's mIoU-threshold curve (Marcos-Manchón, thesis, UAM 2023). Each map is divided by
    its own maximum, and its mask at tau is ``heat / heat.max() >= tau``. A map without a positive value has an empty
    mask at every threshold.

    Parameters
    ----------
    heats : sequence of (row, column) arrays
        Heat maps, one per image. Sizes may differ between images.
    truths : sequence of (row, column) arrays of bool
        Ground truth, each of the size of its map.
    thresholds : (threshold,) array
        Increasing fractions of the maximum.
    valid : sequence of (row, column) arrays of bool, optional
        Pixels of each image that count; the maximum is that of all pixels.

    Returns
    -------
    (threshold, image) array of float
        IoU, 0..1; where mask and truth are both empty it is 1, as in `iou`.

    Raises
    ------
    ValueError
        If there are no maps, or not one truth (and mask of valid pixels) for each, if sizes differ within a pair, a map
        is not 2-D or holds NaN or infinity, a mask holds other values or no pixel is valid, or thresholds do not
        increase.
    """
    thresholds = _as_floats(thresholds, "thresholds")
    _check_thresholds(thresholds)
    if len(heats) != len(truths) or len(heats) == 0:
        raise ValueError(f"expected one truth for each heat map, got {len(heats)} maps and {len(truths)} truths")
    valid = [None] * len(heats) if valid is None else valid
    if len(valid) != len(heats):
        raise ValueError(f"expected one mask of valid pixels for each of {len(heats)} heat maps, got {len(valid)}")
    return np.stack([_iou_at(h, t, thresholds, k) for h, t, k in zip(heats, truths, valid, strict=True)], axis=1)


def area_under_curve(thresholds: ArrayLike, values: ArrayLike) -> float | np.ndarray:
    """Return the area under a curve by the trapezoid rule, in units of threshold times value.

    Parameters
    ----------
    thresholds : (threshold,) array
        Increasing positions.
    values : (threshold,) or (threshold, image) array
        Height at each position.

    Returns
    -------
    float or (image,) array of float
        One area, or one per image. From 0 to 1 it is also the mean height.

    Examples
    --------
    >>> area_under_curve([0, 0.5, 1], [0, 1, 0])
    0.5
    """
    thresholds, values = _as_curve(thresholds, values)
    area = np.trapezoid(values, thresholds, axis=0)
    return float(area) if values.ndim == 1 else area


def best_threshold(thresholds: ArrayLike, ious: ArrayLike) -> float:
    """Return the threshold with the highest mean IoU over images; the lowest one of equals.

    Choose it on some images and report the IoU of others: the maximum over the images it is reported on, which
    published tables often print, is optimistic.

    Parameters
    ----------
    thresholds : (threshold,) array
        The thresholds of the curve.
    ious : (threshold, image) or (threshold,) array
        IoU as `miou_curve` gives it, or its mean.
    """
    thresholds, ious = _as_curve(thresholds, ious)
    return float(thresholds[ious.reshape(thresholds.size, -1).mean(axis=1).argmax()])


def pointing_game(heat: ArrayLike, truth: ArrayLike) -> bool:
    """Tell whether the map's maximum lies on the object (Zhang et al., ECCV 2016, without their 15-pixel tolerance).

    Where several pixels have the maximum, all of them must be on the object, so a flat map does not score by luck.

    Parameters
    ----------
    heat : (row, column) array
        Heat map.
    truth : (row, column) array of bool
        Ground truth of the same size.
    """
    heat, truth = _as_pair(heat, truth)
    return bool(truth[heat == heat.max()].all())


def bootstrap_interval(
    values: ArrayLike, level: float = 0.95, resamples: int = 2000, seed: int | np.random.Generator = 0
) -> tuple[float, float]:
    """Return a confidence interval of the mean by the percentile bootstrap (Efron 1979).

    Parameters
    ----------
    values : (image,) array
        One number per independent sample, for example an IoU per image.
    level : float in 0..1
        Confidence.
    resamples : int
        Number of means drawn.
    seed : int or numpy.random.Generator
        An int gives the same interval every time.

    Returns
    -------
    low, high : float
        Ends of the interval, in the unit of `values`. A few dozen samples are needed for its width to be trusted.
    """
    values = _as_floats(values, "values")
    if values.ndim != 1 or values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"values must be a row of finite numbers, one per sample; got shape {values.shape}")
    _check_bootstrap(level, resamples)
    rng = np.random.default_rng(seed)
    means = [rng.choice(values, values.size).mean() for _ in range(resamples)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mean_over_classes(
    values: ArrayLike, level: float = 0.95, resamples: int = 2000, seed: int | np.random.Generator = 0
) -> tuple[float, float, float]:
    """Return the mean of each class's mean over its images, and its interval by the bootstrap over images.

    Parameters
    ----------
    values : (image, class) array
        One number per class of each image, NaN where the image does not show the class.
    level, resamples, seed
        As in `bootstrap_interval`.

    Returns
    -------
    mean, low, high : float
        In the unit of `values`. An image that shows several classes is drawn with all of them.

    Examples
    --------
    >>> mean_over_classes([[0.0, np.nan], [1.0, 0.75]])[0]
    0.625
    """
    values = _as_floats(values, "values")
    present = np.isfinite(values)
    if values.ndim != 2 or not present.any(axis=0).all() or np.isinf(values).any():
        raise ValueError(f"values must be (image, class), each class in some image; got shape {values.shape}")
    _check_bootstrap(level, resamples)
    filled, rng = np.where(present, values, 0), np.random.default_rng(seed)
    drawn = rng.multinomial(len(values), np.full(len(values), 1 / len(values)), resamples)  # how often each image
    drawn = drawn[(drawn @ present).any(axis=1)]  # without draws of images alone that show no class
    counts = drawn @ present
    means = np.divide(drawn @ filled, counts, out=np.full(counts.shape, np.nan), where=counts > 0)
    low, high = np.quantile(np.nanmean(means, axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float((filled.sum(0) / present.sum(0)).mean()), float(low), float(high)


def confusion(labels: ArrayLike, predicted: ArrayLike, num_classes: int, per_image: bool = False) -> np.ndarray:
    """Count pixels by true class (row) and predicted class (column): int64, one matrix, or one per image.

    Parameters
    ----------
    labels, predicted : (..., row, column) array of int
        Class numbers, of one image or of a stack of images. Pixels labeled 255 (`attnlab.masks.IGNORE`) are left out.
    num_classes : int
        Number of classes; theirs are 0 to `num_classes` - 1.
    per_image : bool
        Count each image of a stack by itself.

    Examples
    --------
    >>> confusion([[0, 0, 1, 255]], [[0, 1, 1, 0]], num_classes=2)
    array([[1, 1],
           [0, 1]])
    """
    labels, predicted = np.asarray(labels), np.asarray(predicted)
    _check_same_shape(predicted, labels)
    if per_image and labels.ndim < 3:
        raise ValueError(f"per_image wants a stack (image, row, column), got shape {labels.shape}")
    check_counts(num_classes=num_classes)
    valid = labels != 255  # masks.IGNORE
    for name, numbers in (("labels", labels[valid]), ("predicted", predicted[valid])):
        if other := sorted(set(np.unique(numbers).tolist()) - {*range(num_classes)}):
            raise ValueError(f"{name} must be class numbers from 0 to {num_classes - 1}, there is {other[:5]}")
    cells = np.where(valid, labels, 0).astype(int) * num_classes + np.where(valid, predicted, 0).astype(int)
    cells = np.where(valid, cells, -1)
    counts = [np.bincount(image[image >= 0], minlength=num_classes**2) for image in (cells if per_image else [cells])]
    matrices = np.stack(counts).reshape(-1, num_classes, num_classes)
    return matrices if per_image else matrices[0]


def class_ious(confusion: ArrayLike) -> np.ndarray:
    """Return the IoU of each class, (class,) in 0..1, from what `confusion` counts; several images are summed first.

    It is NaN where a class is neither there nor predicted.

    Examples
    --------
    >>> class_ious([[3, 1, 0], [0, 4, 0], [0, 0, 0]])
    array([0.75, 0.8 ,  nan])
    """
    total = np.asarray(confusion)
    if total.ndim < 2 or total.shape[-1] != total.shape[-2] or total.size == 0 or not (total >= 0).all():
        raise ValueError(
            f"counts are (..., true class, predicted class), 0 or more, as `confusion` gives; {total.shape}"
        )
    total = total.reshape(-1, *total.shape[-2:]).sum(axis=0)
    common = np.diag(total).astype(float)
    union = total.sum(axis=0) + total.sum(axis=1) - common
    return np.divide(common, union, out=np.full(len(total), np.nan), where=union > 0)


def _iou_at(heat: ArrayLike, truth: ArrayLike, thresholds: np.ndarray, valid: ArrayLike | None) -> np.ndarray:
    """Return the IoU of one map at each threshold, (threshold,)."""
    heat, truth = _as_pair(heat, truth)
    # A pixel is in the masks of the first `reached` thresholds, so one histogram of `reached` serves all of them.
    positive = heat.max() > 0
    reached = np.searchsorted(thresholds, heat / heat.max(), side="right") if positive else np.zeros(heat.shape, int)
    if valid is not None:
        valid = as_mask(valid, "mask of valid pixels")
        _check_same_shape(valid, truth)
        if not valid.any():
            raise ValueError("no pixel of an image is valid: leave that image out")
        reached, truth = reached[valid], truth[valid]
    predicted, common = (
        np.bincount(pixels, minlength=thresholds.size + 1)[::-1].cumsum()[::-1][1:]
        for pixels in (reached.ravel(), reached[truth])
    )
    union = predicted + np.count_nonzero(truth) - common
    return np.where(union > 0, common / np.maximum(union, 1), 1.0)


def check_counts(least: int = 1, **counts: object) -> None:
    """Refuse what is no whole number of at least `least`: ValueError with its name.

    Parameters
    ----------
    least, **counts : int
        The least that is allowed; what has to be counts, by name.
    """
    for name, value in counts.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}={value!r}: give a whole number, {least} or more")


def _check_thresholds(thresholds: np.ndarray) -> None:
    rising = thresholds.ndim == 1 and thresholds.size and (np.diff(thresholds) > 0).all()
    if not rising or not np.isfinite(thresholds).all():
        raise ValueError("thresholds must be one row of increasing numbers, such as np.linspace(0, 1, 101)")


def _check_bootstrap(level: float, resamples: int) -> None:
    check_counts(resamples=resamples)
    if not isinstance(level, Real) or not 0 < level < 1:
        raise ValueError(f"level={level!r}: give a number between 0 and 1, such as 0.95")


def _as_floats(values: ArrayLike, name: str) -> np.ndarray:
    values = np.asarray(values)
    if values.dtype.kind not in "biuf":
        raise ValueError(f"{name} must be an array of numbers, not of {values.dtype}")
    return values.astype(float)


def _as_pair(heat: ArrayLike, truth: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    heat, truth = _as_floats(heat, "a heat map"), as_mask(truth, "truth")
    if heat.ndim != 2:
        raise ValueError(f"a heat map is 2-D (row, column), got shape {heat.shape}; pass one map at a time")
    _check_same_shape(heat, truth)
    if not np.isfinite(heat).all():
        raise ValueError("the heat map holds NaN or infinity; was it divided by zero?")
    return heat, truth


def _check_same_shape(first: np.ndarray, truth: np.ndarray) -> None:
    if first.shape != truth.shape:
        raise ValueError(f"sizes differ: {first.shape} against a truth of {truth.shape}; upscale the smaller one first")


def _as_curve(thresholds: ArrayLike, values: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    thresholds, values = _as_floats(thresholds, "thresholds"), _as_floats(values, "values")
    if thresholds.ndim != 1 or values.ndim not in (1, 2) or len(values) != len(thresholds) or thresholds.size == 0:
        shapes = f"{thresholds.shape} and {values.shape}"
        raise ValueError(f"expected (threshold,) and (threshold,) or (threshold, image), got {shapes}")
    _check_thresholds(thresholds)
    if not np.isfinite(values).all():
        raise ValueError("the curve holds NaN or infinity")
    return thresholds, values
