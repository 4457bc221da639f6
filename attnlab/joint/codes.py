"""Encode class labels as a few real numbers per pixel: "analog bits" (Chen, Zhang and Hinton, ICLR 2023), or one-hot.

codes = bit_codes(touching(labels, 7))     # (class, bit) of -1 and 1; classes that touch differ in few bits
channels = encode(labels, codes)           # float32 (image, bit, row, column)
labels, margins = decode(channels, codes)
"""

import numpy as np
import torch

from ..masks import IGNORE

__all__ = ["bit_codes", "decode", "encode", "one_hot_codes", "touching"]

_RESTARTS = 20  # of the search for codes


def touching(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Count neighboring pixels, side by side or one above the other, by their classes: float (class, class).

    Parameters
    ----------
    labels : (image, row, column) array of int
        Class numbers; pixels of other numbers touch nothing.
    num_classes : int
        Number of classes.
    """
    labels = np.asarray(labels).astype(int)
    found = np.zeros((num_classes, num_classes))
    for a, b in ((labels[:, 1:], labels[:, :-1]), (labels[..., 1:], labels[..., :-1])):
        valid = (a < num_classes) & (b < num_classes) & (a != b)
        np.add.at(found, (a[valid], b[valid]), 1)
    return found + found.T


def bit_codes(touching: np.ndarray, bits: int | None = None, seed: int = 0) -> np.ndarray:
    """Choose a code of -1 and 1 per class, float32 (class, bit), so that classes which touch differ in few bits.

    Between two classes a sampler passes through the codes that lie between theirs: at a border of classes that differ
    in two bits a third class may appear. So codes minimize the sum, over pairs of classes, of how often they touch
    times in how many bits they differ: two codes are exchanged as long as that lowers it, from several starts.

    Parameters
    ----------
    touching : (class, class) array
        How often classes touch, as `touching` counts it.
    bits : int, optional
        Length of a code; ValueError if there are more classes than codes. Default: ceil(log2 classes).
    seed : int
        Draws the starts.
    """
    num_classes = len(touching)
    needed = max(1, int(np.ceil(np.log2(num_classes))))
    bits = needed if bits is None else bits
    if bits < needed:
        raise ValueError(f"{bits} bits have {2**bits} codes, {num_classes} classes need {needed} bits")
    numbers = np.arange(2**bits)
    differing = np.bitwise_count(numbers[:, None] ^ numbers[None]).astype(int)  # bits in which two codes differ
    weight = np.zeros((2**bits, 2**bits))  # codes that no class has touch nothing
    weight[:num_classes, :num_classes] = touching
    rng, best, least = np.random.default_rng(seed), None, np.inf
    for _ in range(_RESTARTS):
        order = rng.permutation(2**bits)
        cost = _exchange(order, lambda order: (weight * differing[np.ix_(order, order)]).sum() / 2)
        if cost < least - 1e-9:
            best, least = order, cost
    table = best[:num_classes, None] >> np.arange(bits)[::-1] & 1
    return (2 * table - 1).astype(np.float32)


def _exchange(order, cost_of):
    """Exchange two entries of an order, in place, as long as that lowers its cost; return the cost."""
    cost, again = cost_of(order), True
    while again:
        again = False
        for i in range(len(order)):
            for j in range(i):
                order[i], order[j] = order[j], order[i]
                changed = cost_of(order)
                if changed < cost - 1e-9:
                    cost, again = changed, True
                else:
                    order[i], order[j] = order[j], order[i]
    return cost


def one_hot_codes(num_classes: int) -> np.ndarray:
    """Return a code of one channel per class, 1 for that class and -1 for others: float32 (class, class)."""
    return (2 * np.eye(num_classes) - 1).astype(np.float32)


def encode(labels: np.ndarray, codes: np.ndarray) -> torch.Tensor:
    """Encode labels as float32 (image, bit, row, column), -1 and 1, or 0 for ignored pixels (255).

    ValueError if a label is no class.
    """
    labels = np.asarray(labels)
    if not np.isin(labels, [*range(len(codes)), IGNORE]).all():
        other = sorted(set(np.unique(labels).tolist()) - {*range(len(codes)), IGNORE})
        raise ValueError(f"labels are 0 to {len(codes) - 1} or {IGNORE}, ignored; there is {other[:5]}")
    table = np.zeros((IGNORE + 1, codes.shape[1]), np.float32)
    table[: len(codes)] = codes
    return torch.from_numpy(table[labels]).permute(0, 3, 1, 2).contiguous()


def decode(channels: torch.Tensor, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Decode label channels (image, bit, row, column): labels uint8 and margins float32, both (image, row, column).

    The class of a pixel is the one whose code has the largest inner product with it: the class with the pixel's signs
    or, where no class has them, the one that takes the least change. The margin is half the difference between the
    largest and the second largest product: if all codes are in use, the smallest magnitude of the bits; with one-hot
    codes, the difference between the two largest channels.
    """
    scores = torch.einsum("nbhw,kb->nkhw", channels.float().cpu(), torch.from_numpy(codes))
    top = scores.topk(2, dim=1).values
    return scores.argmax(1).byte().numpy(), ((top[:, 0] - top[:, 1]) / 2).numpy()
