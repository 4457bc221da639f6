"""Photos that a recipe labels: where they lie, which they are to the last byte, and how the model looks at them."""

import hashlib
import re
import reprlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..storage import read_rgb

__all__ = ["Photos", "changed_photos", "check_photos", "find_photos", "read_photo", "wrong_photos"]

_ENDINGS = {".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
_CAMERAS = {".arw", ".cr2", ".cr3", ".dng", ".heic", ".heif", ".nef", ".orf", ".raf", ".rw2"}  # Pillow reads none
_MAX_PHOTOS, _MAX_TILES, _MAX_LOOKS, _MAX_TIMESTEPS, _MAX_SAID = 50_000, 64, 256, 1000, 10
_SHORT = reprlib.Repr()
_SHORT.maxstring = 200


@dataclass(frozen=True)
class Photos:
    """Photos that are labeled in the place of generated images. Record i is photo i, in the order of their names.

    Attributes
    ----------
    where : str
        A photo, a folder of photos, or a pattern such as ``holiday/**/*.jpg``, which finds those in folders below, too.
    files : dict of str to str, optional
        SHA-256 of each photo by its name below the folder. Default: those that are there when the recipe is made.
    tiles : int
        Overlapping pieces along the longer side of a photo, each as large as the images that the model draws. 1: the
        model looks at the whole photo at once, made so small that it fits.
    looks : int
        How often the model looks at each photo, every time through other noise.
    agree : float
        Fraction of the looks, above 0.5 and up to 1, that must give a pixel the same label; others are ignored (255).
    timesteps : tuple of int
        Noise levels of each look, as `record_image` takes them.
    """

    where: str
    files: Mapping[str, str] | None = None
    tiles: int = 1
    looks: int = 1
    agree: float = 0.8
    timesteps: tuple[int, ...] = (500, 300, 100)

    def __post_init__(self):
        if isinstance(self.timesteps, list):  # as YAML has it
            object.__setattr__(self, "timesteps", tuple(self.timesteps))

    @cached_property
    def names(self) -> list[str]:
        """Names of the photos below the folder, in their order."""
        return sorted(self.files or {})


def wrong_photos(photos: Photos) -> Iterator[str]:
    """List what is wrong with settings of photos, one sentence each; whether the files are there is not looked at."""
    counts = (("tiles", _MAX_TILES), ("looks", _MAX_LOOKS))
    for name, most in counts:
        value = getattr(photos, name)
        if type(value) is not int or not 1 <= value <= most:
            yield f"photos: {name} is {_SHORT.repr(value)}: it is a whole number from 1 to {most}"
    if not isinstance(photos.where, str) or not photos.where.strip():
        yield f"photos: where is {_SHORT.repr(photos.where)}: name a photo, a folder, or a pattern such as photos/*.jpg"
    if type(photos.agree) not in (int, float) or not 0.5 < photos.agree <= 1:
        yield f"photos: agree is {_SHORT.repr(photos.agree)}: it is a fraction above 0.5 and up to 1"
    times = photos.timesteps
    if not isinstance(times, tuple) or not 0 < len(times) <= _MAX_TIMESTEPS or not all(_is_time(t) for t in times):
        yield f"photos: timesteps is {_SHORT.repr(times)}: it is a list of noise levels, such as [500, 300, 100]"
    if photos.files is not None and not _are_files(photos.files):
        known = f"1 to {_MAX_PHOTOS} names below the folder, each with its SHA-256"
        yield f"photos: files is {_SHORT.repr(photos.files)}: leave it out, or give {known}"


def _is_time(value):
    return type(value) is int and value >= 0


def _are_files(files):
    if not isinstance(files, Mapping) or not 0 < len(files) <= _MAX_PHOTOS:
        return False
    paths = [PurePosixPath(name) for name in files if isinstance(name, str) and name]
    inside = [path for path in paths if not path.is_absolute() and ".." not in path.parts]
    sums = [value for value in files.values() if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value)]
    return len(inside) == len(sums) == len(files)


