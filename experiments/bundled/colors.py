"""Measure whether things have the colors that prompts ask for: "a red car", "a red car and a blue house".

A color is read from the largest region of the thing's class that the reference segmenter sees. What a color looks like
is learned from rendered scenes that the autoencoder restored; how often it is read rightly is measured on others.
"""

from collections import defaultdict
from itertools import chain

import numpy as np
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from tqdm import tqdm

from attnlab.scenes import street
from attnlab.segmentation import Segmenter

from .seen import Seen, draw_images, rate, regions

__all__ = ["BINDINGS", "COLOR_PROMPTS", "ColorReader", "color_prompt", "color_rates"]

_PHRASES = {"car": "a {} car", "building": "a {} house", "person": "a person in {}"}
COLOR_PROMPTS = [
    *(("car", color) for color in ("red", "blue", "yellow", "white")),
    *(("building", color) for color in ("red", "blue", "yellow", "white")),
    *(("person", color) for color in ("red", "blue", "yellow", "green")),
]
"""The (class, color) pairs that are asked for, one in a prompt."""
BINDINGS = [
    (("car", "red"), ("building", "blue")),
    (("car", "yellow"), ("building", "white")),
    (("person", "red"), ("car", "blue")),
    (("person", "yellow"), ("car", "red")),
    (("building", "yellow"), ("person", "blue")),
    (("building", "red"), ("person", "yellow")),
]
"""The pairs that are asked for two in a prompt, once so and once with the colors exchanged."""


def color_prompt(*things: tuple[str, str]) -> str:
    """Return the prompt for things of a class and a color each."""
    return " and ".join(_PHRASES[name].format(color) for name, color in things)


class ColorReader:
    """Tells the color of a thing from its region, by a linear discriminant for each class.

    Parameters
    ----------
    scenes : Seen
        Images to learn from: of each class those with one region, of which the caption says one color. ValueError if
        there are too few.
    """

    def __init__(self, scenes: Seen):
        examples, self._judges = _examples(scenes), {}
        for name in _PHRASES:
            (looks, colors), count = examples[name], len(set(examples[name][1]))
            if not 2 <= count < len(colors):
                raise ValueError(f"{len(scenes.images)} scenes show too few {name}s of known color: give more")
            judge = LinearDiscriminantAnalysis(priors=np.full(count, 1 / count))  # all colors are as likely
            self._judges[name] = judge.fit(looks, colors)

    def read(self, image: np.ndarray, labels: np.ndarray, name: str) -> str | None:
        """Return the color of the largest region of a class in an image; None where the class is not seen."""
        found = regions(labels, street.CLASSES.index(name))
        return str(self._judges[name].predict([_look(image, found[0])])[0]) if found else None

    def hits(self, scenes: Seen) -> dict[tuple[str, str], list[bool]]:
        """Return, by class and color, whether each thing of known color is read rightly."""
        hits = defaultdict(list)
        for name, (looks, colors) in _examples(scenes).items():
            for color, answer in zip(colors, self._judges[name].predict(looks), strict=True):
                hits[name, color].append(bool(color == answer))
        return dict(hits)


def _examples(scenes):
    """Return {class: (looks, colors)} of the things whose color is known: one region of a class, one color said."""
    found = defaultdict(lambda: ([], []))
    for caption, image, labels in zip(*scenes, strict=True):
        said = street.colors_said(caption)
        for name in {name for name, _ in said} & set(_PHRASES):
            colors, masks = [c for n, c in said if n == name], regions(labels, street.CLASSES.index(name))
            if len(colors) == len(masks) == 1:
                found[name][0].append(_look(image, masks[0]))
                found[name][1].append(colors[0])
    return found


def _look(image, mask):
    """Describe a region: means of the upper, the middle and the lower third of its pixels, and that of the whole image.

    Of logarithms, in which the light of the hour is added to every paint alike; the whole image tells it.
    """
    values = np.log(image.astype(float) + 8)  # without the 8, noise of dark pixels would count most
    thirds = np.array_split(values[mask], 3)  # a mask's pixels come row by row
    return np.concatenate([*(part.mean(0) for part in thirds), values.mean((0, 1))])


def color_rates(pipe, segmenter: Segmenter, tuning: Seen, scenes: Seen, images: int = 50, **call) -> dict:
    """Return how often images show a thing in the color that was asked, of each prompt and of prompts with two things.

    Beside it stand how often they show it where the prompt says another color, and how often it is read rightly in
    rendered `scenes`; what colors look like is learned from `tuning`, other ones. `call` goes to `draw_images`.
    """
    reader = ColorReader(tuning)
    own = reader.hits(scenes)
    answers = {pair: _read(pipe, segmenter, reader, [pair], images, call) for pair in tqdm(COLOR_PROMPTS, "colors")}
    one, two = {}, {}
    for pair, read in answers.items():
        name, color = pair
        others = chain(*(answers[name, c] for n, c in COLOR_PROMPTS if n == name and c != color))
        one[color_prompt(pair)] = rate([answer == [color] for answer in read]) | {
            "unasked": float(np.mean([answer == [color] for answer in others])),
            "scenes": rate(own.get(pair, [])),
        }
    for (first, a), (second, b) in tqdm(BINDINGS, "two colors"):
        hits, exchanged = [], []
        for colors in ([a, b], [b, a]):
            things = list(zip((first, second), colors, strict=True))
            read = _read(pipe, segmenter, reader, things, -(-images // 4), call)
            hits += [answer == colors for answer in read]
            exchanged += [answer == colors[::-1] for answer in read]
        two[color_prompt((first, a), (second, b))] = rate(hits) | {"exchanged": float(np.mean(exchanged))}
    return {"images": images, "one": one, "two": two}


def _read(pipe, segmenter, reader, things, count, call):
    """Return the colors of things, asked for in one prompt, in each of `count` images."""
    images = draw_images(pipe, [color_prompt(*things)] * count, range(count), **call)
    pairs = zip(images, segmenter.segment(images), strict=True)
    return [[reader.read(image, labels, name) for name, _ in things] for image, labels in pairs]
