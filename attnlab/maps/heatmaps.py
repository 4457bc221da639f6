"""Heat maps of the words of a text, and how maps are resized."""

from collections.abc import Iterable, Iterator, Sequence
from numbers import Integral

import numpy as np
import torch
import torch.nn.functional as F

from ..recording import words
from ..tokens import Token

__all__ = ["MODES", "HeatMaps", "as_size", "minmax", "resize", "std", "upscale"]

MODES = ("bicubic", "bilinear")  # how maps are resized
_LARGEST = 2**15  # side of a map, in pixels


class HeatMaps:
    """The heat maps of a text: `maps["smoke"]` is float32 (row, column), attention in 0..1 or a contribution.

    A word is asked for by name, `maps["red car"]` by phrase, `maps["car", 1]` as the second "car", `maps[3]` as the
    fourth word; each is the mean over its tokens. Iterating gives the words.

    Attributes
    ----------
    values : (token, row, column) array of float32
        Maps of the start token, the text's tokens and the first end token; see `special`.
    words : list of Word
        The text's words, each with its positions on the token axis.
    special : bool
        Whether the first and the last map are those of the start and the end token.
    """

    def __init__(self, values: np.ndarray, text: Sequence[words.Word], special: bool = True):
        self.values = values
        self.words = list(text)
        self.special = special

    def __getitem__(self, query: words.Query | Token) -> np.ndarray:
        return self.values[list(words.find(self.words, getattr(query, "name", query)))].mean(0)

    def __iter__(self) -> Iterator[words.Query]:
        names = [word.text for word in self.words]
        for i, name in enumerate(names):
            yield name if names.count(name) == 1 else (name, names[:i].count(name))

    def __len__(self) -> int:
        return len(self.words)

    def __contains__(self, query: words.Query | Token) -> bool:
        """Whether the text has such a word, once or more often."""
        query = getattr(query, "name", query)
        return isinstance(query, str | tuple | Integral) and bool(words.matches(self.words, query))

    def __repr__(self) -> str:
        tokens, height, width = self.values.shape
        return f"<HeatMaps {height} x {width} of {' '.join(w.text for w in self.words)!r} ({tokens} tokens)>"

    @property
    def start(self) -> np.ndarray:
        """Map of the start token (row, column): models give it the attention that no word gets."""
        return self._special(0)

    @property
    def end(self) -> np.ndarray:
        """Map of the first end token (row, column)."""
        return self._special(-1)

    def _special(self, position):
        if not self.special:
            raise ValueError("these maps were made without start and end token")
        return self.values[position]

    def upscale(self, size: int | tuple[int, int], mode: str = "bicubic") -> "HeatMaps":
        """Resize all maps to (height, width), `mode` "bicubic" (clamped at 0) or "bilinear"."""
        return HeatMaps(upscale(self.values, size, mode), self.words, self.special)

    def overlay(self, image, query: words.Query) -> np.ndarray:
        """Blend an image with the heat map of a word: uint8 (row, column, rgb) of the image's size."""
        from .. import plots  # here, so that making maps does not load matplotlib

        return plots.overlay(image, self[query])


def upscale(maps: np.ndarray, size: int | tuple[int, int], mode: str = "bilinear") -> np.ndarray:
    """Resize one map, or several along a first axis, to (height, width).

    Parameters
    ----------
    maps : ([map,] row, column) array of float32
        Any maps.
    size : int or (int, int)
        (height, width), or the side of a square.
    mode : str
        "bilinear", or "bicubic", which is clamped at 0.
    """
    size = as_size(size)
    values = torch.from_numpy(maps)
    resized = resize(values.reshape(1, -1, *values.shape[-2:]), size, mode)
    return resized.reshape(*values.shape[:-2], *size).numpy()


def as_size(size: int | tuple[int, int]) -> tuple[int, int]:
    """Return a size as (height, width); ValueError for what is none. A number is the side of a square."""
    sides = list(size) if isinstance(size, list | tuple) else [size, size]
    if len(sides) != 2 or not all(isinstance(n, Integral) and 0 < n <= _LARGEST for n in sides):
        raise ValueError(f"size={size!r}: give (height, width) in pixels, 1 to {_LARGEST}, or the side of a square")
    return tuple(map(int, sides))


def minmax(maps: np.ndarray, size: int | tuple[int, int]) -> np.ndarray:
    """Resize maps bilinearly, then rescale each to 0..1 by its minimum and maximum; a flat map becomes 0.

    Linear maps need it before a threshold in 0..1, as their scores have no unit.

    Parameters
    ----------
    maps, size
        As in `upscale`.
    """
    maps = upscale(maps, size)
    low, high = (f(maps, axis=(-2, -1), keepdims=True) for f in (np.min, np.max))
    return (maps - low) / np.where(high > low, high - low, 1)


def resize(maps: torch.Tensor, size: tuple[int, int], mode: str, clamp: bool = True) -> torch.Tensor:
    """Resize maps (n, token, row, column) with aligned pixel centers; `clamp` sets negative bicubic results to 0."""
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: choose one of {', '.join(MODES)}")
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    resized = F.interpolate(maps, size, mode=mode, align_corners=False)
    return resized.clamp_(min=0) if mode == "bicubic" and clamp else resized


def std(maps: Iterable[HeatMaps]) -> HeatMaps:
    """Return the standard deviation over several maps of one text, of different steps, heads or seeds for example.

    It takes what `per=` gives: ``std(daam(recording, per="step").values())``. ValueError for maps of different texts or
    sizes, or fewer than two.
    """
    maps = list(maps)
    if len(maps) < 2 or len({(m.values.shape, tuple(m.words), m.special) for m in maps}) > 1:
        raise ValueError(f"a standard deviation is over two or more maps of one text and size, got {maps}")
    return HeatMaps(np.std([m.values for m in maps], axis=0), maps[0].words, maps[0].special)
