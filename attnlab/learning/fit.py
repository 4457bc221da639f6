"""The word that segments, found by convex optimization: logistic regression on linear maps.

A linear map's value at a cell is a product of the cell's row of `LinearMap.matrix` and a text embedding, so the
embedding whose map is positive inside a mask and negative outside is a logistic regression with that matrix as its
features: one optimum, found in well under a second.

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

from ..maps.heatmaps import upscale
from ..maps.linear import Images, LinearMap, linear_daam, linear_maps
from ..metrics import iou
from ..tokens import MAP_SETTINGS, Token, TokenLibrary, same_model
from . import targets
from .logistic import Cells, left_out, solve

Init = str | Token | torch.Tensor | None

RIDGES = (0.01, 0.03, 0.1, 0.3)  # tried by k-fold
RIDGE = 0.05  # of fewer images than FEW: chosen on one or two left-out images it is chosen worse
FEW = 5
GRID = 32  # rows up to which smaller maps are refined: masks say more than so few cells can
WHITE = 0.75  # 1: all directions of the features get the same variance, 0: they keep theirs


@dataclass(frozen=True)
class Whitening:
    """Features on one scale: (features - mean) @ scale. Made of images without masks, `Whitening.of(recordings)`.

    Directions get variance ** 0.25: whitened in full, those in which images hardly differ would count as much as those
    in which they do.

    mean : float64 (text width,)
    scale, inverse : float64 (text width, text width)
    model : what they were recorded from, where that is known
    """

    mean: torch.Tensor
    scale: torch.Tensor
    inverse: torch.Tensor
    model: str | None = None

    @classmethod
    def of(cls, recordings: Images) -> "Whitening":
        """From recordings or LinearMaps, one at a time; ValueError where there are none."""
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
        power = variance ** (-WHITE / 2) / (variance ** (1 - WHITE)).mean().sqrt()
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
    """The token whose linear map fits masks: the minimum of a convex logistic loss.

    loss(v, b) = mean of w log(1 + exp(∓(A v + b))) + ridge / 2 (|u|² - 0.9 (u·x)²), over the cells of all images: A is
    `LinearMap.matrix`, the sign - inside a mask and + outside, w larger inside by sqrt(cells outside / cells inside). A
    cell that a mask covers in part counts for both sides. u is v, and x the word to start from with length 1, both in
    whitened coordinates: departing from the word costs, its length a tenth of that. The token's map, b included, is
    above 0 where the mask is.

    Parameters
    ----------
    recordings : of one model, or LinearMaps, one an image
    masks : (row, column) of any size that covers the whole image: booleans or 0 and 1, 255 where undecided
    init : the word to stay near: a word or phrase, an embedding (text width,), a Token, or None for none
    name : of the token; the word's own, or "token"
    unlabeled : recordings, LinearMaps or a `Whitening` of images without masks, which say how features vary; the more
        the better with few masks. The training images themselves unless given
    ridge : how much departing from the word costs; of several the one with the least loss on left-out images. Unless
        given, RIDGE for fewer than FEW images and one of RIDGES for more
    folds : of the images, at most, for that choice
    band : (low, high): cells whose share inside the mask lies strictly between take no part

    Returns
    -------
    Token; its `metadata` has ridge, gradient (its norm at the optimum), iterations, seconds, IoU of the training images
    and, where ridges were compared, for each the loss and IoU of left-out images

    Raises
    ------
    ValueError : no image, recordings that differ in model, size, layers or heads, NaN in them; masks that are not one
        for each, not in the maps' proportions, empty or full; a ridge that is not positive; an init that does not fit
    """
    stack = linear_maps(recordings)
    masks = targets.as_masks(masks, stack.size[1:], stack.size[0])
    name = name or (init if isinstance(init, str) else init.name if isinstance(init, Token) else "token")
    library = _fit(stack, {name: masks}, {name: init}, unlabeled, ridge, folds, band, "fit_token")
    return library[name]


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
    """Tokens of several classes that share each image out among them and the background: multinomial `fit_token`.

    `LinearMap.labels(library, size)` gives each pixel to one class or to none.

    Parameters
    ----------
    masks : of each class, one an image, which may be empty where it is absent; no pixel belongs to two of them
    init : the word of each class; its name unless given
    recordings, unlabeled, ridge, folds, band : as for `fit_token`; a cell counts as undecided where any class is

    Raises
    ------
    ValueError : as `fit_token`, a class that is in no image, masks that overlap or leave nothing out
    """
    stack = linear_maps(recordings)
    masks = {name: _class_masks(name, of_class, stack) for name, of_class in masks.items()}
    if not masks:
        raise ValueError("no class: give masks by name, {'car': [mask, ...]}")
    for i, planes in enumerate(zip(*masks.values(), strict=True)):
        if len({plane.shape for plane in planes}) > 1:
            raise ValueError(f"the masks of image {i} have several sizes: {[plane.shape for plane in planes]}")
        if (sum((plane == 1).astype(int) for plane in planes) > 1).any():
            raise ValueError(f"masks of image {i} overlap: a pixel belongs to one class; take it out of the others")
    init = {name: name for name in masks} | dict(init or {})
    if unknown := set(init) - set(masks):
        raise ValueError(f"init names {', '.join(map(repr, unknown))}, of which there are no masks")
    return _fit(stack, masks, init, unlabeled, ridge, folds, band, "fit_tokens")


def _class_masks(name, masks, stack):
    """One class's masks, checked; it may be absent from some images, and fill others."""
    if len(masks) != stack.size[0]:
        raise ValueError(f"masks[{name!r}] has {len(masks)} masks for {stack.size[0]} images: give one for each")
    masks = [targets.as_mask(m, stack.size[1:], f"masks[{name!r}][{i}]", absent=True) for i, m in enumerate(masks)]
    if not any((mask == 1).any() for mask in masks):
        hint = f"; {targets.IGNORE} is undecided: of a mask of 0 and 255 take mask > 0" if _undecided(masks) else ""
        raise ValueError(f"{name!r} is in no training image: leave it out, or give an image that shows it{hint}")
    return masks


