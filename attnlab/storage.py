"""Write tensors and metadata to one safetensors file, whole or not at all, and read it lazily; read photos."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    import torch

__all__ = ["FORMAT", "File", "Stored", "claim_folder", "intact", "kind", "read_rgb", "replacing", "versions"]
__all__ += ["write", "write_text"]

FORMAT = 1  # of files; those of a later one are refused


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a path of the same name to write to; the file there replaces `path` when the block ends well.

    Missing folders are made. IsADirectoryError where `path` is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file in it")
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{path.name}.part-", dir=path.parent) as folder:
        part = Path(folder, path.name)  # writers look at the suffix
        yield part
        part.replace(path)


def write_text(path: str | Path, text: str) -> Path:
    """Write a text file, whole or not at all; return its path.

    Parameters
    ----------
    path, text : str or Path, str
        The file, and what it is to hold, in UTF-8.
    """
    with replacing(path) as part:
        part.write_bytes(text.encode())
    return Path(path)


def claim_folder(folder: str | Path, settings: object, name: str = "settings.json") -> object:
    """Make a folder this run's, by a file of settings in it; return the settings as JSON types.

    Parameters
    ----------
    folder : str or Path
        A new folder, or one of the same run. ValueError where it holds a run with other settings, or damaged ones.
    settings : JSON types
        What tells this run from others.
    name : str
        Name of the file of settings.
    """
    path, settings = Path(folder, name), json.loads(json.dumps(settings))
    if not path.exists():
        write_text(path, json.dumps(settings))
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError:
        raise ValueError(f"{path} is damaged: delete it if {folder} is of this run") from None
    if found != settings:
        raise ValueError(f"{folder} holds a run with other settings (see {path}): name another folder")
    return settings


def write(path: str | Path, kind: str, tensors: Mapping[str, torch.Tensor], metadata: dict) -> Path:
    """Write tensors and metadata to one file, whole or not at all, with checksums.

    Parameters
    ----------
    path : str or Path
        The file.
    kind : str
        What it holds: "Recording", "LinearMap", ...
    tensors, metadata : dict
        Tensors by name, and what is known of them, in JSON types.
    """
    from safetensors.torch import save_file  # late: `plots` takes `replacing` from here, and does without torch

    about = json.dumps(metadata)
    sums = {name: [_checksum(entry) for entry in _entries(tensor)] for name, tensor in tensors.items()}
    header = {"attnlab": kind, "format": str(FORMAT), "about": about}
    header["crc32"] = json.dumps([zlib.crc32(about.encode()), sums])
    with replacing(path) as part:
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part, header)
        except SafetensorError as error:  # of a full disk too
            raise OSError(f"{path} could not be written: {error}") from error
    return Path(path)


def read_rgb(photo: str | Path | Image.Image) -> np.ndarray:
    """Read a photo of any form, turned as its camera says: uint8 (row, column, rgb).

    16-bit gray is scaled from 0..65535, floating-point gray from 0..1. ValueError for a file that is no whole image,
    for floating-point gray of another range, and for what has no one RGB: 32-bit whole numbers, pixels that one can see
    through. FileNotFoundError where there is no file.

    Parameters
    ----------
    photo : str or Path or PIL.Image.Image
        An image file, or an open image.
    """
    name = "the image" if isinstance(photo, Image.Image) else photo
    try:
        with nullcontext(photo) if isinstance(photo, Image.Image) else Image.open(photo) as image:
            return _as_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise
    except Exception as error:  # Pillow has many kinds for damaged files, TypeError among them
        raise ValueError(f"{name} cannot be read as a photo: {error}") from error


def _as_rgb(image):
    if image.mode == "I" or image.mode == "LAB":
        raise ValueError(f'what is white in mode "{image.mode}" is not known: convert it to "RGB" or 8-bit gray, "L"')
    if image.mode == "F" or image.mode.startswith("I;16"):  # which Pillow would cut off at 255
        gray = np.asarray(image) / (1 if image.mode == "F" else 65535)
        if not (gray.min() >= 0 and gray.max() <= 1):
            raise ValueError(f"floating-point gray is in 0..1, not {gray.min():.3g}..{gray.max():.3g}")
        return np.repeat((gray * 255).round().astype(np.uint8)[..., None], 3, 2)
    if image.has_transparency_data and image.convert("RGBA").getextrema()[3][0] < 255:
        raise ValueError(
            'it is transparent in places: choose a background, Image.alpha_composite(Image.new("RGBA", image.size, '
            '"white"), image.convert("RGBA")).convert("RGB"), and give that'
        )
    return np.asarray(image.convert("RGB"))


def versions() -> dict[str, str]:
    """Return the versions of attnlab and of the libraries that a recording depends on."""
    return {name: _version(name) for name in ("attnlab", "torch", "diffusers", "transformers")}


_version = cache(version)  # it reads a file, which takes longer than to write a record


def kind(path: str | Path) -> str | None:
    """Return the kind of a file that `write` made; None for another safetensors file. It raises what `File` raises."""
    header = _open(path)[1]
    if "attnlab" not in header and {"about", "crc32"} & set(header):
        raise ValueError(f"{path} is damaged: its header does not say what it holds")
    return header.get("attnlab")


def _open(path):
    """Open a safetensors file: its handle and its header."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        handle = safe_open(path, "pt")
        return handle, handle.metadata() or {}
    except (SafetensorError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from error


def _entries(tensor):
    """Return what is read of a tensor at once, and has a checksum: entries of the first axis where there are many."""
    return tensor if tensor.ndim > 2 else [tensor]


def _checksum(tensor) -> int:
    import torch

    values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return zlib.crc32(values, zlib.crc32(f"{tensor.dtype} {tuple(tensor.shape)}".encode()))


@contextmanager
def intact(path: str | Path) -> Iterator[None]:
    """Raise ValueError, which names the file, where what is read in the block is not what `write` was given.

    Parameters
    ----------
    path : str or Path
        The file that is read.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, EOFError, SafetensorError) as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise  # in words already
        said = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is damaged: {said}") from error


class File:
    """A file that `write` made, open for reading: one that is replaced meanwhile goes on to give what it held.

    FileNotFoundError where there is none; ValueError where it is cut short, damaged, of another kind, or of a later
    version. Files that have no checksums, as attnlab wrote before, are read too.
    """

    def __init__(self, path: str | Path, kind: str):
        self.path = path
        self.handle, header = _open(path)
        if header.get("attnlab") != kind:
            raise ValueError(f"{path} holds {header.get('attnlab', 'something else')}, not a {kind}")
        number = header.get("format", "")
        if number.isdecimal() and int(number) > FORMAT:
            raise ValueError(f"{path} has format {number}, this attnlab reads up to {FORMAT}: install a later one")
        self.names = frozenset(self.handle.keys())
        with intact(path):
            about, self._sums = json.loads(header.get("crc32", "[null, null]"))
            known = self._sums is None or (
                zlib.crc32(header["about"].encode()) == about and set(self._sums) == self.names
            )
            self.metadata = json.loads(header["about"])  # what `write` was given
            known = known and set(header) <= {"attnlab", "format", "about", "crc32"}  # else "crc32" may be damaged
            if number != str(FORMAT) or not known or not isinstance(self.metadata, dict):
                raise ValueError("its header is not what was written")

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor; ValueError where it is not there, damaged, or holds NaN or infinity."""
        with intact(self.path):
            tensor = self.handle.get_tensor(name)
        for i, entry in enumerate(_entries(tensor)):
            self._check(name, i, entry)
        return tensor

    def stored(self, name: str) -> Stored:
        """Return the entries along a tensor's first axis, unread."""
        return Stored(self, name)

    def entry(self, name: str, i: int) -> torch.Tensor:
        """Read one entry along the first axis of a tensor; ValueError as in `read`."""
        with intact(self.path):
            entry = self.handle.get_slice(name)[i]
        self._check(name, i, entry)
        return entry

    def _check(self, name, i, entry):
        with intact(self.path):
            if self._sums is not None and self._sums[name][i] != _checksum(entry):
                raise ValueError(f"the values of {name} are not those that were written")
        # NaN wins both minimum and maximum, and these two are a hundred times faster than isfinite in half precision
        values = entry.float() if entry.itemsize == 1 else entry  # torch compares no numbers of 8 bits
        if entry.is_floating_point() and entry.numel() and not all(end.isfinite() for end in values.aminmax()):
            raise ValueError(f"{name} of {self.path} holds NaN or infinity: record in float32 or bfloat16")


class Stored(Sequence):
    """The entries along the first axis of a tensor in an open file, each read when it is asked for."""

    def __init__(self, file: File, name: str):
        self.file, self.name = file, name
        self.shape = file.handle.get_slice(name).get_shape()

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, i: int) -> torch.Tensor:
        if not -len(self) <= i < len(self):
            raise IndexError(f"entry {i} of {len(self)}")
        return self.file.entry(self.name, i % len(self))

    def __reduce__(self):
        """Pickle and copy the entries themselves: an open file cannot be."""
        return list, (list(self),)
