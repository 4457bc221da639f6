"""Export a labeled data set to YOLO's form of segmentation."""

from pathlib import Path

import numpy as np
import yaml

from ..records import Dataset
from .shapes import find_outlines
from .writing import Splits, check_splits, copy_image, export_folder, read_labeled

__all__ = ["export_yolo"]

# Where outlines run in their pixels. Some readers cut the numbers off, others round them: below one half, both give the
# same pixel. The margins are for the 6 digits of a label file and for float32, in images of up to 8192 pixels.
_LOW, _HIGH, _WIDE = 0.02, 0.48, 0.98


def export_yolo(dataset: Dataset, folder: str | Path, *, splits: Splits = None, enlarged: bool = False) -> Path:
    """Write a folder that Ultralytics' YOLO trains segmentation on: `yolo segment train data=FOLDER/data.yaml`.

    Images are copied to images/SPLIT; labels/SPLIT has a text file for each, a line per connected region of a class or,
    of a recipe with `instances`, of a single thing: the class, from 0 on, and a polygon in fractions of the width and
    height. Holes are cut open by bridges of no width. Ignored pixels belong to nothing, as YOLO knows no such pixels;
    an image without objects gets an empty file. Images marked as bad are left out.

    Parameters
    ----------
    dataset : Dataset
        A finished data set.
    folder : str or Path
        A new or empty folder, or an older export of this data set, which is replaced once the new one is whole.
        ValueError for any other.
    splits : dict of str to sequence of int, optional
        Positions in `dataset.records` of each split, as `split_dataset` gives them. None: all are for training, and
        data.yaml names them for validation, too, since YOLO does not train without.
    enlarged : bool
        Write polygons that Ultralytics fills to the masks' pixels at any size, for images that are smaller than those
        it trains with (imgsz). Other readers, which round, then get a row and a column too many. False: all readers get
        exactly these pixels at the images' own size, and masks lose half of one at their lower and right side where
        they are enlarged.
    """
    parts = check_splits(dataset, splits)
    with export_folder(dataset, folder, "YOLO") as part:
        for name, positions in parts.items():
            images, labels = part / "images" / name, part / "labels" / name
            images.mkdir(parents=True)
            labels.mkdir(parents=True)
            records = read_labeled(dataset, positions, name)
            for one, outlines in find_outlines(records, _LOW, _WIDE if enlarged else _HIGH):
                copy_image(one, images)
                (labels / f"{one.name}.txt").write_bytes(_lines(one.size, outlines).encode())
        (part / "data.yaml").write_bytes(_settings(dataset, list(parts)).encode())
    return Path(folder)


def _lines(size, outlines):
    """Return the lines of a label file."""
    (height, width), found = size, ""
    for number, polygons in outlines:
        for polygon in polygons:
            values = np.divide(polygon, (width, height)).ravel().tolist()
            found += f"{number - 1} {' '.join(f'{value:.6f}' for value in values)}\n"
    return found


def _settings(dataset, names):
    """Return the text of data.yaml; it names no folder, so that YOLO takes the one where it lies."""
    first = names[0]
    used = {name: name for name in names}
    for needed in ("train", "val"):  # without which YOLO does not begin
        used.setdefault(needed, "test" if needed == "val" and "test" in names else first)
    lent = [f"# no split is called {name}: {other} stands for it\n" for name, other in used.items() if name != other]
    settings = {name: f"images/{other}" for name, other in used.items()}
    settings |= {"nc": len(dataset.classes) - 1, "names": dataset.classes[1:]}
    return f"# made from recipe {dataset.recipe.digest}\n{''.join(lent)}" + yaml.safe_dump(settings, sort_keys=False)
