"""What all exports share: which records go where, and folders that are written whole or not at all."""

import json
import operator
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from ...storage import write_text
from ..records import Dataset, file_inside

__all__ = ["Labeled", "Splits", "check_splits", "copy_image", "export_folder", "read_labeled"]

Splits = Mapping[str, Sequence[int]] | None
"""Positions in `Dataset.records` of the records of each split, as `split_dataset` gives them; None: no splits."""

_MARK = "export.json"  # tells which data set an exported folder is of, and what belongs to it
_OWN = re.compile(r"(.*/)?(\d{6,}\.\w+|[^/]*\.cache)")  # what it does not: files of records, what Ultralytics adds


def check_splits(dataset: Dataset, splits: Splits, *, empty: bool = False) -> dict[str, list[int]]:
    """Return the records of each split without those marked as bad; without splits, all as one that is called train.

    Parameters
    ----------
    dataset, splits : Dataset, dict of str to sequence of int
        What is exported. ValueError where a name cannot be that of a folder, or a record is in two splits or nowhere.
    empty : bool
        Whether there may be a split without records; ValueError where there is one otherwise.
    """
    names = [metadata["file_name"] for metadata in dataset.records]
    splits = {"train": range(len(names))} if splits is None else splits
    found, seen = {}, {}
    for name, positions in splits.items():
        if not isinstance(name, str) or not re.fullmatch(r"[a-zA-Z0-9_-]+", name):
            raise ValueError(f"split {name!r}: a name has letters, digits, - and _, as files are named after it")
        positions = [operator.index(i) for i in positions]
        if other := [i for i in positions if not 0 <= i < len(names)]:
            raise ValueError(f"split {name!r} has {other[0]}: the data set's records are 0 to {len(names) - 1}")
        if twice := [i for i in positions if seen.setdefault(i, name) != name]:
            raise ValueError(f"record {twice[0]} is in split {seen[twice[0]]!r} and in {name!r}: keep it in one")
        found[name] = [i for i in dict.fromkeys(positions) if names[i] not in dataset.bad]
        if not found[name] and not empty:
            marked = " but those marked as bad" if positions else ""
            raise ValueError(f"split {name!r} has no images{marked}: give it some, or leave it out")
    return found


@contextmanager
def export_folder(dataset: Dataset, folder: str | Path, kind: str) -> Iterator[Path]:
    """Yield a new folder to write to; it replaces an older export when the block ends well.

    Parameters
    ----------
    dataset : Dataset
        What is exported.
    folder : str or Path
        A new or empty folder, or an export of this kind of the same data set; ValueError for any other.
    kind : str
        Name of the form.
    """
    folder = Path(folder).resolve()
    mark = {"export": kind, "recipe": dataset.recipe.digest}
    _refuse_others(folder, mark)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{folder.name}.part-", dir=folder.parent) as work:
        part, old = Path(work, "new"), Path(work, "old")
        part.mkdir()
        yield part
        mark["files"] = sorted(name for name in _files(part) if not _OWN.fullmatch(name))
        write_text(part / _MARK, json.dumps(mark) + "\n")
        if folder.exists():
            _refuse_others(folder, mark)  # what came meanwhile, too
            folder.rename(old)
        try:
            part.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise


def _refuse_others(folder, mark):
    """Raise ValueError where a folder holds anything but an export like this one."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file: name a new folder")
    present = set(_files(folder))
    try:
        found = json.loads((folder / _MARK).read_text("utf-8")) if present else {**mark, "files": []}
        own, others = {key: found[key] for key in ("export", "recipe")}, present - {_MARK, *found["files"]}
        others = {name for name in others if not _OWN.fullmatch(name)}
    except (OSError, ValueError, LookupError, TypeError):
        raise ValueError(f"{folder} has other files: name a new or empty folder") from None
    if own != {key: mark[key] for key in own}:
        said = f"{own['export']} export of recipe {own['recipe']}"
        raise ValueError(f"{folder} holds the {said}, not the {mark['export']} one of {mark['recipe']}: name another")
    if others:
        raise ValueError(f"{folder} holds {min(others)}, which no export wrote: move that, or name another folder")


def _files(folder):
    """List the files in a folder, and in those below it, by their names within it; of folders those without any."""
    found = []
    for path, below, files in os.walk(folder):
        name, links = Path(path).relative_to(folder).as_posix(), [one for one in below if Path(path, one).is_symlink()]
        is_empty = not files and not below and name != "."
        found += [name] if is_empty else [f"{name}/{one}".removeprefix("./") for one in files + links]
    return found


class Labeled(NamedTuple):
    """An image file with its labels."""

    path: Path
    metadata: dict  # its line of metadata.jsonl
    labels: np.ndarray | dict[str, np.ndarray]  # as `Dataset.numbers` gives them
    size: tuple[int, int]  # height, width
    instances: np.ndarray | None = None  # as `Dataset.instances` gives them

    @property
    def name(self) -> str:
        """Name of the record's files, without an ending."""
        return f"{self.metadata['index']:06d}"


def read_labeled(dataset: Dataset, positions: Sequence[int], name: str) -> Iterator[Labeled]:
    """Read records one by one, their images' headers alone; ValueError where an image and its labels differ in size.

    Parameters
    ----------
    dataset, positions, name : Dataset, sequence of int, str
        What is read, and what its progress bar is called.
    """
    for i in tqdm(positions, desc=f"export {name}", leave=False, delay=1):
        metadata, labels = dataset.records[i], dataset.numbers(i)
        path = file_inside(dataset.folder, metadata["file_name"])
        try:
            with Image.open(path) as image:
                size = image.height, image.width
        except Exception as error:  # Pillow's readers raise many kinds
            raise ValueError(f"{metadata['file_name']} is no image: {error}") from error
        instances = dataset.instances(i)
        arrays = [*labels.values()] if isinstance(labels, dict) else [labels]
        arrays += [] if instances is None else [instances]
        if other := {one.shape for one in arrays} - {size}:
            raise ValueError(f"{metadata['file_name']} has (height, width) {size}, its labels {other.pop()}")
        yield Labeled(path, metadata, labels, size, instances)


def copy_image(one: Labeled, folder: Path) -> Path:
    """Copy an image file to a folder of others; return the copy's path."""
    return Path(shutil.copyfile(one.path, folder / f"{one.name}{one.path.suffix}"))
