"""Make the short curve of a finished training, for the folder of a bundled model."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

__all__ = ["thin_curve"]


def thin_curve(sources: Sequence[Path], target: Path, rows: int = 200) -> None:
    """Copy curves (CSV) of one training's sittings as one, averaged over blocks of steps, at most `rows` of them."""
    parts, first = [], 0
    for source in sources:
        curve = np.atleast_1d(np.genfromtxt(source, delimiter=",", names=True))
        parts.append(np.stack([curve[name] for name in curve.dtype.names], 1))
        parts[-1][:, 0] += first  # steps go on where those of the sitting before end
        first = 2 * parts[-1][-1, 0] - parts[-1][-2, 0] if len(curve) > 1 else parts[-1][-1, 0] + 1
    blocks = np.array_split(np.concatenate(parts), min(rows, sum(map(len, parts))))
    with target.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(curve.dtype.names)
        writer.writerows([round(float(v), 5) for v in block.mean(0)] for block in blocks)
