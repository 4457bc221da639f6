"""Choose the settings of mask recipes: every combination of a grid, on maps of scenes that are not reported.

`python -m experiments.studies.mask_settings` takes the DAAM maps of several words in both models, and prints the best
settings of each recipe for each, beside the defaults, and those that are best over all.
"""

import argparse
import itertools
import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

import attnlab as al
from attnlab import masks, metrics
from attnlab.scenes import street

__all__ = ["GRIDS", "TUNING_MASKS", "MaskCase", "cases_of", "every_setting", "main", "sweep"]

TUNING_MASKS = street.HELD_OUT + 200_000  # first seed of the scenes on which settings are chosen
_NEAR = {"eps": (1.5, 3.0), "keep": (None, 0.5)}
GRIDS = {
    "threshold": {"method": ("threshold",), "level": (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)},
    "dbscan, quantile": {"method": ("dbscan",), "quantile": (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95), **_NEAR},
    "dbscan, level": {"method": ("dbscan",), "level": (0.2, 0.3, 0.4, 0.5, 0.6, 0.7), **_NEAR},
    "random_walker": {
        "method": ("random_walker",),
        "low": (0.1, 0.2, 0.3),
        "high": (0.6, 0.7, 0.8),
        "beta": (130.0, 500.0, 2000.0),
    },
}
"""Values of each setting that are tried, by recipe; DBSCAN's bright pixels are a quantile, or reach a level."""


class MaskCase(NamedTuple):
    """A heat map, the image below it and the exact mask: arrays of one height and width."""

    heat: np.ndarray
    image: np.ndarray
    truth: np.ndarray


def cases_of(pipe, word: str, count: int, first: int = TUNING_MASKS, seed: int = 11) -> list[MaskCase]:
    """Return the DAAM maps of a word in `count` rendered scenes whose captions say it, from seed `first` on."""
    scenes = street.render_with(word, count, first=first)
    pictures, captions = [s.image for s in scenes], [s.caption for s in scenes]
    recordings = al.record_image(pipe, pictures, captions, generator=al.seed(seed))
    heats = [al.daam(one).upscale(scenes[0].labels.shape)[word, 0] for one in recordings]
    return [MaskCase(heat, s.image, s.mask(word)) for heat, s in zip(heats, scenes, strict=True)]


def sweep(cases: Sequence[MaskCase], grid: Mapping[str, Sequence]) -> list[tuple[dict, float]]:
    """Return every combination of a grid's settings, and its mean IoU. The IoU of an empty mask is 0."""
    every = tqdm(every_setting(grid), desc="settings", leave=False, delay=1)
    return [(settings, float(np.mean(_ious(cases, settings)))) for settings in every]


def every_setting(grid: Mapping[str, Sequence]) -> list[dict]:
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _ious(cases, settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of masks that come out empty
        return [metrics.iou(masks.mask_by(settings, c.heat, c.image), c.truth) for c in cases]


def _said(settings: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items() if name != "method" and value is not None)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the best settings for each word and model, and over all of them."""
    parser = argparse.ArgumentParser(prog="python -m experiments.studies.mask_settings", description=__doc__)
    parser.add_argument("--models", nargs="+", default=["tiny", "tiny-plain"], help="bundled models")
    parser.add_argument("--words", nargs="+", default=["fire", "smoke", "water", "car", "house", "tree"])
    parser.add_argument("--scenes", type=int, default=40, help="tuning scenes a word")
    args = parser.parse_args(argv)
    if wrong := [word for word in args.words if word not in street.WORDS]:
        parser.error(f"no caption says {', '.join(wrong)}; words that name a class: {', '.join(street.WORDS)}")
    tables = {recipe: [] for recipe in GRIDS}  # of each word and model: mean IoU of every setting, then of the defaults
    for model in args.models:
        pipe = al.load_pipeline(model)
        for word in args.words:
            cases = cases_of(pipe, word, args.scenes)
            for recipe, grid in GRIDS.items():
                found = sweep(cases, grid)
                settings, best = max(found, key=lambda pair: pair[1])
                default = np.mean(_ious(cases, {"method": settings["method"]}))
                print(
                    f"{model:11} {word:6} {recipe:17} {best:.3f} (defaults {default:.3f})  {_said(settings)}",
                    flush=True,
                )
                tables[recipe].append([*(iou for _, iou in found), default])
    for recipe, rows in tables.items():
        *means, default = np.mean(rows, axis=0)
        settings = every_setting(GRIDS[recipe])[int(np.argmax(means))]
        print(f"all {len(rows)} {recipe:17} {max(means):.3f} (defaults {default:.3f})  {_said(settings)}")


if __name__ == "__main__":
    main()
