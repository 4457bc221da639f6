"""Class proportions, the fraction of an image's pixels that each class covers: a joint model is conditioned on them."""

import numpy as np
import torch

from ..segmentation.folders import check_labels

__all__ = ["DROP_PROBABILITY", "ROOT_STD", "blurred", "class_proportions", "embed", "wanted_proportions"]

_OCTAVES = 4  # sines per class, the slowest with a quarter period between proportions 0 and 1
ROOT_STD = 0.05  # of the noise on square roots of proportions in training: exact ones would identify the scene
DROP_PROBABILITY = 0.1  # of pairs in training, so that the model also learns to draw unconditionally


def class_proportions(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Return the fraction of the valid pixels of each image that each class covers: float32 (image, class).

    Parameters
    ----------
    labels : (image, row, column) array of uint8
        Class numbers, or 255 where a pixel is ignored; an image of ignored pixels alone gets NaN.
    num_classes : int
        Number of classes; ValueError for labels of others.
    """
    check_labels(labels, num_classes)
    found = np.stack([np.bincount(one.ravel(), minlength=256)[:num_classes] for one in np.asarray(labels)])
    with np.errstate(invalid="ignore"):
        return (found / found.sum(1, keepdims=True)).astype(np.float32)


def wanted_proportions(wanted, known: np.ndarray, count: int, generator: torch.Generator) -> torch.Tensor | None:
    """Return the proportions (image, class) of images to draw: `wanted`, or blurred ones of `known` (scene, class).

    Of `known` each scene comes equally often; None if there are none. One row is repeated for all images, a row of NaN
    is unconditional. ValueError if the shape is another one, or a row is negative or does not sum to 1.
    """
    if wanted is None and not len(known):
        return None
    if wanted is None:
        rounds = [torch.randperm(len(known), generator=generator) for _ in range(-(-count // len(known)))]
        return blurred(torch.tensor(known)[torch.cat(rounds)[:count]], generator)
    found, classes = np.asarray(wanted, np.float32), known.shape[1]
    if found.ndim not in (1, 2) or found.shape[-1] != classes or (found.ndim == 2 and len(found) != count):
        raise ValueError(f"proportions are ({classes},), or ({count}, {classes}): one per class, not {found.shape}")
    free = np.isnan(found).all(-1)
    if not (free | ((found >= 0).all(-1) & (abs(found.sum(-1) - 1) < 1e-3))).all():
        raise ValueError("proportions are 0 or more and sum to 1: divide them by their sum; all NaN is unconditional")
    return torch.tensor(np.broadcast_to(found, (count, classes)))


def blurred(proportions: torch.Tensor, generator: torch.Generator, drop_probability: float = 0.0) -> torch.Tensor:
    """Add noise to proportions (image, class), and replace the rows of some images by NaN."""
    roots = (proportions.sqrt() + ROOT_STD * torch.randn(proportions.shape, generator=generator)).clamp(min=0)
    dropped = torch.rand(len(proportions), 1, generator=generator) < drop_probability
    return torch.where(dropped, torch.nan, roots**2 / (roots**2).sum(1, keepdim=True))


def embed(proportions: torch.Tensor, width: int) -> torch.Tensor:
    """Embed proportions (image, class) as sines and cosines of their square roots, float32 (image, width); NaN as 0.

    Square roots, as small proportions differ more than large ones do. ValueError if `width` is below 2 per class.
    """
    num_classes = proportions.shape[1]
    octaves = min(_OCTAVES, width // (2 * num_classes))
    if not octaves:
        least = (num_classes + 1) // 2
        raise ValueError(f"{num_classes} classes do not fit an embedding of {width}: give channels of {least} up")
    angle = proportions.sqrt()[..., None] * (torch.pi / 2 * 2.0 ** torch.arange(octaves))
    found = torch.cat([angle.sin(), angle.cos()], -1).flatten(1)
    return torch.nn.functional.pad(found.nan_to_num(0.0), (0, width - found.shape[1]))
