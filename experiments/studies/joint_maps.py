"""Study which layers, timesteps and shares of joint attention find what a caption's word names; no model is trained.

Held-out rendered scenes are noised and recorded once per timestep. A reading is a kind of map, of one layer or the
mean of neighboring ones, at one timestep or the mean of all. Its threshold, and which reading is best of its kind, are
chosen on other scenes than those that are reported.

    python -m experiments.studies.joint_maps                                   # of `tiny-mmdit`
    python -m experiments.studies.joint_maps --model FOLDER --tests 40 --tuning 20

The same call goes on after an interruption.
"""

import argparse
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations_with_replacement
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import attnlab as al
from attnlab import metrics
from attnlab.maps.heatmaps import resize
from attnlab.recording.adapters.families import denoiser_of
from attnlab.recording.checks import own_size
from attnlab.scenes import street
from attnlab.storage import File, claim_folder, write, write_text

from ..bundled.cards import markdown_table
from ..bundled.localize import WordCase, agreeing_maps, summarize_cases

__all__ = ["FIRST_CHOSEN_ON", "FIRST_REPORTED", "JOINT_MAPS_RESULTS", "MAP_KINDS", "JointMapsStudy", "Reading", "main"]
__all__ += ["maps_of_agreement", "maps_of_outputs", "maps_of_share", "propagated_maps", "readings_table"]

FIRST_CHOSEN_ON = street.HELD_OUT + 800_000  # first seed of the scenes on which readings and thresholds are chosen
FIRST_REPORTED = street.HELD_OUT + 850_000
_BLOCK = 10  # scenes per file
_GRID = 16  # rows on which layers are compared
_BESIDE = ("sky", "grass")
_TIMESTEPS = (100, 300, 500, 700, 900)
JOINT_MAPS_RESULTS = Path(__file__).parents[1] / "results" / "joint_maps.json"
_log = logging.getLogger(__name__)

_Maps = dict[str, dict[str, np.ndarray]]  # by layer and word, (row, column)


def maps_of_share(share: str, pipe, recording: al.Recording, words: Sequence[str]) -> _Maps:
    """Return each layer's map of each word, or of its first occurrence, at the recorded timestep: DAAM of one share."""
    if recording.trace.generation.share != share:
        recording = al.record_again(pipe, recording, share=share)
    layers = al.daam(recording, per="layer")
    return {layer: {word: maps[word, 0] for word in words} for layer, maps in layers.items()}


def propagated_maps(pipe, recording: al.Recording, words: Sequence[str]) -> _Maps:
    """Return each layer's share of all attention for each word, propagated along the mean of all self-attention."""
    height = next(iter(recording.trace.sizes.values()))[0]
    recording = al.record_again(pipe, recording, share="joint", self_attention=height)
    layers = al.daam(recording, per="layer")
    maps = {layer: al.propagate(maps, *recording.self_attention()) for layer, maps in layers.items()}
    return {layer: {word: found[word, 0] for word in words} for layer, found in maps.items()}


def maps_of_outputs(pipe, recording: al.Recording, words: Sequence[str]) -> _Maps:
    """Return each layer's concept map of each word: what share of a pixel it gets, beside the other words and these.

    "sky" and "grass", which nearly every scene has, stand beside the words, so that no word is alone.
    """
    texts = list(dict.fromkeys([*words, *_BESIDE]))
    recording = al.record_again(pipe, recording, texts=texts, outputs=True)
    layers = {layer: al.concept_maps(recording, texts, layers=[layer]) for layer in recording.trace.sizes}
    return {layer: {word: maps[word] for word in words} for layer, maps in layers.items()}


def maps_of_agreement(pipe, recording: al.Recording, words: Sequence[str]) -> _Maps:
    """Return GoCA's map of each word, which is of all layers, under the name of each."""
    maps = agreeing_maps(al.record_again(pipe, recording, agreement=_GRID), list(words))
    return dict.fromkeys(recording.trace.sizes, maps)


