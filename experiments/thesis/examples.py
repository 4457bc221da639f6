"""One image of a class of the thesis, what was recorded of it, and where its main object is."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image
from skimage.measure import label

from attnlab import storage
from attnlab.maps.heatmaps import HeatMaps
from attnlab.maps.linear import LinearMap
from attnlab.recording.texts import TextEncoder
from attnlab.recording.words import Word
from attnlab.scenes import street

PROMPT = "a {} in an urban environment"
WORDS = {"car": "car", "person": "person", "traffic light": "light", "rider": "rider"}
"""The classes, and the word of the prompt whose map is looked at."""
SHOWN = 0.01  # an image whose main object covers less is dropped


@dataclass(frozen=True, eq=False)
class Example:
    """One image of a class, what was recorded of it, and where its main object is.

    Attributes
    ----------
    name : the class
    track : "generated" or "rendered"
    number : seed of the noise or of the scene
    truth : bool (row, column), the main object; None where there is no mask
    labels : uint8 (row, column), what each pixel shows, an index into `street.CLASSES`; None where that is unknown
    """

    name: str
    track: str
    number: int
    truth: np.ndarray | None
    labels: np.ndarray | None
    path: Path = field(repr=False)
    encoder: TextEncoder = field(repr=False)

    @property
    def shown(self) -> bool:
        """Whether the class is there, and so whether the image counts."""
        return self.truth is not None and bool(self.truth.mean() >= SHOWN)

    @property
    def id(self) -> str:
        return f"{self.track}/{self.name.replace(' ', '_')}_{self.number:04d}"

    @property
    def prompt(self) -> str:
        return PROMPT.format(self.name)

    def mask(self, name: str) -> np.ndarray | None:
        """bool (row, column) of any class of the street; None where labels are unknown."""
        return None if self.labels is None else self.labels == street.CLASSES.index(name)

    @cached_property
    def image(self) -> Image.Image:
        return Image.fromarray(self._file.read("image").numpy())

    @property
    def maps(self) -> HeatMaps:
        """DAAM of the prompt."""
        words = [Word(text, tuple(tokens)) for text, tokens in self._file.metadata["words"]]
        return HeatMaps(self._file.read("maps").numpy(), words)

    @property
    def linear(self) -> LinearMap:
        """Linear DAAM."""
        return LinearMap.load(beside(self.path), self.encoder)

    @property
    def timesteps(self) -> list[int]:
        return self._file.metadata["timesteps"]

    @property
    def steps(self) -> np.ndarray:
        """DAAM of the class's word from all layers at each step: float32 (step, row, column)."""
        return self._file.read("steps").numpy()

    @property
    def layers(self) -> dict[str, np.ndarray]:
        """DAAM of the class's word from each layer at each step: float32 (step, row, column) of the layer's size."""
        return {name: self._file.read(f"layer.{i}").numpy() for i, name in enumerate(self._file.metadata["layers"])}

    @property
    def _file(self) -> storage.File:
        return storage.File(self.path, "Example")


def main_object(mask: np.ndarray) -> np.ndarray:
    """The largest connected region (by sides and corners) of a mask: bool (row, column), empty where the mask is."""
    regions = label(mask, connectivity=2)
    sizes = np.bincount(regions.ravel())[1:]
    return regions == 1 + sizes.argmax() if len(sizes) else np.zeros(mask.shape, bool)


def beside(path: Path) -> Path:
    return path.with_suffix(".linear.safetensors")
