"""Find images that two folders share, or that one folder has twice: near duplicates, however turned and encoded.

find_leaks("fires/images/train", "fires/images/val")       # [] where nothing crosses
find_leaks("fires")                                        # duplicates inside
"""

import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..storage import read_rgb
from .thumbnails import TURNS, WITHIN, near_pairs, thumbnail

__all__ = ["Leak", "find_images", "find_leaks", "read_thumbnails"]

# folders of label images
_LABELS = {"annotations", "instances", "labels", "masks", "segmentationclass", "segmentationobject"}
_BESIDE = {"rejected", "contact_sheet.png"}  # what a data set keeps beside its images


class Leak(NamedTuple):
    """Two files that show the same."""

    first: Path  # in the first folder
    second: Path  # in the second folder, or later in the same one
    distance: float  # root of the mean squared difference of their thumbnails, gray levels 0..255
    turn: str  # what turns the second into the first: one of `TURNS`, "" where nothing does
    same: bool  # whether all pixels are equal as they are


def find_leaks(a: str | Path, b: str | Path | None = None, *, within: float = WITHIN) -> list[Leak]:
    """Find the images of a folder that another has as well, up to flips, quarter turns, size, encoding and small crops.

    Each image of `b` is listed once, with the image of `a` that is nearest: without those listed, nothing is shared.
    Changed colors and brightness, larger crops and other angles are not found.

    Parameters
    ----------
    a, b : str or Path
        Folders of images, and of folders of images, in any layout and of any type that Pillow reads. Left out are
        folders of label images (masks, labels, annotations, SegmentationClass, ...), and a data set's rejected images
        and contact sheet. Without `b`, images of `a` that come earlier, in the order of their paths, are compared.
    within : float
        Largest distance of near duplicates, gray levels 0..255; 0 finds equal thumbnails alone. The default, on 300
        scenes and 300 images of `tiny` on which it was not chosen, takes no image for another (0 to 1.2% of each), and
        finds 99.7% or more of each kind of turned, resized and JPEG copies, 96% and 100% of those cropped by 1/64 a
        side, 29% and 64% by 2/64 (`experiments.studies.near_duplicates`).

    Raises
    ------
    ValueError
        If a folder has no images, or `within` is not a number from 0 on.
    FileNotFoundError
        If there is no such folder.

    Warns
    -----
    UserWarning
        If files have the name of an image and cannot be read: they are named, and left out.
    """
    if not isinstance(within, int | float) or isinstance(within, bool) or not within >= 0:
        raise ValueError(
            f"within={within!r}: the largest distance of near duplicates, gray levels from 0 on, such as 6"
        )
    paths = [find_images(folder) for folder in ([a] if b is None else [a, b])]
    read = [read_thumbnails(files) for files in paths]
    files, thumbnails, digests = zip(*read, strict=True)
    pixels, places = _numbers(digests), _numbers([map(os.path.abspath, own) for own in files])
    best: dict[int, tuple] = {}
    for pairs in near_pairs(*thumbnails, within=within):
        same = pixels[0][pairs.first] == pixels[-1][pairs.second]
        order = np.lexsort((pairs.distance, ~same, pairs.second))  # the best of each second comes first
        order = order[places[0][pairs.first[order]] != places[-1][pairs.second[order]]]  # no file is its own copy
        for k in order[np.unique(pairs.second[order], return_index=True)[1]]:
            found = not same[k], float(pairs.distance[k]), int(pairs.turn[k]), int(pairs.first[k])
            best[pairs.second[k]] = min(best.get(pairs.second[k], found), found)
    return [
        Leak(files[0][i], files[-1][j], distance, TURNS[turn], not other)
        for j, (other, distance, turn, i) in sorted(best.items())
    ]


def _numbers(sets):
    """Give equal things the same number: an array for each set."""
    known: dict = {}
    return [np.array([known.setdefault(one, len(known)) for one in own]) for own in sets]


def find_images(folder: str | Path) -> list[Path]:
    """Find the images in a folder and in those below it, in the order of their paths.

    Label images are left out, as in `find_leaks`; so are files and folders whose names begin with a dot. ValueError
    where there are none, FileNotFoundError where there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: name one of images" + (", not a file" if folder.exists() else ""))
    found = [path for path in sorted(_walk(folder)) if _is_image(path, path.relative_to(folder).parts)]
    if not found:
        raise ValueError(f"no images in {folder}, folders of masks and labels left out: name the folder they are in")
    return found


def _walk(folder) -> Iterator[Path]:
    """Yield all files below a folder, in linked folders too, unless they lead back to one that they are in."""
    for here, folders, files in os.walk(folder, followlinks=True):
        above = {os.path.realpath(one) for one in (here, *Path(here).parents)}
        folders[:] = [name for name in folders if os.path.realpath(Path(here, name)) not in above]
        yield from (Path(here, name) for name in files)


def _is_image(path, parts):
    hidden = any(part.startswith(".") for part in parts)
    beside = {part.lower() for part in parts[:-1]} & (_LABELS | _BESIDE) or parts[-1] in _BESIDE
    ending = Image.registered_extensions().get(path.suffix.lower())
    return not hidden and not beside and ending in Image.OPEN and path.is_file()


def read_thumbnails(files: list[Path]) -> tuple[list[Path], np.ndarray, list[bytes]]:
    """Read images: those that can be read, their thumbnails (image, row, column, rgb), and hashes of all pixels.

    UserWarning, which names them, where some cannot; ValueError where none can.
    """
    found = list(_read_all(files))
    bad = [f"{file}: {said}" for file, said in zip(files, found, strict=True) if isinstance(said, str)]
    whole = [(file, *read) for file, read in zip(files, found, strict=True) if not isinstance(read, str)]
    if bad:
        said = "\n  ".join([f"{len(bad)} of {len(files)} images cannot be read, and were left out:", *bad[:10]])
        if not whole:
            raise ValueError(said)
        warnings.warn(said + ("\n  ..." if len(bad) > 10 else ""), stacklevel=3)
    names, thumbnails, digests = zip(*whole, strict=True)
    return list(names), np.stack(thumbnails), list(digests)


def _read_all(files) -> Iterator:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        yield from tqdm(threads.map(_read, files), "reading", len(files), delay=1, leave=False, unit="image")


def _read(file):
    """Read the thumbnail of an image and the hash of its pixels; what is wrong, as a text, where that fails."""
    try:
        with Image.open(file) as image:
            if image.has_transparency_data:
                white = Image.new("RGBA", image.size, "white")
                pixels = np.asarray(Image.alpha_composite(white, image.convert("RGBA")).convert("RGB"))
            else:
                pixels = read_rgb(image)
    except Exception as error:  # Pillow's readers raise many kinds
        return str(error) or type(error).__name__
    return thumbnail(Image.fromarray(pixels)), sha256(repr(pixels.shape).encode() + pixels.tobytes()).digest()
