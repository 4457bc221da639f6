"""Export a labeled data set to the form that transformers trains segmenters on, such as SegFormer."""

import json
from pathlib import Path

from PIL import Image

from ..records import Dataset, as_lines
from .shapes import class_map
from .writing import Splits, check_splits, copy_image, export_folder, read_labeled

__all__ = ["export_segformer"]


def export_segformer(dataset: Dataset, folder: str | Path, *, splits: Splits = None) -> Path:
    """Write a folder of images and label maps for semantic segmentation by transformers: SegFormer, UPerNet, ...

    `datasets.load_dataset(FOLDER)` reads it, with the columns image, label and prompt. Labels are gray PNG of class
    numbers: 0 is the background, 255 is ignored, as in the configurations of these models. id2label.json and
    label2id.json name the classes. Images marked as bad are left out.

    Parameters
    ----------
    dataset, folder
        As in `export_yolo`.
    splits : dict of str to sequence of int, optional
        Positions in `dataset.records` of each split, as `split_dataset` gives them; "val" is called "validation", as
        transformers' scripts want it. None: all are in "train".
    """
    parts = check_splits(dataset, splits)
    with export_folder(dataset, folder, "SegFormer") as part:
        for name, positions in parts.items():
            (part / name / "images").mkdir(parents=True)
            (part / name / "labels").mkdir()
            lines = [_write_pair(part / name, one) for one in read_labeled(dataset, positions, name)]
            (part / name / "metadata.jsonl").write_bytes(as_lines(lines).encode())
        names = dict(enumerate(dataset.classes))
        (part / "id2label.json").write_bytes((json.dumps(names) + "\n").encode())
        (part / "label2id.json").write_bytes((json.dumps({name: i for i, name in names.items()}) + "\n").encode())
        (part / "README.md").write_bytes(_card(dataset, list(parts)).encode())
    return Path(folder)


def _write_pair(folder, one):
    """Write an image and its label map; return their line of metadata.jsonl."""
    copied = copy_image(one, folder / "images")
    Image.fromarray(class_map(one.labels)).save(folder / f"labels/{one.name}.png")
    names = {"file_name": f"images/{copied.name}", "label_file_name": f"labels/{one.name}.png"}
    return names | {"prompt": one.metadata["prompt"]}


def _card(dataset, names):
    """Return the text of the folder's README, whose head tells `datasets` which files are of which split."""
    files = "".join(f"  - split: {'validation' if name == 'val' else name}\n    path: {name}/**\n" for name in names)
    return f"""---
configs:
- config_name: default
  data_files:
{files}---

Images and label maps of {", ".join(dataset.classes)}, made from recipe {dataset.recipe.digest} by attnlab.
The numbers of classes are in id2label.json; pixels of 255 are ignored. These are weak labels, checked by nobody.
"""
