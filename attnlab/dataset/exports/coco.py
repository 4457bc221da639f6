"""Export a labeled data set to COCO."""

import json
from contextlib import ExitStack
from itertools import count
from pathlib import Path

import numpy as np
from pycocotools import mask as coco

from ...storage import replacing
from ..records import Dataset
from .shapes import find_outlines, find_shapes
from .writing import Splits, check_splits, read_labeled

__all__ = ["export_coco"]


def export_coco(
    dataset: Dataset, path: str | Path, *, polygons: bool = False, splits: Splits = None
) -> Path | dict[str, Path]:
    """Write COCO instance annotations (JSON) for `pycocotools.coco.COCO`, one per object.

    Objects are the connected regions of a class, or the single things of a recipe with `instances`. Areas are in
    pixels, boxes (x, y, width, height); file names are relative to the data set's folder. Ignored pixels belong to
    nothing. Images marked as bad are left out.

    Parameters
    ----------
    dataset : Dataset
        A finished data set.
    path : str or Path
        The file to write, whose name ends in .json: a new one, or an older export of this data set, which is replaced.
        ValueError for any other.
    polygons : bool
        Write polygons along the edges of pixels, which pycocotools fills to exactly these pixels; holes are cut open by
        bridges of no width. False: masks are run-length encoded.
    splits : dict of str to sequence of int, optional
        Positions in `dataset.records` of each split, as `split_dataset` gives them. Each gets a file of its own:
        coco_train.json, coco_val.json, ... where `path` is coco.json.

    Returns
    -------
    Path or dict of str to Path
        The file; with splits, that of each.
    """
    path, parts = Path(path), check_splits(dataset, splits, empty=splits is None)
    if path.suffix.lower() != ".json":
        raise ValueError(f"{path}: COCO is a file, whose name ends in .json, such as {path.name or 'coco'}.json")
    paths = {name: path if splits is None else path.with_stem(f"{path.stem}_{name}") for name in parts}
    for file in paths.values():
        _refuse_other(file, _head(dataset))
    numbers = count(1), count(1)  # of images and annotations, in all files
    with ExitStack() as stack:
        files = {name: stack.enter_context(replacing(paths[name])) for name in parts}
        for name, positions in parts.items():
            with open(files[name], "w", encoding="utf-8") as file:
                file.writelines(_pieces(read_labeled(dataset, positions, name), dataset, polygons, *numbers))
    return path if splits is None else paths


def _head(dataset):
    """Return how a file begins: it tells which data set it is of."""
    return f'{{"info": {{"description": "recipe {dataset.recipe.digest}"}}, '


def _refuse_other(path, head):
    """Raise ValueError where a file is there, and is no export that begins so."""
    if path.is_file():
        with open(path, "rb") as file:
            if file.read(len(head)) != head.encode():
                raise ValueError(f"{path} is there, and is no COCO export of this data set: name a new file")


def _pieces(records, dataset, polygons, image_ids, ids):
    """Yield the text of a file annotation by annotation: there may be too many to hold."""
    images, comma = [], ""
    yield _head(dataset) + '"annotations": ['
    described = _outlined(records) if polygons else _encoded(records)
    for (one, objects), number in zip(described, image_ids, strict=False):  # no number is lost at the end
        image = {"id": number, "file_name": one.metadata["file_name"], "width": one.size[1], "height": one.size[0]}
        images.append(json.dumps(image))
        for kind, area, box, segmentation in objects:
            found = {"id": next(ids), "image_id": number, "category_id": kind, "iscrowd": 0, "area": area}
            yield comma + json.dumps(found | {"bbox": list(map(float, box)), "segmentation": segmentation})
            comma = ",\n"
    categories = [{"id": number, "name": name} for number, name in enumerate(dataset.classes) if number]
    yield f'], "images": [{", ".join(images)}], "categories": {json.dumps(categories)}}}\n'


def _encoded(records):
    """Yield records, and of their objects class, area, box and run-length encoding."""
    for one in records:
        yield one, (_encode(shape, one.size) for shape in find_shapes(one.labels, one.instances))


def _encode(shape, size):
    whole, (rows, columns) = np.zeros(size, np.uint8, order="F"), shape.place
    whole[rows, columns] = shape.mask
    rle = coco.encode(whole)
    box = columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start
    return shape.number, int(np.count_nonzero(shape.mask)), box, {**rle, "counts": rle["counts"].decode("ascii")}


def _outlined(records):
    """Yield records, and of their objects class, area, box and polygons."""
    for one, outlines in find_outlines(records):
        yield one, ((number, *_measure(polygons)) for number, polygons in outlines)


def _measure(polygons):
    points = polygons[0] if len(polygons) == 1 else np.concatenate(polygons)
    corner = points.min(0)
    box = *corner.tolist(), *(points.max(0) - corner).tolist()
    return int(sum(map(_area, polygons))), box, [polygon.ravel().tolist() for polygon in polygons]


def _area(polygon):
    """Return the area of a polygon along the edges of pixels; the one from its last point to its first is level."""
    x, y = polygon.T
    return abs(x[:-1] @ (y[1:] - y[:-1]))
