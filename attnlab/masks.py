"""Turn a heat map into a binary mask: by threshold, by Otsu, by DBSCAN, or refined along the edges of the image.

>>> import numpy as np
>>> heat = np.array([[0.9, 0.8, 0.0, 0.0], [0.8, 0.7, 0.0, 0.5]])
>>> threshold_mask(heat, level=0.5).astype(int)
array([[1, 1, 0, 0],
       [1, 1, 0, 1]])
>>> dbscan_mask(heat, level=0.5, min_samples=2).astype(int)
array([[1, 1, 0, 0],
       [1, 1, 0, 0]])

A heat map is a float (row, column) array in any unit, larger where the word is more present; a mask is a boolean
(row, column) array of the same shape. Every function reads whatever `numpy.asarray` takes and raises ValueError
for a map that is not 2-D, is empty, or holds NaN or infinity. A map without an answer, a flat one for example, gives
an empty mask and a UserWarning: one bad image does not stop a run over thousands.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Mapping
from numbers import Integral, Real

import numpy as np
from numpy.typing import ArrayLike
from skimage.filters import threshold_otsu
from skimage.segmentation import random_walker
from sklearn.cluster import DBSCAN

__all__ = [
    "IGNORE", "METHODS", "check_mask", "dbscan_clusters", "dbscan_mask", "mask_by", "otsu_mask", "random_walker_mask",
    "threshold_mask", "vote_mask",
]  # fmt: skip

IGNORE = 255  # label of pixels that belong to no class and that losses and metrics leave out
METHODS = {  # of `mask_by`, and the settings of each
    "threshold": ("level",),
    "otsu": (),
    "dbscan": ("quantile", "level", "eps", "min_samples", "keep", "min_area"),
    "random_walker": ("low", "high", "beta"),
    "zero": (),
}
_TINY, _HUGE = sys.float_info.min, sys.float_info.max
_RULES = {  # of the settings that are no fractions: kind, least and largest value, and what to say
    "eps": (Real, _TINY, _HUGE, "eps is a radius in pixels, a number above 0; 1.5 joins diagonal neighbors"),
    "min_samples": (Integral, 1, _HUGE, "min_samples counts pixels, a whole number of at least 1"),
    "min_area": (Real, 0, _HUGE, "min_area counts pixels of the map, a number from 0 on"),
    "beta": (Real, _TINY, _HUGE, "beta is a number above 0; 130 is a good start"),
}


def threshold_mask(heat: ArrayLike, level: float = 0.4) -> np.ndarray:
    """Return the pixels that reach a fraction of the map's maximum: ``heat >= level * heat.max()``.

    Parameters
    ----------
    heat : (row, column) array
        Heat map.
    level : float in 0..1
        Fraction of the maximum. 0.4 is OVAM's choice for words, 0.75 for optimized tokens (arXiv 2403.14291).
    """
    heat = _as_heat(heat)
    _check(level=level)
    if heat.max() <= 0:
        _warn("the heat map has no positive value, so no fraction of its maximum exists")
    return _above(heat, level)


def otsu_mask(heat: ArrayLike) -> np.ndarray:
    """Return the pixels above the threshold that best splits the map's histogram in two (Otsu 1979, by scikit-image).

    Where the map is constant the mask is empty, with a warning.
    """
    heat = _as_heat(heat)
    if heat.min() == heat.max():
        _warn("the heat map is constant, so Otsu has nothing to split")
        return np.zeros(heat.shape, bool)
    return heat > threshold_otsu(heat)


def dbscan_clusters(
    heat: ArrayLike, quantile: float | None = None, level: float = 0.4, eps: float = 1.5, min_samples: int = 5
) -> np.ndarray:
    """Group the bright pixels of a map by where they are. `dbscan_mask` chooses from these clusters.

    Parameters
    ----------
    heat : (row, column) array
        Heat map.
    quantile : float in 0..1, optional
        A pixel is bright from this quantile of the map on, and `level` is ignored: 0.9 keeps the brightest tenth, as in
        the TEMA article. Its area is fixed then, which fits no thing that may be small or large.
    level : float in 0..1
        A pixel is bright from this fraction of the map's maximum on.
    eps : float
        Radius of a neighborhood, in pixels of the map: 1.0 joins pixels that share a side, 1.5 also diagonal ones.
    min_samples : int
        Bright pixels within `eps`, the pixel itself included, that make a pixel the core of a cluster.

    Returns
    -------
    (row, column) array of int
        0 not bright, -1 bright but noise, 1..n the clusters in order of mean heat, highest first (the larger one
        first where means are equal).

    Notes
    -----
    DBSCAN (Ester et al., KDD 1996) sees the (row, column) coordinates only; heat decides which pixels take part and
    the order of the clusters. A pixel at the map's minimum is never bright: of a map that is zero nearly everywhere the
    0.9 quantile is zero too, and the background must not become a cluster. So a flat map has no bright pixel.
    """
    heat = _as_heat(heat)
    _check(quantile=0 if quantile is None else quantile, level=level, eps=eps, min_samples=min_samples)
    bright = _above(heat, level) if quantile is None else heat >= np.quantile(heat, quantile)
    bright &= heat > heat.min()
    clusters = np.zeros(heat.shape, int)
    if bright.any():
        values, labels = heat[bright], DBSCAN(eps=eps, min_samples=min_samples).fit_predict(np.argwhere(bright))
        members = [values[labels == label] for label in range(labels.max() + 1)]
        order = sorted(range(len(members)), key=lambda label: (-members[label].mean(), -members[label].size))
        rank = np.full(len(members) + 1, -1)  # DBSCAN's label for noise, -1, reads the last entry
        rank[order] = np.arange(1, len(members) + 1)
        clusters[bright] = rank[labels]
    return clusters


def dbscan_mask(
    heat: ArrayLike,
    quantile: float | None = None,
    level: float = 0.4,
    eps: float = 1.5,
    min_samples: int = 5,
    keep: float | None = None,
    min_area: int = 0,
) -> np.ndarray:
    """Return the cluster of bright pixels with the highest mean heat, the weak label of the TEMA article (Atos 2025).

    Parameters
    ----------
    heat, quantile, level, eps, min_samples
        As in `dbscan_clusters`.
    keep : float in 0..1, optional
        Keep every cluster whose mean heat is at least this fraction of the best one's, for words with several objects.
        Default: the best one alone.
    min_area : int
        Leave out clusters of fewer pixels (of the map) before choosing.

    Returns
    -------
    (row, column) array of bool
        The chosen pixels. Empty, with a warning that says why, where no pixel is bright, all bright pixels are noise,
        or no cluster is large enough.

    Examples
    --------
    The brightest blob wins, not the largest:

    >>> heat = np.array([[0.5, 0.5, 0.5, 0.0, 0.9], [0.5, 0.5, 0.5, 0.0, 0.8]])
    >>> dbscan_mask(heat, level=0.5, min_samples=2).astype(int)
    array([[0, 0, 0, 0, 1],
           [0, 0, 0, 0, 1]])
    >>> dbscan_mask(heat, level=0.5, min_samples=2, min_area=3).astype(int)
    array([[1, 1, 1, 0, 0],
           [1, 1, 1, 0, 0]])
    """
    heat = _as_heat(heat)
    _check(keep=0 if keep is None else keep, min_area=min_area)
    clusters = dbscan_clusters(heat, quantile, level, eps, min_samples)
    numbers = [n for n in range(1, clusters.max() + 1) if (clusters == n).sum() >= min_area]
    if not clusters.any():
        _warn("no pixel of the heat map is bright (is it flat, or nowhere positive? Then quantile=0.9 helps)")
    elif clusters.max() < 1:
        _warn(f"all bright pixels are noise; raise eps={eps} or lower min_samples={min_samples}")
    elif not numbers:
        _warn(f"every cluster is smaller than min_area={min_area} pixels")
    elif keep is None:
        numbers = numbers[:1]
    else:
        means = {n: heat[clusters == n].mean() for n in numbers}
        best = means[numbers[0]]
        # Linear maps can be negative, and a fraction of a negative mean is larger than it: the best is always kept.
        numbers = [n for n in numbers if means[n] >= min(keep * best, best)]
    return np.isin(clusters, numbers)


def random_walker_mask(
    heat: ArrayLike, image: ArrayLike, low: float = 0.3, high: float = 0.7, beta: float = 130.0
) -> np.ndarray:
    """Return a mask whose border follows the edges of the image, by a random walk from sure pixels (Grady 2006).

    Parameters
    ----------
    heat : (row, column) array
        Heat map.
    image : (row, column, rgb) array
        The image, of the map's size, uint8 or float in 0..1. ValueError where it is not.
    low, high : float in 0..1
        Fractions of the map's maximum: at most `low` is surely background, at least `high` surely the object, and the
        walk labels the pixels between.
    beta : float
        How hard an edge is to cross; larger values follow weaker edges (scikit-image's default is 130).

    Returns
    -------
    (row, column) array of bool
        The refined mask. Where there is no background to start from or the image is of one color, the walk has no
        meaning: the result is ``threshold_mask(heat, (low + high) / 2)``, with a warning.
    """
    heat, image = _as_heat(heat), np.asarray(image)
    _check(low=low, high=high, beta=beta)
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"the image must be (row, column, rgb), got shape {image.shape}")
    if image.shape[:2] != heat.shape:
        raise ValueError(
            f"the heat map is {heat.shape} and the image {image.shape[:2]} (rows, columns): "
            "upscale the map to the image's size first, with HeatMaps.upscale(size) for example"
        )
    image = image / 255.0 if image.dtype == np.uint8 else image.astype(float)
    if not (image.min() >= 0 and image.max() <= 1):
        raise ValueError(f"a float image must lie in 0..1, got {image.min():g}..{image.max():g}")

    object_seeds, background_seeds = _above(heat, high), heat <= low * max(heat.max(), 0)
    unsure = ~(object_seeds | background_seeds)
    if not object_seeds.any() or not background_seeds.any() or np.ptp(image) == 0:
        _warn("nothing to walk between (map flat or without background, or image of one color)", "thresholding instead")
        return _above(heat, (low + high) / 2)
    if not unsure.any():
        return object_seeds
    with warnings.catch_warnings():
        # The iterative solver stops at a tolerance, so a probability may leave 0..1 a little: no matter for a mask.
        warnings.filterwarnings("ignore", message="The probability range is outside")
        seeds = np.where(object_seeds, 2, np.where(background_seeds, 1, 0))
        return random_walker(image, seeds, beta=beta, mode="cg_j", channel_axis=-1) == 2


def vote_mask(heats: Iterable[ArrayLike], level: float = 0.4, agree: float = 0.8) -> np.ndarray:
    """Return the mask that several maps of the same thing vote for, with ignored pixels where they disagree.

    Parameters
    ----------
    heats : iterable of (row, column) arrays
        Heat maps of one shape, for example one per step, head or noise seed.
    level : float in 0..1
        A map votes for the pixels that reach this fraction of its maximum.
    agree : float in 0.5..1
        Fraction of the maps that must agree.

    Returns
    -------
    (row, column) array of uint8
        1 where at least `agree` of the maps vote for the pixel, 0 where at least as many do not, `IGNORE` (255)
        elsewhere.
    """
    heats = [_as_heat(heat) for heat in heats]
    _check(level=level)
    if not isinstance(agree, Real) or not 0.5 < agree <= 1:
        raise ValueError(f"agree is a majority, above 0.5 and up to 1, got {agree}")
    if len({heat.shape for heat in heats}) != 1:
        raise ValueError(f"a vote needs one or more maps of one shape, got {sorted({h.shape for h in heats})}")
    votes = np.mean([_above(heat, level) for heat in heats], axis=0)
    return np.where(votes >= agree, 1, np.where(1 - votes >= agree, 0, IGNORE)).astype(np.uint8)


def mask_by(settings: Mapping[str, object], heat: ArrayLike, image: ArrayLike | None = None) -> np.ndarray:
    """Return a (row, column) mask of bool by the method and settings that a recipe or a widget names.

    Where the method finds nothing the mask is empty, with a warning ("zero" does not warn).

    Parameters
    ----------
    settings : mapping
        ``{"method": name, ...}`` with a name of `METHODS` and settings of it, as ``{name}_mask`` takes them. "zero"
        keeps what is above zero, as for the maps of learned tokens.
    heat, image
        As in `random_walker_mask`, the only method that needs the image.
    """
    check_mask(settings)
    options = dict(settings)
    method = options.pop("method")
    if method == "zero":
        return _as_heat(heat) > 0
    if method == "random_walker":
        return random_walker_mask(heat, image, **options)
    return {"threshold": threshold_mask, "otsu": otsu_mask, "dbscan": dbscan_mask}[method](heat, **options)


def check_mask(settings: Mapping[str, object]) -> None:
    """Refuse settings of `mask_by` that are no settings of their method, or of another type or range: ValueError."""
    method = settings.get("method") if isinstance(settings, Mapping) else None
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"mask is {settings!r}: write {{method: one of {', '.join(METHODS)}}} and its settings")
    if unknown := sorted(map(str, settings.keys() - {*METHODS[method], "method"})):
        known = ", ".join(sorted(METHODS[method])) or "no settings"
        raise ValueError(f"mask method {method} has no {', '.join(unknown)}; it has {known}")
    unset = [name for name in ("quantile", "keep") if method == "dbscan" and settings.get(name) is None]
    _check(**{name: value for name, value in settings.items() if name not in ("method", *unset)})


def _as_heat(heat: ArrayLike) -> np.ndarray:
    """Return a heat map as a float64 (row, column) array, or raise a ValueError that says what is wrong with it."""
    heat = np.asarray(heat)
    if heat.dtype.kind not in "biuf":
        raise ValueError(f"a heat map is an array of numbers, not of {heat.dtype}")
    heat = heat.astype(float)
    if heat.ndim != 2:
        raise ValueError(f"a heat map is 2-D (row, column), got shape {heat.shape}; pass one map at a time")
    if heat.size == 0:
        raise ValueError(f"the heat map is empty, its shape is {heat.shape}")
    if not np.isfinite(heat).all():
        count = np.count_nonzero(~np.isfinite(heat))
        raise ValueError(f"{count} of {heat.size} pixels of the heat map are NaN or infinite; was it divided by zero?")
    return heat


def _above(heat: np.ndarray, level: float) -> np.ndarray:
    """Return the pixels that reach a fraction of a positive maximum."""
    return (heat >= level * heat.max()) & (heat.max() > 0)


def _check(**settings: object) -> None:
    """Refuse a setting of another type or range."""
    for name, value in settings.items():
        kind, least, most, rule = _RULES.get(name, (Real, 0, 1, f"{name} is a fraction between 0 and 1"))
        if not isinstance(value, kind) or isinstance(value, bool) or not least <= value <= most:
            raise ValueError(f"{rule}, got {value!r}")
    low, high = settings.get("low", 0.3), settings.get("high", 0.7)
    if not low < high:
        raise ValueError(f"low must be less than high, got low={low} and high={high}")


def _warn(reason: str, answer: str = "returning an empty mask") -> None:
    warnings.warn(f"{reason}: {answer}", UserWarning, stacklevel=3)  # points at the line that called attnlab