MAP_KINDS: dict[str, Callable[..., _Maps]] = {
    "text": partial(maps_of_share, "text"),
    "joint": partial(maps_of_share, "joint"),
    "propagated": propagated_maps,
    "output": maps_of_outputs,
    "agreement": maps_of_agreement,
}
"""Kinds of maps: functions of a pipeline, a recording of one image and timestep with its calls, and words."""


class Reading(NamedTuple):
    """A kind of map, the first and the last of neighboring layers by number, and a timestep; None: the mean of all."""

    kind: str
    first: int
    last: int
    timestep: int | None


class _Found(NamedTuple):
    """Of words of scenes: maps (kind, timestep, map, layer, row, column) and exact masks (map, row, column)."""

    maps: torch.Tensor
    masks: torch.Tensor
    rows: list[tuple[int, str]]  # the scene's seed and the class of each map

    def another(self, k: int) -> int | None:
        """Return the number of a map of another class of the same scene; None where there is none."""
        number, name = self.rows[k]
        others = [j for j, (n, other) in enumerate(self.rows) if n == number and other != name]
        return others[number % len(others)] if others else None


@dataclass(frozen=True)
class JointMapsStudy:
    """A model, its scenes and timesteps, and where maps are kept."""

    pipe: object
    work: Path
    tuning: int = 150  # scenes on which readings and thresholds are chosen
    tests: int = 300  # scenes that are reported
    timesteps: tuple[int, ...] = _TIMESTEPS

    def claim(self) -> None:
        """Make the folder this study's; ValueError if it holds maps of other weights or settings."""
        weights = sum(float(one.detach().double().abs().sum()) for one in denoiser_of(self.pipe).parameters())
        settings = {"kinds": list(MAP_KINDS), "timesteps": self.timesteps, "weights": f"{weights:.8e}"}
        claim_folder(self.work, settings)

    def find(self, first: int, count: int) -> _Found:
        """Record scenes of the seeds first, first + 1, ..., or read what an earlier call left."""
        starts = range(first, first + count, _BLOCK)
        blocks = [self._block(n, min(_BLOCK, first + count - n)) for n in tqdm(starts, desc="scenes")]
        maps, masks, rows = zip(*blocks, strict=True)
        return _Found(torch.cat(maps, 2), torch.cat(masks), [tuple(row) for some in rows for row in some])

    def _block(self, first, count):
        path = self.work / f"maps-{first}-{count}.safetensors"
        if not path.exists():
            scenes = {n: street.render(n, size=own_size(self.pipe)) for n in range(first, first + count)}
            maps = torch.cat([self._maps(number, scene) for number, scene in scenes.items()], 2)
            masks = [torch.from_numpy(scene.mask(word)) for scene in scenes.values() for word in scene.words]
            rows = [(n, name) for n, scene in scenes.items() for name in scene.words.values()]
            write(path, "Maps", {"maps": maps, "masks": torch.stack(masks)}, {"rows": rows})
        file = File(path, "Maps")
        return file.read("maps"), file.read("masks"), file.metadata["rows"]

    def _maps(self, number, scene):
        """Return maps (kind, timestep, word, layer, row, column) of a scene, of one noise."""
        by_timestep = []
        for timestep in self.timesteps:
            generator = al.seed(number)
            recording = al.record_image(
                self.pipe, scene.image, scene.caption, timesteps=timestep, layers="all", generator=generator
            )
            by_timestep.append([of(self.pipe, recording, list(scene.words)) for of in MAP_KINDS.values()])
        arrays = [
            [np.stack([np.stack([layer[word] for layer in maps.values()]) for word in scene.words]) for maps in kinds]
            for kinds in by_timestep
        ]
        return torch.from_numpy(np.array(arrays)).transpose(0, 1).contiguous()

    def readings(self, layers: int) -> list[Reading]:
        """List every reading of a model of so many layers."""
        runs, whole = list(combinations_with_replacement(range(layers), 2)), [(0, layers - 1)]
        of_kinds = [(kind, whole if kind == "agreement" else runs) for kind in MAP_KINDS]  # which weighs layers itself
        return [Reading(kind, *run, t) for kind, some in of_kinds for run in some for t in (*self.timesteps, None)]

    def cases(self, found: _Found, reading: Reading) -> list[WordCase]:
        """Return the words of scenes with their maps by a reading, each resized to its mask."""
        of_kind = found.maps[list(MAP_KINDS).index(reading.kind), :, :, reading.first : reading.last + 1].mean(2)
        small = of_kind.mean(0) if reading.timestep is None else of_kind[self.timesteps.index(reading.timestep)]
        heats, masks = resize(small[:, None], found.masks.shape[1:], "bicubic")[:, 0].numpy(), found.masks.numpy()
        others = [found.another(k) for k in range(len(heats))]
        return [
            WordCase(*row, heat, mask, None if k is None else heats[k])
            for row, heat, mask, k in zip(found.rows, heats, masks, others, strict=True)
        ]

    def run(self) -> dict:
        """Return what was chosen, of every kind and of all, and IoU and pointing game of readings on other scenes."""
        self.claim()
        tuning, tests = self.find(FIRST_CHOSEN_ON, self.tuning), self.find(FIRST_REPORTED, self.tests)
        layers, scores = tuning.maps.shape[3], {}
        for reading in tqdm(self.readings(layers), desc="readings"):
            heats, truths = zip(*((c.heat, c.truth) for c in self.cases(tuning, reading)), strict=True)
            scores[reading] = float(metrics.miou_curve(heats, truths).mean(1).max())
        best = {kind: max((r for r in scores if r.kind == kind), key=scores.get) for kind in MAP_KINDS}
        shown = [r for r in scores if r.first == r.last or r.last - r.first == layers - 1 or r in best.values()]
        rows = [self._reported(r, scores[r], tuning, tests) for r in tqdm(shown, desc="reported")]
        for row in rows:
            if not any(row.items() >= reading._asdict().items() for reading in best.values()):
                del row["classes"]  # of which there are many
        chosen = {kind: r._asdict() for kind, r in best.items()}
        return {"chosen": chosen, "chosen of all": max(best.values(), key=scores.get)._asdict(), "readings": rows}

    def _reported(self, reading, score, tuning, tests):
        found = summarize_cases(self.cases(tuning, reading), self.cases(tests, reading))
        return {**reading._asdict(), "IoU on tuning scenes": score, **found}


