"""Read and check the files of a labeled data set, and write a record.

A folder is a Hugging Face `imagefolder`: images/, masks/ (palette PNG of class numbers), metadata.jsonl, README.md and
contact_sheet.png. Beside them lie recipe.yaml, and in rejected.jsonl and rejected/ what the filters refused and why.
"""

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..masks import IGNORE
from ..plots.styling import class_color
from ..storage import versions, write_text
from .labeling import Labeling
from .recipe import Recipe

__all__ = [
    "Dataset", "Pair", "difference_hash", "read_lines", "verify_dataset", "write_lines", "write_record",
]  # fmt: skip

_BAD_FILE = "bad.json"  # file names of images that people marked as bad


class Pair(NamedTuple):
    """An image with its labels."""

    image: Image.Image
    labels: np.ndarray | dict[str, np.ndarray]  # uint8 (row, column) of class numbers, or the bool mask of each class
    metadata: dict  # its line of metadata.jsonl


class Dataset(Sequence):
    """A finished data set: a sequence of `Pair`.

    Attributes
    ----------
    folder, recipe : Path, Recipe
        Where it is, and what it was made by.
    records, rejected : list of dict
        The lines of metadata.jsonl and rejected.jsonl.
    classes : list of str
        Names behind the numbers of label images, "background" first.
    bad : set of str
        File names of images that somebody marked as bad (see `mark`); exports leave them out.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / "metadata.jsonl").exists():
            begun = (self.folder / "recipe.yaml").exists()
            hint = "it is not finished: generate_dataset goes on" if begun else "it holds no data set"
            raise FileNotFoundError(f"{self.folder} has no metadata.jsonl: {hint}")
        self.recipe = Recipe.load(self.folder / "recipe.yaml")
        self.records, self.rejected = (read_lines(self.folder / f"{n}.jsonl") for n in ("metadata", "rejected"))
        self.classes = ["background", *self.recipe.classes]
        marks = self.folder / _BAD_FILE
        self.bad = set(json.loads(marks.read_text("utf-8"))) if marks.exists() else set()

    def mark(self, file_name: str, bad: bool = True) -> None:
        """Mark an image as bad, or as good again, in bad.json. KeyError where there is no such image."""
        if file_name not in {metadata["file_name"] for metadata in self.records}:
            raise KeyError(f"no image {file_name} in {self.folder}")
        self.bad = self.bad | {file_name} if bad else self.bad - {file_name}
        write_text(self.folder / _BAD_FILE, json.dumps(sorted(self.bad), indent=1) + "\n")

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> Pair:
        metadata = self.records[i]
        with Image.open(self.folder / metadata["file_name"]) as image:
            image = image.convert("RGB")
        masks = {}
        for name in _mask_names(self.recipe):
            with Image.open(self.folder / metadata[_column(name)]) as opened:
                masks[name] = np.array(opened)
        return Pair(image, masks[""] if self.recipe.labels else {n: m > 0 for n, m in masks.items()}, metadata)

    def __repr__(self) -> str:
        classes = ", ".join(self.classes[1:])
        return f"<Dataset {self.folder}: {len(self)} pairs of {classes}; {len(self.rejected)} rejected>"


def verify_dataset(folder: str | Path) -> list[str]:
    """List everything that is wrong with a data set's files, one sentence each; nothing where it is whole."""
    dataset = Dataset(folder)
    expected, problems = set(), []
    for line in dataset.records:
        names = {"image": line["file_name"]} | {n or "mask": line[_column(n)] for n in _mask_names(dataset.recipe)}
        expected |= set(names.values())
        problems += [found for kind, name in names.items() if (found := _wrong_file(dataset, line, kind, name))]
    paths = [*dataset.folder.glob("images/*"), *dataset.folder.glob("masks/*")]
    others = {path.relative_to(dataset.folder).as_posix() for path in paths} - expected
    problems += [f"{name} is in no line of metadata.jsonl" for name in sorted(others)]
    made = sorted(line["index"] for line in [*dataset.records, *dataset.rejected])
    if made != list(range(len(dataset.recipe))):
        problems.append(f"metadata.jsonl and rejected.jsonl name {len(made)} records, the recipe {len(dataset.recipe)}")
    return problems


