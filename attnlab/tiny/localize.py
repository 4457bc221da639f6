"""How well the maps of a model's words find their objects in held-out rendered scenes.

Every scene is noised and looked at once per timestep (`record_image`), the DAAM map of every caption word that names a
class is resized to the scene, divided by its maximum and held against the exact mask. The threshold is the one with
the highest mean IoU on other scenes. Baseline: each map held against the mask of another class of its caption.
"""

from typing import NamedTuple

import numpy as np
from tqdm.auto import tqdm

from .. import daam, metrics, record_image, seed
from ..scenes import street

TIMESTEPS = (100, 300, 500)  # of 1000
TUNING = street.HELD_OUT + 100_000  # first seed of the scenes on which the threshold is chosen


class Case(NamedTuple):
    """One word of one scene: its map and mask (row, column), and the map of another class of the caption, if any."""

    scene: int
    name: str
    heat: np.ndarray
    truth: np.ndarray
    other: np.ndarray | None


def cases(pipe, first: int, count: int, batch: int = 10) -> list[Case]:
    """All words of the scenes with seeds first, first + 1, ...; the noise depends on the seed."""
    found = []
    for start in tqdm(range(first, first + count, batch), desc="scenes"):
        seeds = range(start, min(start + batch, first + count))
        scenes = [street.render(s, size=pipe.unet.config.sample_size * pipe.vae_scale_factor) for s in seeds]
        recording = record_image(
            pipe,
            [s.image for s in scenes],
            [s.caption for s in scenes],
            timesteps=TIMESTEPS,
            generator=seed(start),
        )
        for k, scene in enumerate(scenes):
            maps = daam(recording[k]).upscale(scene.labels.shape)
            words, heats = list(scene.words), {w: maps[w, 0] for w in scene.words}
            for w in words:
                others = [o for o in words if scene.words[o] != scene.words[w]]
                shuffled = heats[others[(start + k) % len(others)]] if others else None
                found.append(Case(seeds[k], scene.words[w], heats[w], scene.mask(w), shuffled))
    return found


def localization(pipe, scenes: int = 500, tuning: int = 200) -> dict:
    """`summary` over `scenes` held-out scenes, the threshold chosen on `tuning` others."""
    return summary(cases(pipe, TUNING, tuning), cases(pipe, street.HELD_OUT, scenes))


def summary(tuning: list[Case], test: list[Case]) -> dict:
    """Mean IoU at the threshold chosen on `tuning` and pointing game on `test`, with 95 % intervals over scenes."""
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
