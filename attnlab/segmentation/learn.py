"""Train a segmenter on any mix of real and synthetic pairs."""

import math
from collections.abc import Sequence
from numbers import Real

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from ..masks import IGNORE
from ..metrics import check_counts
from .augment import AUGMENTATIONS, flip, rotate90
from .folders import Pairs, checked
from .model import Segmenter, as_input

__all__ = ["MIXES", "draw_batch", "train_segmenter"]

MIXES = ("half", "pool", "pretrain")


def train_segmenter(
    images: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    *,
    extra: Pairs | None = None,
    architecture: str = "segformer",
    mix: str = "half",
    augmentations: Sequence[str] = (),
    steps: int = 500,
    batch: int = 16,
    lr: float = 1e-3,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> Segmenter:
    """Train a segmenter from nothing, for a number of steps that does not depend on the number of pairs.

    Cross-entropy on valid pixels, AdamW with a linearly falling rate, left-right flips; it repeats with its seed.
    ValueError where pairs do not fit each other, a name is unknown or a number out of range.

    Parameters
    ----------
    images, labels : array of uint8
        (image, row, column, rgb) of one size, and class numbers (image, row, column); those with 255 do not count.
    classes : sequence of str
        Names of the labels 0, 1, ...
    extra : (images, labels), optional
        Further pairs.
    architecture : str
        "segformer" or "unet".
    mix : str
        "half": `extra` makes half of every batch; "pool": all pairs alike; "pretrain": the first half of the steps
        sees `extra` alone, the second one the other pairs.
    augmentations : sequence of str
        Names of `attnlab.segmentation.augment.AUGMENTATIONS`, applied in this order.
    steps, batch : int
        Optimizer steps, and pairs per step.
    lr, seed : float, int
        Learning rate of the first step, and what the starting weights and the batches are drawn from.
    device, progress : str or torch.device, bool
        Where it is trained, and whether a progress bar is shown.
    """
    if unknown := [name for name in augmentations if name not in AUGMENTATIONS]:
        raise ValueError(f"no augmentation {', '.join(map(repr, unknown))}; there are {', '.join(AUGMENTATIONS)}")
    if mix not in MIXES:
        raise ValueError(f"mix={mix!r}: choose one of {', '.join(MIXES)}")
    check_counts(steps=steps, batch=batch)
    check_counts(0, seed=seed)
    if mix == "half" and extra is not None:
        check_counts(2, batch=batch)  # of pairs from each source
    if not isinstance(lr, Real) or not 0 < lr < math.inf:
        raise ValueError(f"lr={lr!r}: give a number above 0")
    segmenter, rng = Segmenter.new(classes, architecture, seed), np.random.default_rng(seed)
    sources = [checked(*pairs, len(classes)) for pairs in ((images, labels), extra) if pairs is not None]
    if len({x.shape[1:3] for x, _ in sources}) > 1:
        raise ValueError(f"images are {images.shape[1:3]}, those of extra {extra[0].shape[1:3]}: give them one size")
    if "rotate90" in augmentations:
        rotate90(*sources[0], np.random.default_rng(0))  # says now that images are no squares
    if mix == "pool":
        sources = [tuple(np.concatenate(x) for x in zip(*sources, strict=True))]
    model = segmenter.model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, fused=True)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of dropout
        for step in tqdm(range(steps), desc="segmenter", leave=False, delay=1, disable=not progress):
            now = sources[1:] if step < steps // 2 else sources[:1]
            x, y = draw_batch(now if mix == "pretrain" and len(sources) > 1 else sources, batch, augmentations, rng)
            loss = F.cross_entropy(segmenter.logits(x.to(device)), y.to(device), ignore_index=IGNORE)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
    model.eval()
    return segmenter


def draw_batch(sources: Sequence[Pairs], batch: int, augmentations: Sequence[str], rng: np.random.Generator) -> tuple:
    """Draw as many pairs from each source, each flipped or not and augmented; return model input and labels."""
    drawn = []
    for k, (x, y) in enumerate(sources):
        some = rng.integers(len(x), size=batch // len(sources) + (k < batch % len(sources)))
        drawn.append(flip(x[some], y[some], rng))
    x, y = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
    for name in augmentations:
        x, y = AUGMENTATIONS[name](x, y, rng)
    return as_input(x), torch.from_numpy(y).long()
