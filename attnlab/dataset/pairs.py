"""Read labeled data sets, and what they were exported to, as pairs that segmenters are trained on."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..segmentation.folders import Layout, PairFolder
from .records import Dataset

__all__ = ["open_pairs"]


def open_pairs(source: Dataset | str | Path, split: str | Sequence[int] | None = None) -> PairFolder:
    """Open the pairs of a data set, or of its export to SegFormer or Pascal VOC, with "background" as class 0.

        pairs = open_pairs("floods")
        segmenter = train_segmenter(*patches(pairs, 64), pairs.classes, class_weights="balanced")

    Parameters
    ----------
    source : Dataset, str or Path
        A data set or its folder, whose images marked as bad are left out; or the folder of an export.
    split : str or sequence of int, optional
        Of an export, the name of a split; of a data set, positions in its `records`, as `split_dataset` gives them.
        Default: all.

    Returns
    -------
    PairFolder
        Pairs uint8 (row, column, rgb) and uint8 (row, column), in the order of their names.

    Raises
    ------
    FileNotFoundError
        If there is no such folder or split, or files are missing.
    ValueError
        If a data set has one mask per class, which may overlap, and no label images; or `split` is of the wrong kind.
    """
    if isinstance(source, Dataset):
        return _of_dataset(source, split)
    folder = Path(source).expanduser()
    if (folder / "metadata.jsonl").exists() and (folder / "recipe.yaml").exists():
        return _of_dataset(Dataset(folder), split)
    if split is not None and not isinstance(split, str):
        raise ValueError(f"{folder} is no data set, which has positions: give the name of a split, such as 'train'")
    if (folder / "id2label.json").exists():
        return _of_segformer(folder, split)
    if (folder / "labelmap.txt").exists():
        return _of_voc(folder, split)
    raise FileNotFoundError(f"{folder} holds no finished data set, and no export of one to SegFormer or Pascal VOC")


def _of_dataset(dataset, positions):
    if isinstance(positions, str):
        raise ValueError(f"split={positions!r}: of a data set give positions, split_dataset(dataset)[{positions!r}]")
    if not dataset.recipe.labels:
        raise ValueError(f"{dataset.folder} has one mask per class, which may overlap: make it with `labels: true`")
    chosen = dataset.records if positions is None else [dataset.records[i] for i in positions]
    names = {Path(line["file_name"]).name for line in chosen if line["file_name"] not in dataset.bad}
    return _only(PairFolder(dataset.folder, Layout(tuple(dataset.classes))), names, "chosen images")


def _of_segformer(folder, split):
    """Open an export of `export_segformer`; its images have the folder of their split above theirs."""
    names = json.loads((folder / "id2label.json").read_text("utf-8"))
    layout = Layout(tuple(names[str(i)] for i in range(len(names))), "*/images/*", "{parent}/labels/{name}.png")
    return PairFolder(folder, replace(layout, images=f"{split}/images/*") if split else layout)


def _of_voc(folder, split):
    """Open an export of `export_voc`, whose splits are lists of names."""
    rows = [line.partition(":")[0] for line in (folder / "labelmap.txt").read_text("utf-8").splitlines()]
    classes = tuple(name for name in rows if name and not name.startswith("#"))
    pairs = PairFolder(folder, Layout(classes, "JPEGImages/*", "SegmentationClass/{name}.png"))
    if split is None:
        return pairs
    path = folder / f"ImageSets/Segmentation/{split}.txt"
    if not path.is_file():
        known = ", ".join(sorted(one.stem for one in path.parent.glob("*.txt"))) or "none"
        raise FileNotFoundError(f"{folder} has no split {split!r}; there are {known}")
    return _only(pairs, {f"{name}.jpg" for name in path.read_text("utf-8").split("\n")}, f"images of {split}")


def _only(pairs, names, what):
    """Keep the pairs whose images have these names; ValueError where none has."""
    pairs.paths = [(image, mask) for image, mask in pairs.paths if image.name in names]
    if not pairs.paths:
        raise ValueError(f"{pairs.folder} has no {what}")
    return pairs
