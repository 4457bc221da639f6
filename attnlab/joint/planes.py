"""Pairs as planes of about unit deviation and back, and what noise makes of them."""

from collections.abc import Sequence

import numpy as np
import torch

from ..masks import IGNORE
from . import codes

STEPS = 1000  # of the forward process
SHIFT = 1 / 8  # of its signal-to-noise ratio: see `noise_levels`


def noise_levels() -> dict:
    """The forward process, as a scheduler of diffusers takes it: the cosine schedule, shifted.

    Large areas of one label are seen through noise that hides single pixels. Under the cosine schedule (Nichol and
    Dhariwal, ICML 2021) the layout would be decided within the first few steps of sampling; at SHIFT times its
    signal-to-noise ratio (Hoogeboom, Heek and Salimans, ICML 2023, equation 4) it has many of them.
    """
    share = np.cos((np.arange(1, STEPS + 1) / STEPS + 0.008) / 1.008 * np.pi / 2) ** 2
    ratio = SHIFT * share / (1 - share)
    kept = ratio / (1 + ratio)
    betas = 1 - kept / np.append(1, kept[:-1])
    return {"num_train_timesteps": STEPS, "trained_betas": betas.clip(max=0.999).tolist()}


class Planes:
    """How a model sees pairs: [RGB, label planes], float32 (image, plane, row, column).

    Attributes
    ----------
    codes : -1 and 1, float32 (class, label plane)
    mean, std : of each color, in 0..1, over the pairs learned from; colors are standardized by them
    """

    def __init__(self, table: np.ndarray, mean, std):
        self.codes = np.asarray(table, np.float32)
        mean, std = (torch.tensor(x, dtype=torch.float32)[:, None, None] for x in (mean, std))
        self._scale, self._shift = 1 / std, -mean / std
        bits = torch.ones(self.codes.shape[1], 1, 1)
        self._lowest = torch.cat([self._shift, -bits])
        self._highest = torch.cat([self._scale + self._shift, bits])

    def __len__(self) -> int:
        """How many there are."""
        return 3 + self.codes.shape[1]

    def encode(self, images: np.ndarray, labels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Planes, colors first, and which of them are decided, 0 and 1."""
        colors = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255
        planes = codes.encode(labels, self.codes)
        decided = torch.from_numpy(labels != IGNORE)[:, None].float()
        known = torch.cat([torch.ones_like(colors), decided.expand_as(planes)], 1)
        return torch.cat([colors * self._scale + self._shift, planes], 1), known

    def decode(self, planes: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Images, labels and margins of planes."""
        colors = (planes[:, :3].cpu() - self._shift) / self._scale
        images = (colors.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
        return images, *codes.decode(planes[:, 3:], self.codes)

    def clamp(self, planes: torch.Tensor) -> torch.Tensor:
        """Within the range that planes of pairs have."""
        return planes.clamp(self._lowest.to(planes.device), self._highest.to(planes.device))


def varied(planes: Sequence[torch.Tensor | None], turns: bool, generator: torch.Generator) -> list[torch.Tensor | None]:
    """Each pair left-right or as it is; with `turns` upside down or not, and turned by quarters, as well.

    `planes`: tensors (image, plane, row, column) of the same pairs, which are all varied alike; None stays None.
    """
    count = next(len(x) for x in planes if x is not None)
    flips = (torch.rand(count, 2, generator=generator) < 0.5).tolist()
    quarters = torch.randint(4, (count,), generator=generator).tolist() if turns else [0] * count
    axes = [[axis for axis, flip in ((-1, one[0]), (-2, one[1] and turns)) if flip] for one in flips]

    def of_all(x):
        return torch.stack([torch.rot90(p.flip(a), q, (-2, -1)) for p, a, q in zip(x, axes, quarters, strict=True)])

    return [x if x is None else of_all(x) for x in planes]
