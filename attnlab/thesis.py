"""The thesis's experiments (Marcos-Manchón, UAM 2023) as functions over recordings.

    examples = generate(pipe, oracle, "car", seeds=range(50))          # images of a prompt, the oracle's masks
    examples = render(pipe, "car", count=50)                           # rendered scenes, exact masks
    curve = curves(daam_of(), examples)                                # IoU (threshold, image)
    summary(curve)                                                     # maximum mIoU, its threshold, area

Maps are divided by their maximum (linear and learned ones by their range) at the image size, and a threshold on them is
swept over 0..1, as there.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from skimage.measure import label
from tqdm.auto import tqdm

from .descent import optimize_token
from .fit import Whitening, fit_token
from .heatmaps import stretch, upscale
from .hooks import record
from .linear import linear_daam
from .maps import daam, ovam
from .metrics import THRESHOLDS, area_under_curve, miou_curve
from .pictures import record_image
from .pipelines import Oracle, seed
from .recording import Recording
from .scenes import street
from .tokens import Token

PROMPT = "a {} in an urban environment"
WORDS = {"car": "car", "person": "person", "traffic light": "light", "rider": "rider"}
"""The classes, and the word of the prompt whose map is looked at."""
SHOWN = 0.01  # an image whose main object covers less is dropped


class Example(NamedTuple):
    """An image of a class, what was recorded of it, and the mask of its main object, bool (row, column)."""

    name: str
    number: int  # seed of the noise or of the scene
    image: Image.Image
    truth: np.ndarray
    recording: Recording

    @property
    def shown(self) -> bool:
        return bool(self.truth.mean() >= SHOWN)


def main_object(mask: np.ndarray) -> np.ndarray:
    """The largest connected region (by sides and corners) of a mask: bool (row, column), empty where the mask is."""
    regions = label(mask, connectivity=2)
    sizes = np.bincount(regions.ravel())[1:]
    return regions == 1 + sizes.argmax() if len(sizes) else np.zeros(mask.shape, bool)


def generate(pipe, oracle: Oracle, name: str, seeds: Sequence[int], batch: int = 10, **call) -> list[Example]:
    """Images of "a ⟨class⟩ in an urban environment", one a seed, with the oracle's word for the main object.

    `call` goes to the pipeline: steps, guidance, ... Images that do not show the class are there as well, see `shown`.
    """
    prompt, found = PROMPT.format(name), []
    for start in tqdm(range(0, len(seeds), batch), desc=f"{name}, generated", leave=False):
        some = list(seeds[start : start + batch])
        with record(pipe, dtype=torch.float16) as recording:
            images = pipe([prompt] * len(some), generator=[seed(s) for s in some], **call).images
        masks = oracle.segment(images) == oracle.classes.index(name)
        parts = zip(some, images, masks, recording, strict=True)
        found += [Example(name, s, image, main_object(mask), one) for s, image, mask, one in parts]
    return found


def render(pipe, name: str, count: int, first: int = street.HELD_OUT) -> list[Example]:
    """Rendered scenes that show the class, looked at with the same prompt, with exact masks."""
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    scenes, number = {}, first
    while len(scenes) < count:
        scene = street.render(number, size)
        if main_object(scene.mask(name)).mean() >= SHOWN:
            scenes[number] = scene
        number += 1
    images = [Image.fromarray(scene.image) for scene in scenes.values()]
    recording = record_image(pipe, images, [PROMPT.format(name)] * count, dtype=torch.float16, generator=seed(first))
    parts = zip(scenes.items(), images, recording, strict=True)
    return [Example(name, s, image, main_object(scene.mask(name)), one) for (s, scene), image, one in parts]


Heat = Callable[[Example], np.ndarray]
"""The map (row, column) of an example at its image's size, 0..1."""


def daam_of(word: str | None = None) -> Heat:
    """DAAM of a word of the prompt; of the class's own word unless given."""

    def heat(example):
        found = upscale(daam(example.recording)[word or WORDS[example.name]], example.truth.shape, "bicubic")
        return found / found.max()

    return heat


