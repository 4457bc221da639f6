"""Pairs as channels of about unit standard deviation, their augmentation, and the noise on them."""

from collections.abc import Sequence

import numpy as np
import torch

from ..masks import IGNORE
from ..segmentation.folders import check_labels

__all__ = ["NUM_TIMES", "ChannelCodec", "augment_channels", "bit_codes", "noise_schedule", "touching"]

NUM_TIMES = 1000  # steps of the forward process
_SNR_SCALE = 1 / 8  # factor of its signal-to-noise ratio: see `noise_schedule`
_MAX_CODED = 64  # classes: for twice as many, codes would be compared for ten minutes


def noise_schedule() -> dict:
    """Return the forward process, as a scheduler of diffusers takes it: the cosine schedule, shifted.

    Large areas of one label are seen through noise that hides single pixels. Under the cosine schedule (Nichol and
    Dhariwal, ICML 2021) the layout would be fixed within the first few steps of sampling; with an eighth of its
    signal-to-noise ratio (Hoogeboom, Heek and Salimans, ICML 2023, equation 4) there are many such steps.
    """
    signal = np.cos((np.arange(1, NUM_TIMES + 1) / NUM_TIMES + 0.008) / 1.008 * np.pi / 2) ** 2
    ratio = _SNR_SCALE * signal / (1 - signal)
    kept = ratio / (1 + ratio)
    betas = 1 - kept / np.append(1, kept[:-1])
    return {"num_train_timesteps": NUM_TIMES, "trained_betas": betas.clip(max=0.999).tolist()}


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
    """Choose "analog bits" (Chen, Zhang and Hinton, ICLR 2023), ceil(log2 classes) per class: float32 (class, bit).

    Between two classes a sampler passes through the codes that lie between theirs: at a border of classes that differ
    in two bits a third class may appear. So codes minimize the sum, over pairs of classes, of how often they touch
    times in how many bits they differ: two codes are exchanged as long as that lowers it, from 20 starts.

    ValueError for more than 64 classes, or what does not count how often each pair of them touches.
    """
    touching = np.asarray(touching)
    num_classes = len(touching) if touching.ndim else 0
    if not touching.size or touching.shape != (num_classes,) * 2 or not ((touching >= 0) & (touching < np.inf)).all():
        raise ValueError("how often classes touch is (class, class), 0 or more, as `touching` counts it")
    if num_classes > _MAX_CODED:
        raise ValueError(
            f"bits are chosen for {_MAX_CODED} classes at most, not for {num_classes}: give codes='one-hot'"
        )
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


class ChannelCodec:
    """Pairs as a model sees them: [RGB, label channels], float32 (image, channel, row, column)."""

    def __init__(self, table: np.ndarray, mean: Sequence[float], std: Sequence[float]):
        self.codes = np.asarray(table, np.float32)  # (class, label channel): -1 and 1
        self.num_channels = 3 + self.codes.shape[1]
        mean, std = (torch.tensor(x, dtype=torch.float32)[:, None, None] for x in (mean, std))
        self._scale, self._shift = 1 / std, -mean / std  # colors are standardized by those of the training pairs
        bits = torch.ones(self.codes.shape[1], 1, 1)
        self._lowest = torch.cat([self._shift, -bits])
        self._highest = torch.cat([self._scale + self._shift, bits])

    def encode(self, images: np.ndarray, labels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode pairs: channels, and 1 where these are valid, else 0. ValueError if a label is no class."""
        check_labels(labels, len(self.codes))
        colors = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255
        table = np.pad(self.codes, ((0, IGNORE + 1 - len(self.codes)), (0, 0)))  # 0 where a pixel is ignored
        bits = torch.from_numpy(table[labels]).permute(0, 3, 1, 2).contiguous()
        valid = torch.from_numpy(labels != IGNORE)[:, None].float().expand_as(bits)
        channels = torch.cat([colors * self._scale + self._shift, bits], 1)
        return channels, torch.cat([torch.ones_like(colors), valid], 1)

    def decode(self, channels: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Decode channels: images uint8, labels uint8 and margins float32, both (image, row, column).

        The class of a pixel is the one whose code has the largest inner product with it: the class with the pixel's
        signs or, where no class has them, the one that takes the least change. The margin is half the difference
        between the two largest products: the smallest magnitude of the bits if all codes are in use, with one-hot codes
        the difference between the two largest channels.
        """
        colors = (channels[:, :3].cpu() - self._shift) / self._scale
        images = (colors.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
        products = torch.einsum("nbhw,kb->nkhw", channels[:, 3:].float().cpu(), torch.from_numpy(self.codes))
        top = products.topk(2, dim=1).values
        return images, products.argmax(1).byte().numpy(), ((top[:, 0] - top[:, 1]) / 2).numpy()

    def clamp(self, channels: torch.Tensor) -> torch.Tensor:
        """Clamp channels to the range that those of pairs have."""
        return channels.clamp(self._lowest.to(channels.device), self._highest.to(channels.device))


def augment_channels(tensors: Sequence, rotate90: bool, generator: torch.Generator) -> list[torch.Tensor | None]:
    """Flip each pair left-right or not; with `rotate90` also flip it upside down or not and rotate it by quarters.

    `tensors` (image, channel, row, column) of the same pairs are all augmented alike; None stays None.
    """
    count = next(len(x) for x in tensors if x is not None)
    flips = (torch.rand(count, 2, generator=generator) < 0.5).tolist()
    quarters = torch.randint(4, (count,), generator=generator).tolist() if rotate90 else [0] * count
    axes = [[axis for axis, flip in ((-1, one[0]), (-2, one[1] and rotate90)) if flip] for one in flips]

    def augmented(x):
        return torch.stack([torch.rot90(p.flip(a), q, (-2, -1)) for p, a, q in zip(x, axes, quarters, strict=True)])

    return [None if x is None else augmented(x) for x in tensors]
