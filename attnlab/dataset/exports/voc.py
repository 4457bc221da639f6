"""Export a labeled data set to the form of Pascal VOC."""

import warnings
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from ...masks import IGNORE
from ..records import Dataset, open_image
from .shapes import class_map, find_shapes
from .writing import Labeled, Splits, check_splits, export_folder, read_labeled

__all__ = ["export_voc", "voc_colors"]

_LISTS = "ImageSets/Segmentation", "ImageSets/Main"  # readers of masks look into the first, readers of boxes the second
_QUALITY = 95  # of JPEG, with colors in full: readers of VOC know no other images


def export_voc(dataset: Dataset, folder: str | Path, *, splits: Splits = None) -> Path:
    """Write a folder as that of Pascal VOC 2012: images, masks of classes and of objects, boxes, lists of the splits.

    Masks are palette PNG: SegmentationClass has the numbers of classes; SegmentationObject those of objects, which are
    the connected regions of a class, or the single things of a recipe with `instances`, the largest first, as in the
    image's XML file in Annotations. 0 is the background, 255 is ignored. JPEGImages are of quality 95, which changes
    colors a little: readers of VOC look for .jpg alone. labelmap.txt names the classes. Images marked as bad are left
    out.

    Parameters
    ----------
    dataset
        As in `export_yolo`.
    folder : str or Path
        As in `export_yolo`. Some readers want it to be called VOCdevkit/VOC2012.
    splits : dict of str to sequence of int, optional
        Positions in `dataset.records` of each split, as `split_dataset` gives them; each gets a list in
        ImageSets/Segmentation and in ImageSets/Main. None: the one list is train.txt.

    Warns
    -----
    UserWarning
        If images have more than 254 objects: in SegmentationObject, which has no more numbers, the smallest are 255.
    """
    parts = check_splits(dataset, splits)
    with export_folder(dataset, folder, "VOC") as part:
        for name in ("JPEGImages", "SegmentationClass", "SegmentationObject", "Annotations", *_LISTS):
            (part / name).mkdir(parents=True)
        (part / "labelmap.txt").write_bytes(_label_map(dataset.classes).encode())
        crowded = []
        for name, positions in parts.items():
            counts = {one.name: _write(part, dataset, one) for one in read_labeled(dataset, positions, name)}
            for lists in _LISTS:
                (part / lists / f"{name}.txt").write_bytes("".join(f"{one}\n" for one in counts).encode())
            crowded += [one for one, count in counts.items() if count >= IGNORE]
    if crowded:
        said = f"{len(crowded)} images have more than 254 objects, {crowded[0]} the first: the smallest are 255 in"
        warnings.warn(f"{said} SegmentationObject, which has no more numbers", stacklevel=2)
    return Path(folder)


def _write(part, dataset, one: Labeled) -> int:
    """Write the files of a record; return the number of its objects."""
    image = open_image(dataset.folder, one.metadata["file_name"]).convert("RGB")
    image.save(part / f"JPEGImages/{one.name}.jpg", quality=_QUALITY, subsampling=0)
    shapes = sorted(find_shapes(one.labels, one.instances), key=lambda shape: -shape.mask.sum())
    _palette_png(class_map(one.labels), part / f"SegmentationClass/{one.name}.png")
    _palette_png(_object_map(one, shapes), part / f"SegmentationObject/{one.name}.png")
    described = ElementTree.ElementTree(_described(one, shapes, dataset.classes))
    ElementTree.indent(described)
    described.write(part / f"Annotations/{one.name}.xml", encoding="utf-8")
    return len(shapes)


def voc_colors() -> list[tuple[int, int, int]]:
    """Return the 256 colors of VOC's palette: bits 0, 3, 6 of a number are red's highest ones, and so on.

    Everingham et al., the VOC2012 development kit, VOClabelcolormap.m.
    """
    numbers = np.arange(256)
    bits = [[(numbers >> 3 * k + channel & 1) << 7 - k for k in range(3)] for channel in range(3)]
    return [tuple(color) for color in np.sum(bits, axis=1).T.tolist()]


def _palette_png(values, path):
    found = Image.fromarray(values)
    found.putpalette(np.ravel(voc_colors()).tolist())
    found.save(path)


def _object_map(one, shapes):
    """Return the number of each pixel's object, uint8 (row, column); of two that overlap, the smaller one's."""
    found = np.where(class_map(one.labels) == IGNORE, IGNORE, 0).astype(np.uint8)
    for number, shape in enumerate(shapes, 1):
        found[shape.place][shape.mask] = min(number, IGNORE)
    return found


def _described(one, shapes, classes):
    """Describe an image's objects as VOC does: boxes from 1 on, with their last pixels."""
    root = ElementTree.Element("annotation")
    _add(root, folder="JPEGImages", filename=f"{one.name}.jpg", segmented=1)
    _add(ElementTree.SubElement(root, "size"), width=one.size[1], height=one.size[0], depth=3)
    for shape in shapes:
        rows, columns = shape.place
        found = ElementTree.SubElement(root, "object")
        _add(found, name=classes[shape.number], pose="Unspecified", truncated=0, difficult=0)
        box = {"xmin": columns.start + 1, "ymin": rows.start + 1, "xmax": columns.stop, "ymax": rows.stop}
        _add(ElementTree.SubElement(found, "bndbox"), **box)
    return root


def _add(element, **texts):
    for name, text in texts.items():
        ElementTree.SubElement(element, name).text = str(text)


def _label_map(classes):
    """Return the text that names the colors of classes, as CVAT reads it."""
    rows = [f"{name}:{','.join(map(str, color))}::\n" for name, color in zip(classes, voc_colors(), strict=False)]
    return "# label:color_rgb:parts:actions\n" + "".join(rows)