def find_photos(where: str) -> dict[str, str]:
    """Find photos: the SHA-256 of each by its name below their folder, in the order of names.

    Parameters
    ----------
    where : str
        As in `Photos`.

    Raises
    ------
    FileNotFoundError
        If there is no such file or folder, or no photo in it.
    ValueError
        If a file there is of a kind that cameras write and Pillow does not read, or there are too many.
    """
    folder, pattern = _folder(where)
    if not folder.is_dir():
        raise FileNotFoundError(f"photos: no {where}: name a photo, a folder, or a pattern such as photos/*.jpg")
    found = sorted(path for path in folder.glob(pattern) if path.is_file() and not path.name.startswith("."))
    if other := [path.name for path in found if path.suffix.lower() in _CAMERAS]:
        right = f"convert them to JPEG or PNG, or choose others by {folder}/*.jpg"
        raise ValueError(f"photos: Pillow cannot read {_some(other)}: {right}")
    paths = [path for path in found if path.suffix.lower() in _ENDINGS]
    if not paths:
        kinds = ", ".join(sorted(_ENDINGS))
        raise FileNotFoundError(f"photos: {where} has no photo ({kinds}); {folder}/**/* looks in folders below, too")
    if len(paths) > _MAX_PHOTOS:
        raise ValueError(f"photos: {where} has {len(paths)} photos, at most {_MAX_PHOTOS}: make several data sets")
    bar = tqdm(paths, desc="photos", unit="photo", delay=2, leave=False)
    return {path.relative_to(folder).as_posix(): _digest(path) for path in bar}


def _folder(where):
    """Split where photos lie into a folder and a pattern below it."""
    path = Path(where).expanduser()
    if path.is_dir():
        return path, "*"
    parts = path.parts
    fixed = next((k for k, part in enumerate(parts) if re.search(r"[*?[]", part)), None)
    if path.is_file() or fixed is None:
        return (path.parent, re.sub(r"([*?[])", r"[\1]", path.name)) if path.is_file() else (path, "*")
    return Path(*parts[:fixed]), str(Path(*parts[fixed:]))


def _digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_photo(photos: Photos, index: int) -> np.ndarray:
    """Read a photo, turned as its camera says: uint8 (row, column, rgb).

    Parameters
    ----------
    photos : Photos
        With their files.
    index : int
        Which of them.

    Raises
    ------
    FileNotFoundError
        If it is not there any more.
    ValueError
        If it is another one than when the recipe was made, or cannot be read (see `storage.read_rgb`).
    """
    name = photos.names[index]
    path = _folder(photos.where)[0] / name
    if not path.is_file():
        raise FileNotFoundError(f"photo {name} is not in {path.parent} any more")
    if _digest(path) != photos.files[name]:
        raise ValueError(f"photo {name} was changed since this recipe was made: {path}")
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # as a data set's images are read
        return read_rgb(path)


def check_photos(photos: Photos, *, whole: bool = True) -> None:
    """Read every photo once; ValueError that names those which cannot be labeled, and says why.

    Parameters
    ----------
    photos : Photos
        With their files.
    whole : bool
        False: read their headers alone, which tells at once what is there and no image.
    """
    problems = []
    for index in tqdm(range(len(photos.names)), desc="reading photos", unit="photo", delay=2, leave=False):
        try:
            read_photo(photos, index) if whole else _open_photo(photos, index)
        except (OSError, ValueError) as error:
            problems.append(str(error))
    if problems:
        said = "".join(f"\n- {problem}" for problem in problems[:_MAX_SAID])
        more = f"\n- and {len(problems) - _MAX_SAID} more" if len(problems) > _MAX_SAID else ""
        count = f"{len(problems)} of {len(photos.names)} photos"
        raise ValueError(f"{count} cannot be labeled, mend them or move them away:{said}{more}")


def _open_photo(photos, index):
    """Refuse a photo by its header; its pixels are not read."""
    name = photos.names[index]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            Image.open(_folder(photos.where)[0] / name).close()
    except Exception as error:  # Pillow's readers raise many kinds
        raise ValueError(f"photo {name} cannot be read: {error}") from error


def changed_photos(before: Photos | None, now: Photos | None) -> list[str]:
    """List how photos differ from earlier ones, up to three phrases: what was changed, what is new, what is missing."""
    old, new = ((photos.files or {}) if photos else {} for photos in (before, now))
    found = {
        "changed": [name for name in old if name in new and old[name] != new[name]],
        "new": [name for name in new if name not in old],
        "missing": [name for name in old if name not in new],
    }
    return [f"{kind}: {_some(names)}" for kind, names in found.items() if names]


def _some(names):
    """Name the first of several files, and count the others."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
