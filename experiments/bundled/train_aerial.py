"""Train joint models of aerial scenes and their reference segmenter; an interrupted stage is continued.

    python -m experiments.bundled.train_aerial segmenter       # the reference segmenter that saw 6,000 scenes
    python -m experiments.bundled.train_aerial joint 25 100    # joint models of exactly 25 and of 100 scenes
    python -m experiments.bundled.train_aerial enlarge 100     # one that makes pairs twice as large
    python -m experiments.bundled.train_aerial compare 100     # predictions and codes, trained for a short time
    python -m experiments.bundled.train_aerial measure 25 100  # draw pairs and say how good they are
    python -m experiments.bundled.train_aerial ship 100        # the models of 100 scenes become the bundled ones

A joint model of n scenes saw the seeds 0 to n - 1. When to stop is decided on validation scenes, of which the
segmenter and the joint models saw none.
"""

import argparse
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from attnlab import training
from attnlab.joint import JointDiffusion, class_shares
from attnlab.pipelines import BUNDLED, seed
from attnlab.scenes import aerial
from attnlab.segmentation import Segmenter, shrink, train_segmenter
from attnlab.segmentation.folders import Pairs

from ..studies import pair_quality
from . import cards, shipping

log = logging.getLogger(__name__)
COUNT = len(aerial.CLASSES)
JUDGED = 100_000  # first seeds: of the segmenter's scenes
VALIDATION = aerial.HELD_OUT + 100_000
TESTS = aerial.HELD_OUT + 200_000
VARIANTS = {  # none of them is told shares of classes
    "clean, bits": {},
    "v, bits": {"prediction": "v_prediction"},
    "epsilon, bits": {"prediction": "epsilon"},
    "clean, one-hot": {"codes": "one-hot"},
    "clean, bits, never its own guess": {"self_conditioning": False},
}
TIMES = (100, 300, 500, 700, 900)  # of 1000, at which guesses of variants are compared


@dataclass(frozen=True)
class Preset:
    """How large a joint model is, and for how long it and the segmenter are trained."""

    size: int = 64
    channels: tuple[int, ...] = (64, 96, 160)
    shuffle: int = 2
    enlarging: tuple[int, ...] = (32, 64, 96)  # channels of the model that makes pairs twice as large
    batch: int = 16
    judged: int = 6000  # scenes
    steps: int = 5000  # of the segmenter
    short: int = 200  # steps of each variant that is compared
    checked: int = 100  # validation scenes that say when a joint model has learned enough
    enlarged: int = 1500  # steps of the model that makes pairs twice as large
    schedule: training.Schedule = field(  # of a joint model of 100 scenes: see `steps_of`
        default=training.Schedule(steps=4500, lr=8e-4, weight_decay=1e-4, checkpoint=250)
    )

    def steps_of(self, count: int) -> int:
        """Steps of a joint model of so many scenes: more scenes bear longer training before it learns them by heart."""
        return max(1, round(self.schedule.steps * (count / 100) ** 0.75))


def measured() -> dict:
    """What was measured of the bundled joint models: by stage and number of scenes."""
    return json.loads((BUNDLED / "aerial/measured.json").read_text("utf-8"))


PRESETS = {
    "cpu": Preset(),
    "gpu": Preset(
        shuffle=1,
        batch=256,
        judged=20_000,
        steps=20_000,
        enlarged=5000,
        schedule=training.Schedule(10_000, 8e-4, ema=0.9995),
    ),
}


