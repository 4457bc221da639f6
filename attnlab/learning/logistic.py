"""Softmax regression beside a background of score 0, with a ridge that spares one direction a class: what `fit` solves.

Axes: cell (of all images), class (those beside the background), width (of the features).
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from sklearn.model_selection import KFold
from threadpoolctl import threadpool_limits

from ..metrics import iou

FREE = 0.1  # share of the ridge that a class's own direction keeps: its length is nearly free, the optimum finite


@dataclass
class Cells:
    """What is known of the cells of all images."""

    features: torch.Tensor  # float64 (cell, width)
    offset: torch.Tensor  # float64 (cell, 1): what is added to every score
    weights: torch.Tensor  # float64 (cell, 1 + class): how much of it is background, and each class
    image: np.ndarray  # int (cell,)

    def part(self, chosen, dtype) -> "Cells":
        chosen = torch.from_numpy(chosen)
        tensors = (x[chosen].to(dtype) for x in (self.features, self.offset, self.weights))
        return Cells(*tensors, self.image[chosen])


def _balanced(weights, like=None):
    """Weights that add up to 1, each class raised by the root of how rare it is beside the background (in `like`)."""
    total = (weights if like is None else like).sum(0)
    raised = weights * (total[0] / total.clamp(min=1e-9)).sqrt()
    return raised / raised.sum()


def solve(cells: Cells, directions, ridge, start=None, tolerance=1e-8):
    """Minimum of the loss, which is convex: float64 (class, width), (class,) biases, and how it was reached.

    loss = weighted cross-entropy + ridge / 2 (|u|² - (1 - FREE) (u·d)²), summed over classes; `directions` has a unit
    vector d (width,) or None for each. The result's "gradient" is the norm of the slope at the end: 0 at the optimum.
    """
    weights, classes, width = _balanced(cells.weights), len(directions), cells.features.shape[1]
    dtype = cells.features.dtype
    words = torch.stack([torch.zeros(width, dtype=dtype) if d is None else d.to(dtype) for d in directions])

    def split(flat):
        flat = torch.from_numpy(flat).to(dtype)
        return flat[: classes * width].reshape(classes, width), flat[classes * width :]

    def objective(flat):
        u, bias = split(flat)
        loss, slope = weighted_loss(cells.features @ u.T + bias + cells.offset, weights)
        pulled = u - (1 - FREE) * (u * words).sum(1, keepdim=True) * words
        gradient = slope.T @ cells.features + ridge * pulled
        loss = loss + ridge / 2 * (u * pulled).sum()
        return float(loss), torch.cat([gradient.flatten(), slope.sum(0)]).double().numpy()

    start = np.zeros(classes * (width + 1)) if start is None else start
    options = {"maxiter": 5000, "maxfun": 10000, "gtol": tolerance, "ftol": 0.0, "maxcor": 20}
    with threadpool_limits(1, "blas"):  # L-BFGS's own small products would fight torch's threads: 20 times slower
        found = minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
    result = {"x": found.x, "gradient": float(np.linalg.norm(found.jac)), "iterations": int(found.nit)}
    return *split(found.x), result


def weighted_loss(scores, weights):
    """Weighted cross-entropy of scores (cell, class) beside a background of score 0, and its slope in them."""
    shares = torch.cat([torch.zeros_like(scores[:, :1]), scores], 1).log_softmax(1)
    return -(weights * shares).sum(), (shares.exp() * weights.sum(1, keepdim=True) - weights)[:, 1:]


def left_out(cells, directions, ridges, folds):
    """For each ridge: loss, and IoU at the zero level over cells, of images that were left out, mean over folds.

    IoU None where no image that was left out shows a class.
    """
    images, found = np.unique(cells.image), []
    for train, test in KFold(min(folds, len(images))).split(images):
        # To compare ridges single precision will do, in half the time.
        known, held = (cells.part(np.isin(cells.image, images[part]), torch.float32) for part in (train, test))
        if (known.weights.sum(0) > 0).all() and held.weights.any():  # not where only left-out images show a class
            found.append(_judged(known, held, directions, ridges))
    if not found:
        return []
    shown = [fold for fold in found if np.isfinite(fold).all()]
    losses = np.mean([[loss for loss, _ in fold] for fold in found], axis=0).tolist()
    overlaps = np.mean([[overlap for _, overlap in fold] for fold in shown], axis=0).tolist() if shown else None
    rows = zip(ridges, losses, overlaps or [None] * len(ridges), strict=True)
    return [{"ridge": ridge, "loss": loss, "iou": overlap} for ridge, loss, overlap in rows]


def _judged(known, held, directions, ridges):
    """(loss, IoU) on held cells of what each ridge learns from the known ones; each starts where the last one ended."""
    weights, decided, start, found = _balanced(held.weights, known.weights), held.weights.sum(1) > 0, None, {}
    truth = held.weights.argmax(1)[decided]
    for ridge in sorted(ridges, reverse=True):
        u, bias, result = solve(known, directions, ridge, start, tolerance=1e-4)
        start = result["x"]
        scores = held.features @ u.T + bias + held.offset
        label = torch.where(scores.amax(1) > 0, scores.argmax(1) + 1, 0)[decided]
        overlap = np.mean([iou(label == c, truth == c) for c in truth.unique() if c] or [np.nan])
        found[ridge] = float(weighted_loss(scores, weights)[0]), overlap
    return [found[ridge] for ridge in ridges]
