"""How much of a scene each class has: what a joint model can be told of the pair that it is to draw.

shares = class_shares(labels, 7)  # float32 (image, class), each row sums to 1
embed(torch.from_numpy(shares), 256)  # what the U-Net adds to its embedding of the time
"""

import numpy as np
import torch

OCTAVES = 4  # sines of a share's root, the slowest with a quarter period between share 0 and 1
BLUR = 0.05  # standard deviation of what training adds to the roots: exact shares would name the scene
UNTOLD = 0.1  # of the pairs in training, so that the model also knows what to do without


def class_shares(labels: np.ndarray, count: int) -> np.ndarray:
    """Share of an image's decided pixels that each class has, float32 (image, class); NaN where none is decided.

    `labels`: uint8 (image, row, column), 255 where undecided.
    """
    found = np.stack([np.bincount(one.ravel(), minlength=256)[:count] for one in np.asarray(labels)])
    with np.errstate(invalid="ignore"):
        return (found / found.sum(1, keepdims=True)).astype(np.float32)


def checked_shares(shares: np.ndarray, images: int, count: int) -> np.ndarray:
    """Wanted shares as float32 (image, class); one row is taken for all images, a row of NaN says nothing.

    ValueError: another shape, or a row that is negative or does not sum to 1.
    """
    found = np.asarray(shares, np.float32)
    if found.ndim not in (1, 2) or found.shape[-1] != count or (found.ndim == 2 and len(found) != images):
        raise ValueError(f"shares are ({count},), or ({images}, {count}): one for each class, not {found.shape}")
    silent = np.isnan(found).all(-1)
    if not (silent | ((found >= 0).all(-1) & (abs(found.sum(-1) - 1) < 1e-3))).all():
        raise ValueError("shares are 0 or more and sum to 1: divide them by their sum; NaN in all says nothing")
    return np.broadcast_to(found, (images, count))


def blurred(shares: torch.Tensor, generator: torch.Generator, untold: float = 0.0) -> torch.Tensor:
    """Shares (image, class) made a little vague, and of so many images none at all (NaN)."""
    roots = (shares.sqrt() + BLUR * torch.randn(shares.shape, generator=generator)).clamp(min=0)
    silent = torch.rand(len(shares), 1, generator=generator) < untold
    return torch.where(silent, torch.nan, roots**2 / (roots**2).sum(1, keepdim=True))


def embed(shares: torch.Tensor, width: int) -> torch.Tensor:
    """Sines and cosines of the roots of shares (image, class), float32 (image, width); 0 where a row is NaN.

    Roots, as small shares differ more than large ones do. ValueError: a width below twice the number of classes.
    """
    count = shares.shape[1]
    octaves = min(OCTAVES, width // (2 * count))
    if not octaves:
        raise ValueError(f"{count} classes do not fit an embedding of {width}: give channels of {(count + 1) // 2} up")
    angle = shares.sqrt()[..., None] * (torch.pi / 2 * 2.0 ** torch.arange(octaves))
    found = torch.cat([angle.sin(), angle.cos()], -1).flatten(1)
    return torch.nn.functional.pad(found.nan_to_num(0.0), (0, width - found.shape[1]))
