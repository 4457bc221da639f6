"""Read folders of images and masks, in any layout, as pairs, and cut patches from them.

    pairs = PairFolder("LoveDA/Train", LOVEDA)             # or ISAID, OPEN_EARTH_MAP
    pairs = PairFolder("mine", Layout(("sky", "roof"), images="photos/*.jpg", masks="masks/{name}.png"))
    image, labels = pairs[0]                               # uint8 (row, column, rgb), uint8 (row, column)
    images, labels = patches(pairs, 128)                   # (patch, ...)

Labels are 0, 1, ... in the order of the classes, and 255 where a pixel is ignored.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from numbers import Integral, Real
from os.path import relpath
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps
from tqdm import tqdm

from ..masks import IGNORE
from ..metrics import check_counts
from ..storage import read_rgb

__all__ = ["ISAID", "LOVEDA", "OPEN_EARTH_MAP", "Layout", "PairFolder", "Pairs"]
__all__ += ["check_classes", "check_labels", "checked", "patches", "shrink"]

Pairs = tuple[np.ndarray, np.ndarray]
"""Images uint8 (image, row, column, rgb) and their labels uint8 (image, row, column)."""


@dataclass(frozen=True)
class Layout:
    """Where images and masks lie below a folder, and what the values of masks mean.

    A mask's path may name {name}, that of its image without its ending, and {parent}, the folder above the image's own.
    Values are numbers, of an index or palette mask, or colors (r, g, b).
    """

    classes: tuple[str, ...]  # names, in the order of their labels
    images: str = "images/*"  # glob pattern
    masks: str = "masks/{name}.png"
    values: Mapping | None = None  # class of each value; None: 0, 1, ... in the order of the classes
    ignore: tuple | None = None  # values of pixels that are ignored; None: the number 255, if no class has it


_LOVEDA = ("background", "building", "road", "water", "barren", "forest", "agriculture")
LOVEDA = Layout(_LOVEDA, "*/images_png/*.png", "{parent}/masks_png/{name}.png", dict(enumerate(_LOVEDA, 1)), (0,))
"""LoveDA (Wang et al., NeurIPS Datasets 2021), Train or Val, in Rural and Urban: index masks, 1 to 7; 0 has no data."""

_EARTH_MAP = ("bareland", "rangeland", "developed space", "road", "tree", "water", "agriculture land", "building")
OPEN_EARTH_MAP = Layout(
    _EARTH_MAP, "*/images/*.tif", "{parent}/labels/{name}.tif", dict(enumerate(_EARTH_MAP, 1)), (0,)
)
"""OpenEarthMap (Xia et al., WACV 2023), one folder per region: index masks, 1 to 8; 0 is unlabeled."""

_ISAID = {
    "background": (0, 0, 0), "ship": (0, 0, 63), "storage tank": (0, 63, 63), "baseball diamond": (0, 63, 0),
    "tennis court": (0, 63, 127), "basketball court": (0, 63, 191), "ground track field": (0, 63, 255),
    "bridge": (0, 127, 63), "large vehicle": (0, 127, 127), "small vehicle": (0, 0, 127), "helicopter": (0, 0, 191),
    "swimming pool": (0, 0, 255), "roundabout": (0, 191, 127), "soccer ball field": (0, 127, 191),
    "plane": (0, 127, 255), "harbor": (0, 100, 155),
}  # fmt: skip
ISAID = Layout(
    tuple(_ISAID),
    images="images/*.png",
    masks="Semantic_masks/images/{name}_instance_color_RGB.png",
    values={color: name for name, color in _ISAID.items()},
    ignore=((255, 255, 255),),  # what patches are padded with; the masks themselves ignore nothing
)
"""iSAID (Waqas Zamir et al., CVPR Workshops 2019), train or val: color masks, background a class of its own."""


def checked(images: np.ndarray, labels: np.ndarray, num_classes: int) -> Pairs:
    """Return pairs as uint8 arrays; ValueError if they are none, or labels are not 0 to `num_classes` - 1, or 255."""
    images, labels = np.asarray(images), np.asarray(labels)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not len(images):
        raise ValueError(f"images are uint8 (image, row, column, rgb), not {images.dtype} {images.shape}")
    if labels.shape != images.shape[:3]:
        raise ValueError(f"labels are {labels.shape}, images {images.shape}: a label map has its image's size")
    check_labels(labels, num_classes)
    return images, labels.astype(np.uint8)


def check_classes(classes: Sequence[str]) -> None:
    """Raise ValueError if there are no names of classes, too many for labels below 255, or one of them twice."""
    if isinstance(classes, str):  # ("road") is one: its letters would be the classes
        raise ValueError(f"classes={classes!r} is one text: give a tuple of names, such as ({classes!r},)")
    if not 0 < len(classes) <= IGNORE or len({*classes}) < len(classes) or not all(isinstance(c, str) for c in classes):
        raise ValueError(f"classes are 1 to {IGNORE} different names, not {len(classes)}: {list(classes)[:5]}")


def check_labels(labels: np.ndarray, num_classes: int) -> None:
    """Raise ValueError if labels are not 0 to `num_classes` - 1, or 255."""
    if other := sorted(set(np.unique(labels).tolist()) - {*range(num_classes), IGNORE}):
        raise ValueError(f"labels are 0 to {num_classes - 1} or {IGNORE}, ignored; there is {other[:5]}")


class PairFolder(Sequence):
    """Images and masks below a folder, read when they are asked for: uint8 (row, column, rgb) and (row, column).

    Attributes
    ----------
    classes : tuple of str
        Names of the labels 0, 1, ...
    paths : list of (Path, Path)
        Image and mask of each pair.

    Raises
    ------
    FileNotFoundError
        If there is no such folder, no image in it, or images have no mask.
    ValueError
        If classes, values and ignored values of the layout do not fit each other. When a pair is read, if an image and
        a mask differ in size or in how EXIF data turns them, a value belongs to no class, or a file cannot be read
        without doubt: a transparent one, a mask that is a JPEG.
    """

    def __init__(self, folder: str | Path, layout: Layout):
        self.folder, self.layout, self.classes = Path(folder), layout, layout.classes
        _labels_of(layout)  # says what is wrong with it before anything is read
        if not self.folder.is_dir():
            raise FileNotFoundError(f"no folder {self.folder}")
        try:
            images = sorted(path for path in self.folder.glob(layout.images) if path.is_file())
        except (NotImplementedError, ValueError) as error:  # of an absolute or empty pattern
            raise ValueError(f"images={layout.images!r} is no pattern below {folder}: {error}") from error
        if not images:
            raise FileNotFoundError(f"{self.folder} has no {layout.images}: name the folder above, or another layout")
        above = [Path(relpath(path.parent.parent, self.folder)).as_posix() for path in images]
        try:
            masks = [layout.masks.format(name=path.stem, parent=p) for path, p in zip(images, above, strict=True)]
        except (LookupError, ValueError) as error:
            raise ValueError(f"masks={layout.masks!r} may name {{name}} and {{parent}}, and nothing else") from error
        self.paths = [(path, self.folder / mask) for path, mask in zip(images, masks, strict=True)]
        if alone := [str(image.relative_to(folder)) for image, mask in self.paths if not mask.is_file()]:
            shown = ", ".join(alone[:5]) + (", ..." if len(alone) > 5 else "")
            raise FileNotFoundError(f"{len(alone)} of {len(images)} images have no mask {layout.masks}: {shown}")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        path, mask_path = self.paths[i]
        image, labels = read_rgb(path), _read_labels(mask_path, self.layout)
        hint = "" if _turn(path) == _turn(mask_path) else "; EXIF data turns them differently: save both upright"
        if labels.shape != image.shape[:2]:
            own, other = (" x ".join(map(str, shape[:2])) for shape in (labels.shape, image.shape))
            raise ValueError(f"{mask_path} is {own}, its image {path.name} {other}{hint}")
        if hint and (_turn(path) < 5 or len(set(labels.shape)) == 1):  # no size shows that the mask stands upright
            raise ValueError(f"{path} and {mask_path.name}{hint}")
        return image, labels

    def __repr__(self) -> str:
        return f"<PairFolder {self.folder}: {len(self)} pairs of {', '.join(self.classes)}>"


def _labels_of(layout: Layout) -> tuple[dict, bool]:
    """Return the label of each value that masks of a layout hold, and whether these are colors; ValueError if none."""
    check_classes(layout.classes)
    names = dict(enumerate(layout.classes)) if layout.values is None else layout.values
    if unknown := [name for name in names.values() if name not in layout.classes]:
        raise ValueError(f"values name {unknown[:5]}, which are none of the classes {', '.join(layout.classes)}")
    labels, ignored = {value: layout.classes.index(name) for value, name in names.items()}, layout.ignore
    colored = any(isinstance(value, tuple) for value in labels)
    if ignored is None:
        ignored = () if colored or IGNORE in labels else (IGNORE,)
    if not isinstance(ignored, tuple) or not all(map(_is_color if colored else _is_number, (*labels, *ignored))):
        kind = "colors such as (0, 255, 0)" if colored else "whole numbers, or all of them colors (r, g, b)"
        raise ValueError(f"values and the tuple ignore hold {kind}; there is {[*labels][:5]}, and ignore={ignored!r}")
    if both := [value for value in ignored if value in labels]:
        raise ValueError(f"{both[:5]} are ignored, and the values of classes: leave them out of one of both")
    return labels | dict.fromkeys(ignored, IGNORE), colored


def _is_number(value) -> bool:
    return isinstance(value, Integral)


def _is_color(value) -> bool:
    return isinstance(value, tuple) and len(value) == 3 and all(_is_number(x) and 0 <= x <= 255 for x in value)


def _read_labels(path: Path, layout: Layout) -> np.ndarray:
    """Return the labels uint8 (row, column) of a mask file; ValueError if a value belongs to no class."""
    known, colored = _labels_of(layout)
    if colored:  # as numbers, which are found faster
        values = read_rgb(path) @ np.array([1 << 16, 1 << 8, 1], np.int32)
        known = {int.from_bytes(bytes(color)): label for color, label in known.items()}
    else:
        values = _read_numbers(path)
    found = np.unique(values)
    if other := [v for v in found.tolist() if v not in known]:  # 0.5 and NaN are in no class either
        shown = [tuple(v.to_bytes(3)) for v in other] if colored else other
        raise ValueError(f"{path} has {shown[:5]}, the values of no class: add them to the layout's values or ignore")
    labels = np.array([known[v] for v in found.tolist()], np.uint8)
    return labels[np.searchsorted(found, values)]


def _read_numbers(path: Path) -> np.ndarray:
    """Return the numbers (row, column) that a mask file holds, those of a palette as they are."""
    try:
        with Image.open(path) as picture:
            lossy, values = picture.format in ("JPEG", "MPO"), np.asarray(ImageOps.exif_transpose(picture))
    except Exception as error:  # Pillow has many kinds for damaged files
        raise ValueError(f"{path} cannot be read as a mask: {error}") from error
    if lossy:
        raise ValueError(f"{path} is a JPEG, which changes the numbers of classes: masks are PNG or TIFF")
    if values.ndim == 3 and values.shape[2] == 2 and (values[..., 1] == 255).all():  # "LA", "PA", all of it opaque
        values = values[..., 0]
    if values.ndim != 2:
        raise ValueError(f"{path} has {values.shape[-1]} channels: give the layout's values as colors (r, g, b)")
    return values


def _turn(path: Path) -> int:
    """Return how an image file says that it is to be turned, EXIF's 2 to 8; 1 is not at all."""
    with Image.open(path) as picture:
        turn = picture.getexif().get(ExifTags.Base.Orientation)
    return turn if turn in range(2, 9) else 1


