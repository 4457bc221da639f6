"""Write and read an example: an image of a class, what was recorded of it, and the mask of its main object."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from skimage.measure import label

from attnlab import storage
from attnlab.maps.heatmaps import HeatMaps
from attnlab.maps.linear import LinearMap, linear_daam
from attnlab.maps.softmax import daam
from attnlab.recording import Recording
from attnlab.recording.texts import TextEncoder
from attnlab.recording.words import Word
from attnlab.scenes import street

__all__ = ["MIN_OBJECT_AREA", "PROMPT", "PROMPT_WORDS", "Example", "main_object", "read_labels", "write_example"]

PROMPT = "a {} in an urban environment"
PROMPT_WORDS = {"car": "car", "person": "person", "traffic light": "light", "rider": "rider"}
"""The classes, and for each the word of the prompt whose map is evaluated."""
MIN_OBJECT_AREA = 0.01  # fraction of the image; images whose main object is smaller are dropped


@dataclass(frozen=True, eq=False)
class Example:
    """One image of a class, what was recorded of it, and the mask of its main object.

    Attributes
    ----------
    name : str
        The class.
    track : str
        "generated" or "rendered".
    number : int
        Seed of the noise or of the scene.
    truth : (row, column) array of bool, optional
        The main object; None where there is no mask.
    labels : (row, column) array of uint8, optional
        What each pixel shows, an index into `street.CLASSES`; None where that is unknown.
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
        """Whether the image shows the class; others are dropped."""
        return self.truth is not None and bool(self.truth.mean() >= MIN_OBJECT_AREA)

    @property
    def id(self) -> str:
        return f"{self.track}/{self.name.replace(' ', '_')}_{self.number:04d}"

    @property
    def prompt(self) -> str:
        return PROMPT.format(self.name)

    def mask(self, name: str) -> np.ndarray | None:
        """Return the mask of any class of the street, bool (row, column); None where labels are unknown."""
        return None if self.labels is None else self.labels == street.CLASSES.index(name)

    @cached_property
    def image(self) -> Image.Image:
        return Image.fromarray(self._file.read("image").numpy())

    @property
    def maps(self) -> HeatMaps:
        """DAAM maps of the words of the prompt."""
        words = [Word(text, tuple(tokens)) for text, tokens in self._file.metadata["words"]]
        return HeatMaps(self._file.read("maps").numpy(), words)

    @property
    def linear(self) -> LinearMap:
        """Linear DAAM."""
        return LinearMap.load(_linear_path(self.path), self.encoder)

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
    """Return the largest connected region (by sides and corners) of a mask: bool (row, column)."""
    regions = label(mask, connectivity=2)
    sizes = np.bincount(regions.ravel())[1:]
    return regions == 1 + sizes.argmax() if len(sizes) else np.zeros(mask.shape, bool)


def write_example(path: Path, name: str, image: Image.Image, labels: np.ndarray | None, recording: Recording) -> None:
    """Write an image of a class and what was recorded of it: all that `Example` reads, in two files."""
    word, layers = PROMPT_WORDS[name], list(recording.trace.sizes)
    tensors = {"image": np.asarray(image), "maps": daam(recording).values}
    tensors["steps"] = np.stack([m[word] for m in daam(recording, per="step").values()])
    for i, layer in enumerate(layers):
        tensors[f"layer.{i}"] = np.stack([m[word] for m in daam(recording, layers=layer, per="step").values()])
    if labels is not None:
        tensors["labels"] = labels
    metadata = {"words": [[w.text, list(w.tokens)] for w in recording.words], "layers": layers}
    metadata["timesteps"] = recording.trace.timesteps
    path.parent.mkdir(parents=True, exist_ok=True)
    linear_daam(recording).save(_linear_path(path))
    tensors = {key: torch.from_numpy(np.array(value)) for key, value in tensors.items()}
    storage.write(path, "Example", tensors, metadata)


def read_labels(path: Path) -> np.ndarray | None:
    """Read the labels that were written with an example, if any: uint8 (row, column)."""
    file = storage.File(path, "Example")
    return file.read("labels").numpy() if "labels" in file.names else None


def _linear_path(path):
    return path.with_suffix(".linear.safetensors")