def _undecided(masks):
    return any((mask == targets.IGNORE).any() for mask in masks)


def _fit(stack, masks, init, unlabeled, ridge, folds, band, method) -> TokenLibrary:
    started = time.perf_counter()
    ridges = _ridges(ridge, folds, stack.size[0])
    if band is not None and not 0 <= band[0] < band[1] <= 1:
        raise ValueError(f"band is (low, high), shares of a cell with 0 <= low < high <= 1, not {band}")
    if not stack.matrix.isfinite().all():
        raise ValueError("the maps hold NaN or infinity: record in float32 or bfloat16")
    words = [_embedding(stack, one) for one in init.values()]
    whitening = (
        unlabeled if isinstance(unlabeled, Whitening) else Whitening.of(stack if unlabeled is None else unlabeled)
    )
    if len(whitening.mean) != stack.matrix.shape[1] or not same_model(whitening.model, stack.model):
        raise ValueError(
            f"unlabeled is of {whitening.model}, text width {len(whitening.mean)}; "
            f"the recordings are of {stack.model}, text width {stack.matrix.shape[1]}"
        )
    cells = _cells(stack, list(masks.values()), whitening, band)
    directions = [None if x is None else F.normalize(whitening.inverse @ x.double(), dim=0) for x in words]
    compared = left_out(cells, directions, ridges, folds) if len(ridges) > 1 else []
    if len(ridges) > 1 and not compared and ridge is not None:
        raise ValueError("every image is the only one with some class, so none can be left out: give one ridge")
    best = min(compared, key=lambda row: row["loss"])["ridge"] if compared else RIDGE if ridge is None else ridges[0]
    u, bias, result = solve(cells, directions, best)
    values = whitening.scale @ u.T
    biases = bias - whitening.mean @ values
    metadata = {"method": method, "model": stack.model, **{name: stack.metadata.get(name) for name in MAP_SETTINGS}}
    metadata |= {"size": list(stack.size[1:]), "images": stack.size[0], "ridge": best}
    metadata |= {name: result[name] for name in ("gradient", "iterations")}
    metadata |= {"left out": compared} if compared else {}
    metadata["seconds"] = time.perf_counter() - started
    tokens = zip(masks, values.T, biases.tolist(), strict=True)
    return TokenLibrary(_scored(stack, Token(*one, metadata=metadata), init[one[0]], masks[one[0]]) for one in tokens)


def _scored(stack, token, init, masks) -> Token:
    """The token with the word it comes from, and its mean IoU at zero on decided pixels, at the masks' own sizes."""
    heats = stack @ token.value + np.float32(token.bias)
    found = []
    for heat, mask in zip(heats, masks, strict=True):
        known = mask != targets.IGNORE
        found.append(iou(upscale(heat, mask.shape)[known] > 0, mask[known] == 1) if known.any() else np.nan)
    word = init if isinstance(init, str) else init.name if isinstance(init, Token) else None
    return replace(token, metadata={**token.metadata, "init": word, "iou": float(np.nanmean(found))})


def _ridges(ridge, folds, images):
    if ridge is None:
        ridge = RIDGES if images >= FEW else RIDGE
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
        init.check(width, stack.model)
        return init.value
    x = stack.embed(init) if isinstance(init, str) else torch.as_tensor(init).detach().cpu()
    if x.shape != (width,) or not x.isfinite().all() or not x.any():
        raise ValueError(f"init is a word, a token or a finite embedding ({width},), not {tuple(x.shape)}")
    return x


def _cells(stack, masks, whitening, band) -> Cells:
    images, height, width = stack.size
    factor = max(1, GRID // height)
    grid = (height * factor, width * factor)
    features = (stack.matrix.double() - whitening.mean) @ whitening.scale
    planes = torch.cat([features, stack.bias.double()[:, None]], 1).unflatten(0, stack.size)
    if factor > 1:
        planes = F.interpolate(planes.permute(0, 3, 1, 2), grid, mode="bilinear", align_corners=False)
        planes = planes.permute(0, 2, 3, 1)
    planes = planes.flatten(0, 2)
    shares, decided = (torch.stack(x) for x in zip(*(targets.shares(m, grid) for m in masks), strict=True))
    decided = decided.amin(0)
    if band is not None:
        decided = decided * ~((shares > band[0]) & (shares < band[1])).any(0)
    inside = (shares * decided).flatten(1).T
    outside = (decided.flatten() - inside.sum(1)).clamp(min=0)
    weights = torch.cat([outside[:, None], inside], 1)
    if not weights[:, 0].any():
        raise ValueError("no decided pixel is outside the masks: leave a class out, it is then what no token claims")
    if not (weights.sum(0) > 0).all():
        raise ValueError("no decided cell is left inside a mask: widen the band or the masks")
    image = np.repeat(np.arange(images), grid[0] * grid[1])
    return Cells(planes[:, :-1].contiguous(), planes[:, -1:], weights, image)
