"""Class labels as a few real numbers per pixel: "analog bits" (Chen, Zhang and Hinton, ICLR 2023)."""

import numpy as np

__all__ = ["bit_codes", "touching"]


def touching(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Count neighboring pixels, side by side or one above the other, by their classes: float (class, class).

    Pixels of `labels` (image, row, column) whose numbers are no class touch nothing.
    """
    labels = np.asarray(labels).astype(int)
    found = np.zeros((num_classes, num_classes))
    for a, b in ((labels[:, 1:], labels[:, :-1]), (labels[..., 1:], labels[..., :-1])):
        valid = (a < num_classes) & (b < num_classes) & (a != b)
        np.add.at(found, (a[valid], b[valid]), 1)
    return found + found.T


def bit_codes(touching: np.ndarray) -> np.ndarray:
    """Choose a code of ceil(log2 classes) bits per class, float32 (class, bit): -1 and 1.

    Between two classes a sampler passes through the codes that lie between theirs: at a border of classes that differ
    in two bits a third class may appear. So codes minimize the sum, over pairs of classes, of how often they touch
    times in how many bits they differ: two codes are exchanged as long as that lowers it, from 20 starts.
    """
    num_classes = len(touching)
    bits = max(1, int(np.ceil(np.log2(num_classes))))
    numbers = np.arange(2**bits)
    differing = np.bitwise_count(numbers[:, None] ^ numbers[None]).astype(int)  # bits in which two codes differ
    weight = np.pad(touching, (0, 2**bits - num_classes))  # codes that no class has touch nothing
    rng, best, least = np.random.default_rng(0), None, np.inf
    for _ in range(20):
        order = rng.permutation(2**bits)
        cost = _exchange(order, lambda order: (weight * differing[np.ix_(order, order)]).sum() / 2)
        if cost < least - 1e-9:
            best, least = order, cost
    table = best[:num_classes, None] >> np.arange(bits)[::-1] & 1
    return (2 * table - 1).astype(np.float32)


def _exchange(order, cost_of):
    """Exchange two entries of an order, in place, as long as that lowers its cost; return the cost."""
    cost, before = cost_of(order), np.inf
    while cost < before:
        before = cost
        for pair in np.argwhere(np.tri(len(order), k=-1)):  # (1, 0), (2, 0), (2, 1), ...
            order[pair] = order[pair[::-1]]
            changed = cost_of(order)
            if changed < cost - 1e-9:
                cost = changed
            else:
                order[pair] = order[pair[::-1]]
    return cost
