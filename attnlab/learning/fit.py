"""Fit the word that segments: logistic regression on linear maps, with one optimum, found in well under a second.

token = fit_token(recordings, masks, init="car")
library = fit_tokens(recordings, {"car": cars, "tree": trees})     # masks that do not overlap
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike

from ..maps.heatmaps import resize
from ..maps.linear import Images, LinearMap, linear_daam, linear_maps
from ..tokens import MAP_SETTINGS, Token, TokenLibrary, same_model
from . import targets
from .logistic import Cells, cross_validate, solve

__all__ = ["RIDGE", "RIDGES", "Init", "Whitening", "fit_token", "fit_tokens"]

Init = str | Token | torch.Tensor | None
RIDGES = (0.01, 0.03, 0.1, 0.3)  # compared by cross-validation
RIDGE = 0.05  # default below _FEW_IMAGES, where cross-validation is too noisy to choose
_FEW_IMAGES = 5
_MIN_ROWS = 32  # maps with fewer rows are upsampled to this grid before fitting
_WHITENING = 0.75  # 1: all directions of the features get the same variance, 0: they keep theirs


@dataclass(frozen=True)
class Whitening:
    """Scaling of features, (features - mean) @ scale, from images without masks: `Whitening.of(recordings)`.

    Directions get variance ** 0.25. With equal variances, those in which images hardly differ would count as much as
    those in which they do.
    """

    mean: torch.Tensor  # float64 (text width,)
    scale: torch.Tensor  # float64 (text width, text width)
    inverse: torch.Tensor  # of `scale`
    model: str | None = None  # what the images were recorded from, where that is known

    @classmethod
    def of(cls, recordings: Images) -> "Whitening":
        """Measure it on recordings or LinearMaps, one at a time; ValueError where there are none."""
        count, total, square, models = 0, 0, 0, set()
        for one in [recordings] if isinstance(recordings, LinearMap) else recordings:
            one = one if isinstance(one, LinearMap) else linear_daam(one)
            matrix = one.matrix.double()
            models.add(one.model)
            count, total, square = count + len(matrix), total + matrix.sum(0), square + matrix.T @ matrix
        if count and not square.isfinite().all():
            raise ValueError("the unlabeled maps hold NaN or infinity: record in float32 or bfloat16")
        if len(models) > 1:
            raise ValueError(f"unlabeled images are of several models: {sorted(map(str, models))}")
        if not count:
            raise ValueError("unlabeled is empty: give recordings or LinearMaps, or leave it out")
        mean = total / count
        variance, axes = torch.linalg.eigh(square / count - torch.outer(mean, mean))
        variance = variance.clamp(min=1e-8 * float(variance.max()))
        power = variance ** (-_WHITENING / 2) / (variance ** (1 - _WHITENING)).mean().sqrt()
        return cls(mean, axes * power, (axes / power).T, *models)


def fit_token(
    recordings: Images,
    masks: Sequence[ArrayLike],
    init: Init = None,
    *,
    name: str | None = None,
    unlabeled: Images | Whitening | None = None,
    ridge: float | Sequence[float] | None = None,
    folds: int = 5,
    band: tuple[float, float] | None = None,
) -> Token:
    """Fit the token whose linear map segments masks: the minimum of a convex logistic loss.

    loss(v, b) = mean of w log(1 + exp(∓(A v + b))) + ridge / 2 (|u|² - 0.9 (u·x)²), over the cells of all images. A is
    `LinearMap.matrix`; the sign is - inside a mask and + outside; w is larger inside by sqrt(cells outside / cells
    inside); a cell that a mask covers in part counts for both sides. u is v, and x the word to start from with length
    1, both in whitened coordinates: departing from the word is penalized, changing its length ten times less. The
    token's map, b included, is above 0 where the mask is. In joint attention A, v and x are outputs of attention.

    Its `metadata` has ridge, gradient (its norm at the optimum), iterations, seconds, IoU of the training images, and
    the loss and IoU of left-out images for each ridge, where ridges were compared.

    Parameters
    ----------
    recordings : Sequence[Recording or LinearMap]
        Of one model, one per image.
    masks : Sequence[(row, column) array]
        One per image, of any size that covers the whole image: booleans, or 0 and 1, and 255 for ignored pixels.
    init : str, Token or (text width,) tensor, optional
        Word, phrase, token or embedding to stay near.
    name : str, optional
        Name of the token; the word's own, or "token".
    unlabeled : Whitening or Sequence[Recording or LinearMap], optional
        Images without masks that tell how features vary, for few masks above all; the training images unless given.
    ridge : float or Sequence[float], optional
        Penalty for departing from the word; of several, the one with the least loss on left-out images. Unless given,
        RIDGE for fewer than 5 images, and one of RIDGES for more.
    folds : int
        Most folds of that cross-validation.
    band : (float, float), optional
        (low, high): cells of which a fraction strictly between is inside the mask are ignored.

    Raises
    ------
    ValueError
        No image; recordings that differ in model, size, layers or heads, or hold NaN; another number of masks, masks
        that are not in the maps' proportions, empty or full; a ridge that is not positive; an init that does not fit.
    """
    stack = linear_maps(recordings)
    masks = targets.as_masks(masks, stack.size[1:], stack.size[0])
    name = name or _word(init) or "token"
    return _fit(stack, {name: masks}, {name: init}, unlabeled, ridge, folds, band, "fit_token")[name]


def fit_tokens(
    recordings: Images,
    masks: Mapping[str, Sequence[ArrayLike]],
    init: Mapping[str, Init] | None = None,
    *,
    unlabeled: Images | Whitening | None = None,
    ridge: float | Sequence[float] | None = None,
    folds: int = 5,
    band: tuple[float, float] | None = None,
) -> TokenLibrary:
    """Fit tokens of several classes, of which each pixel has one or none: multinomial `fit_token`.

    `LinearMap.labels(library, size)` gives each pixel to one class or to the background. ValueError as in `fit_token`,
    and for a class that is in no image, masks that overlap or leave no background.

    Parameters
    ----------
    recordings
        As in `fit_token`.
    masks : Mapping[str, Sequence[(row, column) array]]
        Of each class, one per image, which may be empty where the class is absent; no pixel belongs to two classes. A
        pixel that one class ignores is ignored.
    init : Mapping[str, str or Token or tensor or None], optional
        The word of each class; its name unless given.
    unlabeled, ridge, folds, band
        As in `fit_token`.
    """
    stack, checked = linear_maps(recordings), {}
    for name, of_class in masks.items():
        of_class = targets.as_masks(of_class, stack.size[1:], stack.size[0], f"masks[{name!r}]", absent=True)
        if not any((mask == 1).any() for mask in of_class):
            ignored = any(mask.any() for mask in of_class)
            hint = f"; {targets.IGNORE} is ignored: of a mask of 0 and 255 take mask > 0" if ignored else ""
            raise ValueError(f"{name!r} is in no training image: leave it out, or give an image that shows it{hint}")
        checked[name] = of_class
    if not checked:
        raise ValueError("no class: give masks by name, {'car': [mask, ...]}")
    for i, of_image in enumerate(zip(*checked.values(), strict=True)):
        if len({mask.shape for mask in of_image}) > 1:
            raise ValueError(f"the masks of image {i} have several sizes: {[mask.shape for mask in of_image]}")
        if (sum((mask == 1).astype(int) for mask in of_image) > 1).any():
            raise ValueError(f"masks of image {i} overlap: a pixel belongs to one class; take it out of the others")
    init = {name: name for name in checked} | dict(init or {})
    if unknown := set(init) - set(checked):
        raise ValueError(f"init names {', '.join(map(repr, unknown))}, of which there are no masks")
    return _fit(stack, checked, init, unlabeled, ridge, folds, band, "fit_tokens")


def _fit(stack, masks, init, unlabeled, ridge, folds, band, method) -> TokenLibrary:
    started = time.perf_counter()
    ridges = _ridges(ridge, folds, stack.size[0])
    if band is not None and not 0 <= band[0] < band[1] <= 1:
        raise ValueError(f"band is (low, high), fractions of a cell with 0 <= low < high <= 1, not {band}")
    if not stack.matrix.isfinite().all():
        raise ValueError("the maps hold NaN or infinity: record in float32 or bfloat16")
    words = [_embedding(stack, one) for one in init.values()]
    unlabeled = stack if unlabeled is None else unlabeled
    whitening = unlabeled if isinstance(unlabeled, Whitening) else Whitening.of(unlabeled)
    width, wanted = len(whitening.mean), stack.matrix.shape[1]
    if width != wanted or not same_model(whitening.model, stack.model):
        raise ValueError(f"unlabeled is of {whitening.model}, text width {width}; images of {stack.model}, {wanted}")
    cells = _cells(stack, list(masks.values()), whitening, band)
    directions = [None if x is None else F.normalize(whitening.inverse @ x.double(), dim=0) for x in words]
    compared = cross_validate(cells, directions, ridges, folds) if len(ridges) > 1 else []
    if len(ridges) > 1 and not compared and ridge is not None:
        raise ValueError("every image is the only one with some class, so none can be left out: give one ridge")
    best = min(compared, key=lambda row: row["loss"])["ridge"] if compared else RIDGE if ridge is None else ridges[0]
    u, bias, result = solve(cells, directions, best)
    values = whitening.scale @ u.T
    biases = bias - whitening.mean @ values
    metadata = {"method": method, "model": stack.model, **{name: stack.metadata.get(name) for name in MAP_SETTINGS}}
    metadata |= {"space": stack.space, "size": list(stack.size[1:]), "images": stack.size[0], "ridge": best}
    metadata |= {name: result[name] for name in ("gradient", "iterations")}
    metadata |= {"left out": compared} if compared else {}
    metadata["seconds"] = time.perf_counter() - started
    library = TokenLibrary()
    for (name, of_class), value, bias in zip(masks.items(), values.T, biases.tolist(), strict=True):
        token = Token(name, value, bias, metadata=metadata)
        iou = np.nanmean([targets.valid_iou(heat, mask) for heat, mask in zip(stack[token], of_class, strict=True)])
        library.add(replace(token, metadata=metadata | {"init": _word(init[name]), "iou": float(iou)}))
    return library


def _word(init):
    """Return the text of what to start from: a word, or a token's name; None for embeddings."""
    return init if isinstance(init, str) else init.name if isinstance(init, Token) else None