def shrink(images: np.ndarray, labels: np.ndarray, factor: int) -> Pairs:
    """Downsample pairs: each square of `factor` x `factor` pixels becomes one pixel.

    Parameters
    ----------
    images, labels : array of uint8
        As `patches` gives them. Colors are averaged; the most frequent label of a square is kept, of equally frequent
        ones the highest number: so small things stay where classes are in the order of their size.
    factor : int
        Side of the squares in pixels; ValueError if it does not divide the size.
    """
    count, height, width = labels.shape
    check_counts(factor=factor)
    if height % factor or width % factor:
        raise ValueError(f"factor={factor} does not divide pairs of {height} x {width} pixels")
    blocks = (count, height // factor, factor, width // factor, factor)
    colors = images.reshape(*blocks, 3).mean((2, 4)).round().astype(np.uint8)
    found = np.unique(labels)[::-1]
    votes = [(labels == c).reshape(blocks).sum((2, 4)) for c in found]
    return colors, found[np.argmax(votes, axis=0)]


def patches(pairs: Iterable, size: int, *, stride: int | None = None, valid: float = 0.5) -> Pairs:
    """Cut pairs into squares: images (patch, row, column, rgb) and labels (patch, row, column), both uint8.

    ValueError if no square is left: images are smaller, or too few pixels have a class.

    Parameters
    ----------
    pairs : iterable of (image, labels)
        A `PairFolder`, or pairs as it gives them: uint8 (row, column, rgb) and uint8 (row, column).
    size : int
        Side of a square in pixels.
    stride : int, optional
        Pixels between squares; the last one of a row or column ends at the image's edge. Default: `size`.
    valid : float in 0..1
        Least fraction of pixels with a class; other squares are left out.
    """
    stride = size if stride is None else stride
    check_counts(size=size, stride=stride)
    if not isinstance(valid, Real) or not 0 <= valid <= 1:
        raise ValueError(f"valid={valid!r}: give a fraction, 0 to 1")
    images, labels, seen = [], [], 0
    for image, one in tqdm(pairs, desc="patches", leave=False, delay=1):
        seen += 1
        if min(one.shape) < size:
            continue
        starts = [sorted({*range(0, length - size, stride), length - size}) for length in one.shape]
        for row, column in product(*starts):
            square = np.s_[row : row + size, column : column + size]
            if (one[square] != IGNORE).mean() >= valid:
                images.append(image[square])
                labels.append(one[square])
    if not images:
        raise ValueError(f"no patch of {size} x {size} in {seen} images: they are smaller, or have fewer valid pixels")
    return np.stack(images), np.stack(labels)
