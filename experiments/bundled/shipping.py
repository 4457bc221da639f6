"""Make what lies beside the weights of a bundled model: its short curve, configurations without a place of origin."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

__all__ = ["forget_origin", "thin_curve"]


def thin_curve(sources: Sequence[Path], target: Path, rows: int = 200) -> None:
    """Copy curves (CSV) of one training's sittings as one, averaged over equal spans of steps, at most `rows` of them.

    What a sitting did not log is left empty.
    """
    curves = [np.atleast_1d(np.genfromtxt(source, delimiter=",", names=True)) for source in sources]
    names, parts, first = list(dict.fromkeys(name for curve in curves for name in curve.dtype.names)), [], 0
    for curve in curves:
        unknown = np.full(len(curve), np.nan)
        parts.append(np.stack([curve[name] if name in curve.dtype.names else unknown for name in names], 1))
        parts[-1][:, 0] += first  # steps go on where those of the sitting before end
        first = 2 * parts[-1][-1, 0] - parts[-1][-2, 0] if len(curve) > 1 else parts[-1][-1, 0] + 1
    table = np.concatenate(parts)
    steps = table[:, 0]  # which a sitting that was thinned before logs more rarely than one that was not
    span = np.floor((steps - steps[0]) / max(steps[-1] - steps[0], 1) * rows).clip(max=rows - 1)
    blocks = [table[span == k] for k in np.unique(span)]
    with target.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows([_written(column) for column in block.T] for block in blocks)


def _written(column):
    known = column[~np.isnan(column)]
    return round(float(known.mean()), 5) if len(known) else ""


def forget_origin(folder: Path) -> None:
    """Take out of all configurations in a folder where on the training machine their weights came from."""
    for path in folder.rglob("config.json"):
        config = json.loads(path.read_text())
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2) + "\n")