def _ridges(ridge, folds, images):
    if ridge is None:
        ridge = RIDGES if images >= _FEW_IMAGES else RIDGE
    ridges = [ridge] if np.ndim(ridge) == 0 else list(ridge)
    if not ridges or not all(r > 0 and np.isfinite(r) for r in ridges):
        raise ValueError(f"ridge={ridge!r}: give a positive number, or several to choose from; {RIDGE} is a good one")
    if len(ridges) > 1 and min(folds, images) < 2:
        raise ValueError(f"choosing a ridge needs 2 folds of 2 images, not {folds} of {images}: give one ridge")
    return ridges


def _embedding(stack, init):
    if init is None:
        return None
    width = stack.matrix.shape[1]
    if isinstance(init, Token):
        init.check(width, stack.model, space=stack.space)
        return init.value
    x = stack.embed(init) if isinstance(init, str) else torch.as_tensor(init).detach().cpu()
    if x.shape != (width,) or not x.isfinite().all() or not x.any():
        raise ValueError(f"init is a word, a token or a finite embedding ({width},), not {tuple(x.shape)}")
    return x


def _cells(stack, masks, whitening, band) -> Cells:
    """Return the cells of all images, their features whitened, upsampled where maps are small."""
    images, height, width = stack.size
    factor = max(1, _MIN_ROWS // height)
    grid = (height * factor, width * factor)
    features = (stack.matrix.double() - whitening.mean) @ whitening.scale
    cells = torch.cat([features, stack.bias.double()[:, None]], 1).unflatten(0, stack.size)
    cells = resize(cells.permute(0, 3, 1, 2), grid, "bilinear").permute(0, 2, 3, 1).flatten(0, 2)
    inside, valid = (torch.stack(x) for x in zip(*(targets.coverage(m, grid) for m in masks), strict=True))
    valid = valid.amin(0)
    if band is not None:
        valid = valid * ~((inside > band[0]) & (inside < band[1])).any(0)
    inside = (inside * valid).flatten(1).T
    outside = (valid.flatten() - inside.sum(1)).clamp(min=0)
    weights = torch.cat([outside[:, None], inside], 1)
    if not weights[:, 0].any():
        raise ValueError("no valid pixel is outside the masks: leave a class out, it is then what no token claims")
    if not (weights.sum(0) > 0).all():
        raise ValueError("no valid cell is left inside a mask: widen the band or the masks")
    image = np.repeat(np.arange(images), grid[0] * grid[1])
    return Cells(cells[:, :-1].contiguous(), cells[:, -1:], weights, image)
