"""Read and check the files of a labeled data set, and write a record.

A folder is a Hugging Face `imagefolder`: images/, masks/ (palette PNG of class numbers), instances/ (16-bit PNG of the
numbers of single things, where the recipe wants them), metadata.jsonl, README.md and contact_sheet.png. Beside them lie
recipe.yaml, and in rejected.jsonl and rejected/ what the filters refused and why; SHA256SUMS is for
`sha256sum --check` and `verify_dataset`.
"""

import hashlib
import json
import os
import re
import shlex
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..masks import IGNORE
from ..plots.styling import class_color
from ..storage import versions, write_text
from .keeping import ENOUGH, Selection
from .labeling import Labeling
from .recipe import Recipe
from .rules import mask_name

__all__ = [
    "SHARDS", "SUMS_FILE", "Dataset", "Pair", "RecordFile", "as_lines", "difference_hash", "file_inside", "open_image",
    "read_lines", "record_files", "record_folders", "sha256", "verify_dataset", "write_record", "wrong_line",
]  # fmt: skip

_BAD_FILE = "bad.json"  # file names of images that people marked as bad
SHARDS = ".parts"  # folder of the finished shards, until all of them are there
SUMS_FILE = "SHA256SUMS"  # of files that no line of metadata.jsonl has the hash of, as `sha256sum --check` reads it
_MAX_SHARED = 10_000  # texts of a file that are held once: its first ones, since file names and hashes never return
_KINDS = {"index": int, "prompt": str, "seed": int, "areas": dict, "scores": dict}  # in every line of both files
_ACCEPTED = _KINDS | {"file_name": str, "words": dict, "hash": str, "sha256": dict, "recipe": str}
_REJECTED = _KINDS | {"file": str, "reason": str}
_PLAIN = re.compile(r"[\w-]+/[\w-]+\.\w+")  # names as records have them: they lead outside by links alone
_INSTANCES = "image/instances"  # key of a record's file of single things; no class has a slash in its name


class RecordFile(NamedTuple):
    """A file of a record."""

    key: str  # of its hash, in the line's "sha256"
    column: str  # of metadata.jsonl, where its name is
    name: str  # within the data set's folder


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
            hint = _unfinished(self.folder) if begun else "it holds no data set"
            raise FileNotFoundError(f"{self.folder} has no metadata.jsonl: {hint}")
        self.recipe = Recipe.load(self.folder / "recipe.yaml")
        self.records = read_lines(self.folder / "metadata.jsonl", _ACCEPTED)
        self.rejected = read_lines(self.folder / "rejected.jsonl", _REJECTED)
        self.classes = ["background", *self.recipe.classes]
        self.bad = _read_marks(self.folder)

    def mark(self, file_name: str, bad: bool = True) -> None:
        """Mark an image as bad, or as good again, in bad.json. KeyError where there is no such image."""
        if file_name not in {metadata["file_name"] for metadata in self.records}:
            raise KeyError(f"no image {file_name} in {self.folder}")
        self.bad = self.bad | {file_name} if bad else self.bad - {file_name}
        write_text(self.folder / _BAD_FILE, json.dumps(sorted(self.bad), indent=1) + "\n")

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int | slice) -> Pair | list[Pair]:
        """Read a pair, or a list of pairs; ValueError for a file outside the folder, or no whole image."""
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        image, labels = open_image(self.folder, self.records[i]["file_name"]), self.numbers(i)
        if isinstance(labels, dict):
            labels = {name: mask == 1 for name, mask in labels.items()}
        return Pair(image.convert("RGB"), labels, self.records[i])

    def numbers(self, i: int) -> np.ndarray | dict[str, np.ndarray]:
        """Read the masks of a pair as their files have them, uint8: class numbers, or 0 and 1 for each class; or 255.

        ValueError as for a whole pair.
        """
        metadata = self.records[i]
        files = [file for file in record_files(self.recipe, metadata["index"])[1:] if file.key != _INSTANCES]
        masks = [np.array(open_image(self.folder, metadata.get(file.column))) for file in files]
        return masks[0] if self.recipe.labels else dict(zip(self.recipe.classes, masks, strict=True))

    def instances(self, i: int) -> np.ndarray | None:
        """Read the numbers of the single things of a pair: uint16 (row, column), 0 where none is.

        None where the recipe wants no instances. ValueError as for a pair.
        """
        if self.recipe.instances is None:
            return None
        metadata = self.records[i]
        file = next(file for file in record_files(self.recipe, metadata["index"]) if file.key == _INSTANCES)
        return np.array(open_image(self.folder, metadata.get(file.column)), np.uint16)

    def __repr__(self) -> str:
        classes = ", ".join(self.classes[1:])
        return f"<Dataset {self.folder}: {len(self)} pairs of {classes}; {len(self.rejected)} rejected>"