def linear_of(token: str | Token | None = None) -> Heat:
    """Linear DAAM of a word or token; of the class's own word unless given."""
    return lambda e: stretch(linear_daam(e.recording)[token or WORDS[e.name]], e.truth.shape)


def softmax_of(token: Token) -> Heat:
    """The softmax map of a token beside the background that was learned with it."""
    return lambda e: stretch(ovam(e.recording, token)[token], e.truth.shape)


def curves(heat: Heat, examples: Sequence[Example]) -> np.ndarray:
    """IoU (threshold, image) of each example that shows its class, at `metrics.THRESHOLDS`."""
    shown = [e for e in examples if e.shown]
    if not shown:
        raise ValueError("no example shows its class: generate more, or look at the images")
    return miou_curve([heat(e) for e in shown], [e.truth for e in shown])


class Summary(NamedTuple):
    """Of a curve: its highest mIoU, the threshold there, the area under it, and how many images it is the mean of."""

    maximum: float
    threshold: float
    area: float
    images: int


def summary(ious: np.ndarray) -> Summary:
    """Of IoU (threshold, image). The maximum is over thresholds on these very images, as published: optimistic."""
    mean = ious.mean(1)
    return Summary(
        float(mean.max()), float(THRESHOLDS[mean.argmax()]), area_under_curve(THRESHOLDS, mean), ious.shape[1]
    )


def over_classes(by_class: dict[str, np.ndarray]) -> np.ndarray:
    """The mean curve of several classes, each weighing the same: (threshold, 1), to be summarized like a class's."""
    return np.mean([ious.mean(1) for ious in by_class.values()], axis=0)[:, None]


def split(examples: Sequence[Example], count: int) -> tuple[list[Example], list[Example]]:
    """The first `count` examples that show their class, to learn from, and the others, to test on."""
    shown = [e for e in examples if e.shown]
    if len(shown) <= count:
        raise ValueError(f"{len(shown)} images show the class: learning from {count} leaves none to test on")
    return shown[:count], shown[count:]


def learn(examples: Sequence[Example], preset: str, unlabeled: Whitening | None = None) -> Token:
    """A token of the examples' class: by a preset of `optimize_token`, or by "fit_token"."""
    recordings, masks = [e.recording for e in examples], [e.truth for e in examples]
    word = WORDS[examples[0].name]
    if preset == "fit_token":
        return fit_token(recordings, masks, word, name=examples[0].name, unlabeled=unlabeled)
    return optimize_token(recordings, masks, word, preset, name=examples[0].name)


def layers_by_steps(examples: Sequence[Example], tau: float = 0.5) -> np.ndarray:
    """Mean IoU at a threshold of DAAM from each layer (row, as the model runs) and step: (layer + 1, step + 1).

    The last row is of all layers at one step, the last column of all steps in one layer.
    """
    shown = [e for e in examples if e.shown]
    layers, steps = (list(x) for x in (shown[0].recording.trace.sizes, shown[0].recording.trace.steps))
    found = np.zeros((len(layers) + 1, len(steps) + 1))
    choices = list(itertools.product(enumerate([*layers, None]), enumerate([*steps, None])))
    for (i, layer), (j, step) in tqdm(choices, desc="layers by steps", leave=False):
        choice = {"layers": layer, "steps": step}
        heats = [upscale(daam(e.recording, **choice)[WORDS[e.name]], e.truth.shape, "bicubic") for e in shown]
        found[i, j] = miou_curve(heats, [e.truth for e in shown], [tau]).mean()
    return found


def correlations(examples: Sequence[Example], per: str) -> np.ndarray:
    """Pearson correlation between DAAM maps of the class's word from each layer or step, over pixels of all images."""
    maps = [[m[WORDS[e.name]].ravel() for m in daam(e.recording, per=per).values()] for e in examples]
    return np.corrcoef(np.concatenate([np.stack(one) for one in maps], axis=1))