def write_record(work: Path, recipe: Recipe, index: int, image: Image.Image, labeling: Labeling) -> dict:
    """Write an image and its masks to a folder; return its line of records.jsonl."""
    name = f"{index:06d}.png"
    image.save(work / "images" / name)
    line = {"file_name": f"images/{name}", "index": index}
    line |= {"prompt": recipe.prompt(index), "seed": recipe.seed_of(index)}
    nothing = np.zeros(labeling.labels.shape, bool)
    masks = {kind: labeling.masks.get(kind, nothing).astype(np.uint8) for kind in recipe.classes}
    hashes = {"image": _sha256(work / "images" / name)}
    for kind, values in ({"": labeling.labels} if recipe.labels else masks).items():
        file = f"masks/{name}" if not kind else f"masks/{index:06d}_{kind.replace(' ', '_')}.png"
        _palette_image(values, recipe).save(work / file)
        line[_column(kind)], hashes[kind or "mask"] = file, _sha256(work / file)
    for key, values in (("areas", labeling.areas), ("scores", labeling.scores)):
        line[key] = {c: round(values[c], 4) if c in values else None for c in recipe.classes}
    if labeling.similarity is not None:
        line["similarity"] = round(labeling.similarity, 4)
    line |= {"words": dict(recipe.classes), "hash": f"{difference_hash(image):016x}", "sha256": hashes}
    line |= {"recipe": recipe.digest, "versions": versions(), "rejected": labeling.rejected}
    return line


def _palette_image(labels, recipe):
    """Make a palette image of class numbers, which any viewer shows in color."""
    found = Image.frombytes("P", labels.shape[::-1], labels.tobytes())
    colors = [(0, 0, 0), *(tuple(round(255 * x) for x in class_color(n, i)) for i, n in enumerate(recipe.classes))]
    colors += [(0, 0, 0)] * (IGNORE - len(colors)) + [(255, 255, 255)]
    found.putpalette([value for color in colors for value in color])
    return found


def difference_hash(image: Image.Image) -> int:
    """Hash an image to 64 bits: whether each of 9 x 8 gray blocks is brighter than its left neighbor.

    Hashes of similar images differ in a few bits.
    """
    gray = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), int)
    return int.from_bytes(np.packbits(gray[:, 1:] > gray[:, :-1]).tobytes())


def _wrong_file(dataset, metadata, kind, name):
    """Tell what is wrong with one file of a record, or None."""
    path = dataset.folder / name
    if not path.resolve().is_relative_to(dataset.folder.resolve()):
        return f"{name} lies outside the data set"
    if not path.exists():
        return f"{name} is missing"
    try:
        with Image.open(path) as opened:
            opened.load()
            size, mode = opened.size, opened.mode
            values = np.asarray(opened) if kind != "image" else None
    except (OSError, SyntaxError):
        return f"{name} is cut short or no image"
    if kind != "image":
        with suppress(OSError), Image.open(dataset.folder / metadata["file_name"]) as image:
            if image.size != size:
                return f"{name} is {size[0]} x {size[1]}, its image {image.width} x {image.height}"
        if mode != "P" or not set(np.unique(values)) <= {*range(len(dataset.classes)), IGNORE}:
            return f"{name} has numbers of no class"
    if _sha256(path) != metadata["sha256"][kind]:
        return f"{name} was altered"
    return None


def _mask_names(recipe):
    return [""] if recipe.labels else list(recipe.classes)


def _column(name):
    """Name the column of metadata.jsonl with a mask's file; `datasets` makes an image of what ends in file_name."""
    return f"{name.replace(' ', '_')}_mask_file_name" if name else "mask_file_name"


def _sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_lines(path: Path) -> list[dict]:
    """Read a file of one JSON object per line."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def write_lines(path: Path, lines: Sequence[dict]) -> None:
    """Write a file of one JSON object per line, whole or not at all."""
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