def verify_dataset(folder: str | Path) -> list[str]:
    """List everything that is wrong with a data set's files, one sentence each; nothing where it is whole.

    Images and masks are compared with the hashes of their lines; lines with the recipe, and with what their images and
    masks say; what nothing else tells (scores, rejected images) with SHA256SUMS. README.md and contact_sheet.png are
    for people, who may change them.
    """
    folder, problems = Path(folder), []
    try:
        recipe = Recipe.load(folder / "recipe.yaml")
    except (OSError, ValueError) as error:
        return [str(error)]
    if (folder / SHARDS).is_dir() and not (folder / "metadata.jsonl").exists():
        return [_unfinished(folder)]
    records, rejected = (
        _parse(folder / f"{name}.jsonl", kinds, problems)
        for name, kinds in (("metadata", _ACCEPTED), ("rejected", _REJECTED))
    )
    expected = set()
    for line in records:
        expected |= {file.name for file in record_files(recipe, line["index"])}
        problems += _wrong_record(folder, recipe, line)
    for line in rejected:
        problems += [*wrong_line(recipe, line), *_attempt(open_image, folder, line["file"])]
        expected.add(line["file"])
    paths = [path for name in ("images", "masks", "instances", "rejected") for path in folder.glob(f"{name}/*")]
    for name in sorted({path.relative_to(folder).as_posix() for path in paths} - expected):
        lines = "rejected" if name.startswith("rejected/") else "metadata"
        problems.append(f"{name} is in no line of {lines}.jsonl")
    problems += _wrong_run(recipe, sorted([*records, *rejected], key=lambda line: line["index"]))
    problems += _attempt(_read_marks, folder, {line["file_name"] for line in records})
    problems += _wrong_sums(folder, [line["file"] for line in rejected])
    return list(dict.fromkeys(problems))


def _wrong_sums(folder, rejected):
    """List files that were altered since SHA256SUMS was written, and what that does not tell."""
    path, names = folder / SUMS_FILE, ["recipe.yaml", "metadata.jsonl", "rejected.jsonl", *rejected]
    lines = path.read_text("utf-8", "replace").split("\n")[:-1] if path.is_file() else []
    for line in lines:
        yield from _attempt(_check_sum, folder, line)
    if lacking := [name for name in names if name not in {line.partition("  ")[2] for line in lines}]:
        said = f"has no line of {lacking[0]}" if path.is_file() else "is missing, as in data sets of early versions"
        files = " ".join(names[:3] + ["rejected/*"] * bool(rejected))
        typed = f"(cd {shlex.quote(str(folder))} && sha256sum {files} > {SUMS_FILE})"
        yield f"{SUMS_FILE} {said}: take it from a copy or, if you trust these files as they are, type {typed}"


def _unfinished(folder):
    return f"it is not finished: `attnlab dataset make {shlex.quote(str(folder))}` goes on, or generate_dataset"


def record_files(recipe: Recipe, index: int) -> list[RecordFile]:
    """List the files of a record, its image first, then its label image, and instances, or the mask of each class."""
    found = [RecordFile("image", "file_name", f"images/{index:06d}.png")]
    if recipe.labels:
        found.append(RecordFile("mask", "mask_file_name", f"masks/{index:06d}.png"))
        if recipe.instances is not None:
            found.append(RecordFile(_INSTANCES, "instances_file_name", f"instances/{index:06d}.png"))
        return found
    for kind in recipe.classes:
        key = "image/mask" if kind == "image" else kind  # "image" is taken, and no class has a slash in its name
        name = mask_name(kind)  # `datasets` makes an image of a column whose name ends in file_name
        found.append(RecordFile(key, f"{name}_mask_file_name", f"masks/{index:06d}_{name}.png"))
    return found


def record_folders(recipe: Recipe) -> list[str]:
    """List the folders in which the files of records are."""
    return list(dict.fromkeys(Path(file.name).parent.name for file in record_files(recipe, 0)))


def write_record(work: Path, recipe: Recipe, index: int, image: Image.Image, labeling: Labeling) -> dict:
    """Write an image and its masks to a folder; return its line of records.jsonl."""
    files = record_files(recipe, index)
    line = {"file_name": files[0].name, "index": index}
    line |= _made_of(recipe, index)
    nothing = np.zeros(labeling.labels.shape, bool)
    masks = [labeling.masks.get(kind, nothing).astype(np.uint8) for kind in recipe.classes]
    masks = [labeling.labels] if recipe.labels else masks
    shown = [_palette_image(values, recipe) for values in masks]
    if recipe.instances is not None:
        shown.append(Image.fromarray(labeling.instances))
    hashes = {}
    for file, drawn in zip(files, [image, *shown], strict=True):
        drawn.save(work / file.name)
        line[file.column], hashes[file.key] = file.name, sha256((work / file.name).read_bytes())
    for key, values in (("areas", labeling.areas), ("scores", labeling.scores)):
        line[key] = {c: round(values[c], 4) if c in values else None for c in recipe.classes}
    if labeling.similarity is not None:
        line["similarity"] = round(labeling.similarity, 4)
    line |= {"words": dict(recipe.classes), "hash": f"{difference_hash(image):016x}", "sha256": hashes}
    if recipe.kept is not None:  # lines of other recipes stay as they were
        line["negative"] = not any(values.any() for values in masks)
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


