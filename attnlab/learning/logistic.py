"""L2-regularized softmax regression with a background of score 0, and a 10x weaker penalty along each class's word."""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from sklearn.model_selection import KFold
from threadpoolctl import threadpool_limits

from ..metrics import iou

__all__ = ["WORD_PENALTY", "Cells", "cross_validate", "solve", "weighted_loss"]

WORD_PENALTY = 0.1  # of the ridge, along a class's word: the word's length is nearly free, and the optimum still finite


@dataclass
class Cells:
    """The cells of all images: what the regression learns from."""

    features: torch.Tensor  # float64 (cell, width)
    offset: torch.Tensor  # float64 (cell, 1): added to every score
    weights: torch.Tensor  # float64 (cell, 1 + class): how much of the cell is background, and each class
    image: np.ndarray  # int (cell,): number of the cell's image

    def part(self, chosen: np.ndarray, dtype: torch.dtype) -> "Cells":
        """Return the cells where bool `chosen` is True, as `dtype`."""
        tensors = (x[chosen].to(dtype) for x in (self.features, self.offset, self.weights))
        return Cells(*tensors, self.image[chosen])


def _balanced(weights, like=None):
    """Scale weights to a sum of 1, each class raised by the root of its rarity next to the background (in `like`)."""
    total = (weights if like is None else like).sum(0)
    raised = weights * (total[0] / total.clamp(min=1e-9)).sqrt()
    return raised / raised.sum()


def solve(cells: Cells, directions, ridge, start=None, tolerance=1e-8):
    """Minimize the loss, which is convex: return float64 (class, width), (class,) biases, and how they were reached.

    loss = weighted cross-entropy + ridge / 2 (|u|² - (1 - WORD_PENALTY) (u·d)²), summed over classes; `directions` has
    for each class its word's unit vector d (width,), or None. In the result "gradient" is the norm at the end: 0 at the
    optimum.
    """
    weights, dtype = _balanced(cells.weights), cells.features.dtype
    classes, width = len(directions), cells.features.shape[1]
    words = torch.stack([torch.zeros(width, dtype=dtype) if d is None else d.to(dtype) for d in directions])

    def split(flat):
        flat = torch.from_numpy(flat).to(dtype)
        return flat[: classes * width].reshape(classes, width), flat[classes * width :]

    def objective(flat):
        u, bias = split(flat)
        loss, slope = weighted_loss(cells.features @ u.T + bias + cells.offset, weights)
        penalized = u - (1 - WORD_PENALTY) * (u * words).sum(1, keepdim=True) * words
        gradient = slope.T @ cells.features + ridge * penalized
        loss = loss + ridge / 2 * (u * penalized).sum()
        return float(loss), torch.cat([gradient.flatten(), slope.sum(0)]).double().numpy()

    start = np.zeros(classes * (width + 1)) if start is None else start
    options = {"maxiter": 5000, "maxfun": 10000, "gtol": tolerance, "ftol": 0.0, "maxcor": 20}
    with threadpool_limits(1, "blas"):  # L-BFGS's own small products would fight torch's threads: 20 times slower
        found = minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
    result = {"x": found.x, "gradient": float(np.linalg.norm(found.jac)), "iterations": int(found.nit)}
    return *split(found.x), result


def weighted_loss(scores, weights):
    """Return the weighted cross-entropy of scores (cell, class), the background's being 0, and its gradient."""
    log_probabilities = torch.cat([torch.zeros_like(scores[:, :1]), scores], 1).log_softmax(1)
    gradient = log_probabilities.exp() * weights.sum(1, keepdim=True) - weights
    return -(weights * log_probabilities).sum(), gradient[:, 1:]


def cross_validate(cells: Cells, directions, ridges, folds):
    """Return each ridge's loss and cell IoU of left-out images, mean over folds; IoU None where none shows a class."""
    images, found = np.unique(cells.image), []
    for train, test in KFold(min(folds, len(images))).split(images):
        # Single precision is enough to compare ridges, and takes half the time.
        train, test = (cells.part(np.isin(cells.image, images[part]), torch.float32) for part in (train, test))
        if (train.weights.sum(0) > 0).all() and test.weights.any():  # not where a class is in left-out images alone
            found.append(_evaluate(train, test, directions, ridges))
    if not found:
        return []
    found = np.array(found)  # (fold, ridge, loss and IoU)
    shown = found[np.isfinite(found).all((1, 2))]
    ious = shown[:, :, 1].mean(0).tolist() if len(shown) else [None] * len(ridges)
    rows = zip(ridges, found[:, :, 0].mean(0).tolist(), ious, strict=True)
    return [{"ridge": ridge, "loss": loss, "iou": overlap} for ridge, loss, overlap in rows]


def _evaluate(train, test, directions, ridges):
    """Return (loss, IoU) on test cells for each ridge; each solution starts where the one before ended."""
    weights, valid = _balanced(test.weights, train.weights), test.weights.sum(1) > 0
    truth = test.weights.argmax(1)[valid]
    start, found = None, {}
    for ridge in sorted(ridges, reverse=True):
        u, bias, result = solve(train, directions, ridge, start, tolerance=1e-4)
        start = result["x"]
        scores = test.features @ u.T + bias + test.offset
        label = torch.where(scores.amax(1) > 0, scores.argmax(1) + 1, 0)[valid]
        overlap = np.mean([iou(label == c, truth == c) for c in truth.unique() if c] or [np.nan])
        found[ridge] = float(weighted_loss(scores, weights)[0]), overlap
    return [found[ridge] for ridge in ridges]
