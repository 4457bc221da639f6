"""Make averaged weights and a short curve of a finished training, for the folder of a bundled model."""

import csv
from pathlib import Path

import numpy as np
import torch

from attnlab.storage import File

__all__ = ["averaged", "thin_curve"]


def averaged(folder: Path) -> tuple[int, dict[str, torch.Tensor]]:
    """Return the number of steps done and the moving average's parameters, of the checkpoint in `folder`."""
    file, start = File(folder / "checkpoint.safetensors", "Checkpoint"), "average/module."
    average = {name.removeprefix(start): file.read(name) for name in file.names if name.startswith(start)}
    return file.metadata["step"], average


def thin_curve(source: Path, target: Path, rows: int = 200) -> None:
    """Copy a curve (CSV), averaged over blocks of steps, at most `rows` of them."""
    curve = np.genfromtxt(source, delimiter=",", names=True)
    blocks = np.array_split(np.stack([curve[n] for n in curve.dtype.names], 1), min(rows, len(curve)))
    with target.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(curve.dtype.names)
        writer.writerows([round(float(v), 5) for v in block.mean(0)] for block in blocks)