def open_image(folder: str | Path, name: str) -> Image.Image:
    """Read an image of a data set; ValueError or FileNotFoundError, with its name, where there is no whole one."""
    path = file_inside(folder, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.load()
                return image
    except Exception as error:  # Pillow's readers raise many kinds
        raise ValueError(f"{name} is cut short or no image: {error}") from error


def wrong_line(recipe: Recipe, line: dict) -> list[str]:
    """List what a line of metadata.jsonl or rejected.jsonl says otherwise than the recipe, one sentence each."""
    index = line["index"]
    if line.get("recipe", recipe.digest) != recipe.digest:
        return [f"records were made by recipe {line['recipe']}, recipe.yaml is {recipe.digest}"]
    if not 0 <= index < len(recipe):
        return [f"a line has index {index}: the recipe makes {len(recipe)} records"]
    right = _made_of(recipe, index) | {"words": dict(recipe.classes)}
    wrong = [key for key, value in right.items() if line.get(key, value) != value]
    return [f"record {index}: {key} is {line[key]!r}, by recipe.yaml {right[key]!r}" for key in wrong]


def _made_of(recipe, index):
    """Return what a record was made of, for its line."""
    photo = {"photo": recipe.photos.names[index]} if recipe.photos else {}
    return {"prompt": recipe.prompt(index), "seed": recipe.seed_of(index)} | photo


def file_inside(folder: str | Path, name: str) -> Path:
    """Find a file of a data set by its name; ValueError where that leads outside, FileNotFoundError where nowhere."""
    try:
        path = os.path.join(folder, name)
        links = map(os.path.islink, (os.path.dirname(path), path))
        if os.name == "posix" and _PLAIN.fullmatch(name) and os.path.isfile(path) and not any(links):
            return Path(path)  # without links it lies there, and `resolve` is slow
        path = Path(path).resolve()
        is_inside, is_file = path.is_relative_to(Path(folder).resolve()), path.is_file()
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{name!r} is no name of a file: {error}") from None
    if not is_inside:
        raise ValueError(f"{name} lies outside the data set")
    if not is_file:
        raise FileNotFoundError(f"{name} is missing")
    return path


def _wrong_run(recipe, lines):
    """List where records, in the order of their index, are others than the recipe makes and keeps."""
    if [line["index"] for line in lines] != list(range(len(lines))) or (not recipe.kept and len(lines) < len(recipe)):
        yield f"metadata.jsonl and rejected.jsonl name {len(lines)} records, the recipe {len(recipe)}"
    selection = Selection(recipe)
    for line in lines if recipe.kept else []:
        if selection.is_enough:
            yield f"record {line['index']} is there, though the recipe wants none after those before it"
            return
        is_kept = "reason" not in line
        if is_kept != selection.needs(line) and (is_kept or line["reason"] == ENOUGH):
            done, wanted = ("kept", "no more") if is_kept else ("rejected", "more")
            yield f"record {line['index']} is {done}, though the recipe wants {wanted} of its classes"
        if is_kept:
            selection.count(line)
    if selection.lacking and len(lines) < len(recipe):
        few = ", ".join(f"{n} of {name}" for name, n in selection.lacking.items())
        yield f"{few} are lacking, though {len(lines)} images were made and the recipe allows {len(recipe)}"


def _wrong_record(folder, recipe, line):
    """List what is wrong with a line of metadata.jsonl and its files, one sentence each."""
    problems, opened, files = wrong_line(recipe, line), [], record_files(recipe, line["index"])
    for file in files:
        name = line.get(file.column)
        try:
            opened.append(open_image(folder, name))
            if name != file.name:
                problems.append(f"{name} stands for {file.name}")
            elif sha256(Path(folder, name).read_bytes()) != line["sha256"].get(file.key):
                problems.append(f"{name} was altered")
        except (OSError, ValueError) as error:
            problems.append(str(error))
    if len(opened) < len(files):
        return problems
    image, *masks = opened
    for file, mask in zip(files[1:], masks, strict=True):
        if mask.size != image.size:
            problems.append(f"{file.name} is {mask.width} x {mask.height}, its image {image.width} x {image.height}")
        elif file.key == _INSTANCES:
            problems += _wrong_instances(file.name, *map(np.asarray, (masks[0], mask)))
        elif mask.mode != "P" or not set(np.unique(mask)) <= {*range(len(recipe.classes) + 1), IGNORE}:
            problems.append(f"{file.name} has numbers of no class")
    return problems or [*_wrong_numbers(recipe, line, image, [np.asarray(mask) for mask in masks])]


def _wrong_numbers(recipe, line, image, masks):
    """List what a line says otherwise than its image and masks."""
    if line["hash"] != f"{difference_hash(image):016x}":
        yield f"{line['file_name']}: hash is {line['hash']!r}, which is not its image's"
    negative = None if recipe.kept is None else not any(mask.any() for mask in masks)
    if line.get("negative") is not negative:
        yield f"{line['file_name']}: negative is {line.get('negative')!r}, by its masks {negative!r}"
    for number, name in enumerate(recipe.classes, 1):
        if recipe.labels:
            most = least = (masks[0] == number).mean()
        else:  # a pixel in several masks counts for one of them alone
            own, covered = masks[number - 1] == 1, np.sum(masks, axis=0)
            voted = recipe.band or recipe.photos  # pixels of a mask may be ignored in the labels that areas are of
            most, least = own.mean(), 0 if voted else (own & (covered == 1)).mean()
        area = line["areas"].get(name) or 0
        if not isinstance(area, int | float) or not round(least, 4) <= area <= round(most, 4):
            yield f"{line['file_name']}: the area of {name} is {area!r}, by its mask {most:.4f}"


def _wrong_instances(name, labels, instances):
    """List what is wrong with the numbers of single things: sizes are right."""
    numbers = np.unique(instances[instances > 0])
    if instances.dtype != np.uint16 or (numbers != np.arange(1, len(numbers) + 1)).any():
        return [f"{name} numbers its things otherwise than 1, 2, ... in 16 bits"]
    pairs = np.unique(np.stack([instances[instances > 0], labels[instances > 0]]), axis=1)  # of thing and class
    if pairs.shape[1] > len(numbers) or np.isin(pairs[1], (0, IGNORE)).any():
        return [f"{name} has a thing of several classes, or of none"]
    return []


def _check_sum(folder, line):
    """Refuse a file whose hash is not that of its line in SHA256SUMS."""
    digest, _, name = line.partition("  ")
    if sha256(file_inside(folder, name).read_bytes()) != digest:
        raise ValueError(f"{name} was altered")


def _attempt(function, *given):
    """List what an error of a function says."""
    try:
        function(*given)
    except (OSError, ValueError) as error:
        return [str(error)]
    return []


def _read_marks(folder, known=None):
    """Read which images are marked as bad; ValueError for what is no list of names, or not among the known ones."""
    path = folder / _BAD_FILE
    try:
        found = json.loads(path.read_text("utf-8")) if path.exists() else []
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{path} is no list of file names: correct or delete it")
    if unknown := sorted(set(found) - known) if known is not None else []:
        raise ValueError(f"{_BAD_FILE} names {unknown[0]!r}, which is no image of metadata.jsonl")
    return set(found)


def sha256(data: bytes) -> str:
    """Return the SHA-256 of some bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def read_lines(path: Path, kinds: dict[str, type] | None = None) -> list[dict]:
    """Read a file of one JSON object per line, with fields of these kinds; ValueError where a line is none."""
    problems: list[str] = []
    found = _parse(path, kinds or {}, problems)
    if problems:
        raise ValueError(problems[0])
    return found


def _parse(path, kinds, problems):
    """Read the lines of a file that are right; add a sentence to `problems` for each other one."""
    found, decoder = [], json.JSONDecoder(object_pairs_hook=_sharing({}))
    try:
        with open(path, "rb") as file:  # which ends a line at "\n" alone; a text file would cut a prompt elsewhere, too
            for number, text in enumerate(file, 1):
                try:
                    line = decoder.decode(text.decode("utf-8"))
                except (ValueError, RecursionError) as error:
                    problems.append(f"{path.name}, line {number}: it is no JSON: {error}")
                    continue
                if isinstance(line, dict) and all(isinstance(line.get(key), kind) for key, kind in kinds.items()):
                    found.append(line)
                else:
                    problems.append(f"{path.name}, line {number}: it is no record with {', '.join(kinds)}")
    except OSError as error:
        problems.append(f"{path.name} cannot be read: {error}")
    return found


def _sharing(known):
    """Return what makes a dict of the pairs of a JSON object: equal texts are one, or most memory would be names."""

    def share(text):
        return known.setdefault(text, text) if len(known) < _MAX_SHARED else known.get(text, text)

    return lambda pairs: {share(key): share(value) if isinstance(value, str) else value for key, value in pairs}


def as_lines(lines: Iterable[dict]) -> str:
    """Return one JSON object per line."""
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
