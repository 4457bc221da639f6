"""Class labels as a few real numbers a pixel, and back: "analog bits" (Chen, Zhang and Hinton, ICLR 2023), or one-hot.

codes = bit_codes(touching(labels, 7))     # (class, bit) of -1 and 1; classes that touch differ in few bits
planes = encode(labels, codes)             # float32 (image, bit, row, column)
labels, margin = decode(planes, codes)
"""

import numpy as np
import torch

from ..masks import IGNORE

RESTARTS = 20  # of the search for codes


def touching(labels: np.ndarray, count: int) -> np.ndarray:
    """How many neighboring pixels, side by side or one above the other, are of classes i and j: (class, class).

    `labels`: integers (image, row, column); pixels of no class 0 to count - 1 touch nothing. Symmetric, 0 where i = j.
    """
    labels = np.asarray(labels).astype(int)
    found = np.zeros((count, count))
    for a, b in ((labels[:, 1:], labels[:, :-1]), (labels[..., 1:], labels[..., :-1])):
        known = (a < count) & (b < count) & (a != b)
        np.add.at(found, (a[known], b[known]), 1)
    return found + found.T


def bit_codes(touching: np.ndarray, bits: int | None = None, seed: int = 0) -> np.ndarray:
    """A code of -1 and 1 for each class, float32 (class, bit), ceil(log2 classes) bits unless given.

    Between two classes a sampler passes through the codes that lie between theirs: at a border of classes that differ
    in two bits a third class may appear. So codes are chosen for the least sum, over pairs of classes, of how often
    they touch times in how many bits they differ: two codes are exchanged until nothing gains, from several starts.

    ValueError: more classes than codes.
    """
    count = len(touching)
    needed = max(1, int(np.ceil(np.log2(count))))
    bits = needed if bits is None else bits
    if bits < needed:
        raise ValueError(f"{bits} bits have {2**bits} codes, {count} classes need {needed} bits")
    apart = (np.arange(2**bits)[:, None] ^ np.arange(2**bits)[None]).astype(np.uint64)
    apart = np.array([[int(n).bit_count() for n in row] for row in apart])
    weight = np.zeros((2**bits, 2**bits))  # codes that no class has touch nothing
    weight[:count, :count] = touching
    rng, best, least = np.random.default_rng(seed), None, np.inf
    for _ in range(RESTARTS):
        order, cost = _exchanged(rng.permutation(2**bits), weight, apart)
        if cost < least - 1e-9:
            best, least = order, cost
    numbers = best[:count, None] >> np.arange(bits)[::-1] & 1
    return (2 * numbers - 1).astype(np.float32)


def _exchanged(order, weight, apart):
    """Exchange two codes as long as that lowers the cost."""

    def cost_of(order):
        return (weight * apart[np.ix_(order, order)]).sum() / 2

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
    return order, cost


def one_hot_codes(count: int) -> np.ndarray:
    """A plane for each class, 1 where it is and -1 elsewhere: float32 (class, class)."""
    return (2 * np.eye(count) - 1).astype(np.float32)


def encode(labels: np.ndarray, codes: np.ndarray) -> torch.Tensor:
    """float32 (image, bit, row, column), -1 and 1; 0 where a pixel is undecided (255).

    ValueError: labels that are no class.
    """
    labels = np.asarray(labels)
    if not np.isin(labels, [*range(len(codes)), IGNORE]).all():
        other = sorted(set(np.unique(labels).tolist()) - {*range(len(codes)), IGNORE})
        raise ValueError(f"labels are 0 to {len(codes) - 1} or {IGNORE}, undecided; there is {other[:5]}")
    table = np.zeros((IGNORE + 1, codes.shape[1]), np.float32)
    table[: len(codes)] = codes
    return torch.from_numpy(table[labels]).permute(0, 3, 1, 2).contiguous()


def decode(planes: torch.Tensor, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels uint8 (image, row, column) of planes (image, bit, row, column), and their margins, float32.

    A pixel is of the class whose code has the largest inner product with it: where its signs are a class's code, that
    one; where they are nobody's, the class that takes the least change. The margin is half of what the best product has
    over the second one: with all codes in use the smallest magnitude of the bits, with one-hot codes the first plane's
    value over the second's.
    """
    scores = torch.einsum("nbhw,kb->nkhw", planes.float().cpu(), torch.from_numpy(codes))
    top = scores.topk(2, dim=1).values
    return scores.argmax(1).byte().numpy(), ((top[:, 0] - top[:, 1]) / 2).numpy()