@dataclass(frozen=True)
class Run:
    """Training in a folder."""

    preset: Preset
    work: Path
    device: torch.device

    def scenes(self, first: int, count: int, scale: int = 1) -> Pairs:
        """Images and labels of seeds first, first + 1, ..., so many times as large."""
        found = [aerial.render(s, self.preset.size * scale) for s in range(first, first + count)]
        return np.stack([s.image for s in found]), np.stack([s.labels for s in found])

    def segmenter(self) -> Segmenter:
        """Return the reference segmenter, trained if it is not there yet."""
        folder = self.work / "segmenter"
        if not (folder / "classes.json").exists():
            pairs = self.scenes(JUDGED, self.preset.judged)
            options = {"architecture": "unet", "augmentations": ("rotate90", "color"), "lr": 2e-3}
            options |= {"steps": self.preset.steps, "device": self.device}
            train_segmenter(*pairs, aerial.CLASSES, **options).save_pretrained(folder)
        return Segmenter.from_pretrained(folder, self.device)

    def joint(self, count: int, variant: str = "") -> JointDiffusion:
        """A joint model of so many scenes, trained to its end; of VARIANTS, for a short time."""
        preset, pairs = self.preset, self.scenes(0, count)
        options = {"channels": preset.channels, "shuffle": preset.shuffle, "shares": not variant}
        options |= VARIANTS.get(variant, {})
        model = JointDiffusion.new(*pairs, aerial.CLASSES, **options)
        schedule = replace(preset.schedule, steps=preset.steps_of(count))
        if variant:
            schedule = replace(schedule, steps=preset.short, ema=0.99)
        return self._fitted(model, pairs, f"joint{count}{variant and f' {variant}'}", schedule, 1)

    def enlarger(self, count: int) -> JointDiffusion:
        """A model of so many scenes that makes pairs twice as large, trained to its end."""
        preset, pairs = self.preset, self.scenes(0, count, 2)
        options = {"channels": preset.enlarging, "shuffle": 2 * preset.shuffle, "upscale": 2}
        model = JointDiffusion.new(*pairs, aerial.CLASSES, self_conditioning=False, **options)
        schedule = replace(preset.schedule, steps=preset.enlarged)
        return self._fitted(model, pairs, f"enlarge{count}", schedule, 2)

    def _fitted(self, model, pairs, name, schedule, scale):
        model.unet.to(self.device)
        check = self.scenes(VALIDATION, self.preset.checked, scale)
        return model.fit(*pairs, self.work / name, schedule, batch=self.preset.batch, check=check)

    def compare(self, count: int, samples: int = 100) -> dict:
        """Measure each variant: errors of its x0 predictions of validation scenes at TIMES, IoU of its samples.

        Colors as root mean square error in 0..1, labels as the share of pixels with another class.
        """
        images, labels = self.scenes(VALIDATION, samples)
        found = {}
        for name in VARIANTS:
            model = self.joint(count, name)
            planes, generator, off = model.planes.encode(images, labels)[0], seed(0), {"colors": [], "labels": []}
            for time in TIMES:
                guess = model.guess(model.add_noise(planes, time, generator).to(self.device), time)
                colors, classes, _ = model.planes.decode(guess)
                off["colors"].append(float(np.sqrt(((colors / 255.0 - images / 255.0) ** 2).mean())))
                off["labels"].append(float((classes != labels).mean()))
            drawn, classes, _ = model.sample(samples, seed(0))
            found[name] = off | {"judge on samples": pair_quality.agreement(self.segmenter(), drawn, classes).tolist()}
        return {"scenes": count, "steps": self.preset.short, "times": TIMES, "variants": found}

    def enlarge(self, count: int, tests: int = 50) -> dict:
        """What the enlarger does to held-out scenes, beside what repeating pixels does."""
        model, large = self.enlarger(count), self.scenes(TESTS, tests, 2)
        small = shrink(*large, 2)
        images, labels, _ = model.sample(tests, seed(0), small=small)
        repeated = [x.repeat(2, 1).repeat(2, 2) for x in small]
        return {"scenes": count, "tests": tests} | {
            name: {
                "colors, root mean square error": float(np.sqrt(((x[0] / 255.0 - large[0] / 255.0) ** 2).mean())),
                "pixels of another class": float((x[1] != large[1]).mean()),
            }
            for name, x in (("enlarged", (images, labels)), ("pixels repeated", repeated))
        }

    def measure(self, count: int, samples: int = 500, tests: int = 400, asked: int = 200) -> dict:
        """Quality of the pairs that a joint model of so many scenes draws, beside held-out scenes.

        `asked` pairs are asked for the class shares of held-out scenes, and as many without a word about shares.
        """
        segmenter, real = self.segmenter(), self.scenes(0, count)
        images, labels = self.scenes(TESTS, tests)
        model = self.joint(count)
        drawn, found, margins = model.sample(samples, seed(0))
        wanted = class_shares(labels[:asked], COUNT)
        told, untold = (
            class_shares(model.sample(asked, seed(1), shares=x)[1], COUNT) for x in (wanted, np.full(COUNT, np.nan))
        )
        of_found, shuffled = class_shares(found, COUNT), pair_quality.shuffled(found)
        of_tests, of_drawn = (pair_quality.features(segmenter, x) for x in (images, drawn))
        half = pair_quality.features(segmenter, self.scenes(VALIDATION, samples)[0])
        return {
            "scenes": count,
            "samples": samples,
            "tests": tests,
            "IoU of the judge": {
                "held-out scenes": pair_quality.agreement(segmenter, images, labels).tolist(),
                "samples": pair_quality.agreement(segmenter, drawn, found).tolist(),
                "samples, shuffled masks": pair_quality.agreement(segmenter, drawn, shuffled).tolist(),
            },
            "class shares": {
                "scenes learned from": class_shares(real[1], COUNT).mean(0).tolist(),
                "samples": of_found.mean(0).tolist(),
                "samples, standard error": stats.sem(of_found).tolist(),
                "samples without a word": untold.mean(0).tolist(),
                "samples without a word, standard error": stats.sem(untold).tolist(),
            },
            "class shares off those of a held-out scene, mean": {
                "asked for": abs(told - wanted).mean(0).tolist(),
                "not asked for": abs(untold - wanted).mean(0).tolist(),
            },
            "median distance to the nearest scene learned from": {
                "held-out scenes": float(np.median(pair_quality.nearest(images, real[0])[0])),
                "samples": float(np.median(pair_quality.nearest(drawn, real[0])[0])),
            },
            "Fréchet distance to held-out scenes, the judge's encoder": {
                "other scenes": pair_quality.frechet_distance(of_tests, half),
                "samples": pair_quality.frechet_distance(of_tests, of_drawn),
            },
            "pixels with margin below 0.9": float((margins < 0.9).mean()),
            "held-out error": training.checks(self.work / f"joint{count}"),
        }

    def ship(self, count: int) -> None:
        """The models of so many scenes, the segmenter and all measures so far, in half precision, as bundled models."""
        kept = {"aerial": self.joint(count), "aerial-x2": self.enlarger(count)}
        for name, model in kept.items():
            model.save_pretrained(BUNDLED / name)
        self.segmenter().save_pretrained(BUNDLED / "aerial-segmenter", torch.float16)
        shipping.thin_curve(self.work / f"joint{count}/curve.csv", BUNDLED / "aerial/curve.csv")
        shutil.copy(self.work / "measured.json", BUNDLED / "aerial")
        for name, text in cards.joint_tables(measured(), aerial.CLASSES).items():
            cards.write_card(BUNDLED / name, text)


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("segmenter", "joint", "enlarge", "compare", "measure", "ship"))
    parser.add_argument("counts", nargs="*", type=int, help="scenes of each joint model")
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--work", default="runs/aerial", type=Path, help="folder of checkpoints and results")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args(given)
    if (given.stage == "segmenter") == bool(given.counts):
        parser.error("segmenter takes no numbers of scenes, the other stages one or more")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run = Run(PRESETS[given.preset], given.work, torch.device(given.device))
    if given.stage == "segmenter":
        run.segmenter()
    for count in given.counts:
        found = getattr(run, given.stage)(count)
        if isinstance(found, dict):
            log.info(json.dumps(found, indent=1, ensure_ascii=False))
            _keep(run.work / "measured.json", f"{given.stage} {count}", found)


def _keep(path, name, found):
    """Add what was measured to a file of all measures."""
    before = json.loads(path.read_text("utf-8")) if path.exists() else {}
    part = path.with_suffix(".part")
    part.write_text(json.dumps(before | {name: found}, indent=1, ensure_ascii=False) + "\n", "utf-8")
    part.replace(path)


if __name__ == "__main__":
    main()
