"""Measure how well the maps of a model's words find their objects in held-out rendered scenes.

Every scene is noised and recorded once per timestep (`record_image`). The map of each caption word for a class (DAAM's,
or another method's) is resized to the scene, divided by its maximum and compared with the exact mask. The threshold is
the one with the highest mean IoU on other scenes. Baseline: each map compared with the mask of another class of its
caption.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from attnlab import Recording, daam, goca, metrics, record_image, seed
from attnlab.maps.heatmaps import resize
from attnlab.recording.checks import own_size
from attnlab.scenes import street

__all__ = ["TIMESTEPS", "TUNING", "WordCase", "agreeing_maps", "caption_maps", "localization", "summarize_cases"]
__all__ += ["word_cases"]

TIMESTEPS = (100, 300, 500)  # of 1000
TUNING = street.HELD_OUT + 100_000  # first seed of the scenes on which the threshold is chosen


class WordCase(NamedTuple):
    """One word of one scene: its map and mask (row, column), and the map of another class of the caption, if any."""

    scene: int
    name: str
    heat: np.ndarray
    truth: np.ndarray
    other: np.ndarray | None


# from a recording of a scene and words of its caption to the map (row, column) of each
_Method = Callable[[Recording, list[str]], dict[str, np.ndarray]]


def caption_maps(recording: Recording, words: list[str]) -> dict[str, np.ndarray]:
    """Return the DAAM map of each word, or of its first occurrence."""
    maps = daam(recording)
    return {word: maps[word, 0] for word in words}


def agreeing_maps(recording: Recording, words: list[str]) -> dict[str, np.ndarray]:
    """Return GoCA's map of each word, or of its first occurrence; that of one word alone is not rescaled."""
    several = len(words) > 1
    maps = goca(recording, words=[(word, 0) for word in words] if several else None, rescaled=several)
    return {word: maps[word, 0] for word in words}


def word_cases(
    pipe, first: int, count: int, methods: dict[str, _Method], batch: int = 10, **kept
) -> dict[str, list[WordCase]]:
    """Return, by method, the maps of all words of the scenes with seeds first, first + 1, ... and their masks.

    `kept` is what `record_image` keeps beside the attention to words: `self_attention=`, `agreement=`.
    """
    found = {name: [] for name in methods}
    for start in tqdm(range(first, first + count, batch), desc="scenes"):
        seeds = range(start, min(start + batch, first + count))
        scenes = [street.render(s, size=own_size(pipe)) for s in seeds]
        recording = record_image(
            pipe,
            [s.image for s in scenes],
            [s.caption for s in scenes],
            timesteps=TIMESTEPS,
            generator=seed(start),
            **kept,
        )
        for k, scene in enumerate(scenes):
            for name, maps in methods.items():
                found[name] += _cases(seeds[k], scene, maps(recording[k], list(scene.words)))
    return found


def _cases(number, scene, heats):
    size = scene.labels.shape
    tensors = {word: torch.from_numpy(heat)[None, None] for word, heat in heats.items()}
    heats = {word: resize(tensor, size, "bicubic")[0, 0].numpy() for word, tensor in tensors.items()}
    for word in heats:
        others = [other for other in heats if scene.words[other] != scene.words[word]]
        shuffled = heats[others[number % len(others)]] if others else None
        yield WordCase(number, scene.words[word], heats[word], scene.mask(word), shuffled)


def localization(pipe, scenes: int = 500, tuning: int = 200) -> dict:
    """Summarize DAAM maps over `scenes` held-out scenes, with a threshold chosen on `tuning` others."""
    ranges = (TUNING, tuning), (street.HELD_OUT, scenes)
    return summarize_cases(*(word_cases(pipe, *one, {"daam": caption_maps})["daam"] for one in ranges))


def summarize_cases(tuning: list[WordCase], test: list[WordCase]) -> dict:
    """Return mean IoU at the threshold chosen on `tuning`, and pointing game, of `test`; 95 % intervals over scenes."""
    ious = metrics.miou_curve([c.heat for c in tuning], [c.truth for c in tuning])
    tau = metrics.best_threshold(metrics.THRESHOLDS, ious)
    result = {
        "threshold": tau,
        "tuning scenes": len({c.scene for c in tuning}),
        "scenes": len({c.scene for c in test}),
        "maps": len(test),
    }
    shuffled = [c._replace(heat=c.other) for c in test if c.other is not None]
    for label, some in (("word", test), ("shuffled word", shuffled)):
        iou = np.array([metrics.iou(c.heat >= tau * c.heat.max(), c.truth) for c in some])
        hit = np.array([metrics.pointing_game(c.heat, c.truth) for c in some], float)
        scene = np.array([c.scene for c in some])
        for measure, values in (("iou", iou), ("pointing", hit)):
            by_scene = [values[scene == s].mean() for s in np.unique(scene)]
            result[f"{label} {measure}"] = float(np.mean(by_scene))
            result[f"{label} {measure} interval"] = [float(v) for v in metrics.bootstrap_interval(by_scene)]
        names = np.array([c.name for c in some])
        if label == "word":
            result["classes"] = {
                name: {"maps": int(own.sum()), "iou": float(iou[own].mean()), "pointing": float(hit[own].mean())}
                for name in street.CLASSES
                if (own := names == name).any()
            }
    return result