def readings_table(found: dict) -> str:
    """Tabulate the readings: IoU and pointing game of scenes that chose nothing, with intervals; * are chosen."""
    head, rows = ["map", "layers", "timestep", "IoU", "of another class", "pointing game"], []
    for one in found["readings"]:
        reading = {name: one[name] for name in Reading._fields}
        layers = str(one["first"]) if one["first"] == one["last"] else f"{one['first']} to {one['last']}"
        star = " *" if reading in found["chosen"].values() else ""
        where = [one["kind"] + star, layers, one["timestep"] or "all"]
        rows.append(
            [*where, _with_interval(one, "word iou"), one["shuffled word iou"], _with_interval(one, "word pointing")]
        )
    return markdown_table(head, rows)


def _with_interval(one, name):
    low, high = one[f"{name} interval"]
    return f"{one[name]:.3f} ({low:.3f} to {high:.3f})"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-mmdit", help="as load_pipeline takes it")
    parser.add_argument("--tuning", type=int, default=JointMapsStudy.tuning, help="scenes that choose")
    parser.add_argument("--tests", type=int, default=JointMapsStudy.tests, help="scenes that are reported")
    parser.add_argument("--timesteps", type=int, nargs="+", default=_TIMESTEPS, help="of 1000")
    parser.add_argument("--work", type=Path, default=Path("runs/joint_maps"), help="folder of maps")
    parser.add_argument("--out", type=Path, default=JOINT_MAPS_RESULTS, help="file of results")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    pipe = al.load_pipeline(given.model)
    study = JointMapsStudy(pipe, given.work, given.tuning, given.tests, tuple(given.timesteps))
    found = {"model": str(given.model), "tuning scenes": given.tuning, "scenes": given.tests, **study.run()}
    write_text(given.out, json.dumps(found, indent=1) + "\n")
    _log.info("%s", readings_table(found))


if __name__ == "__main__":
    main()
