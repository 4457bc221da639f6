"""Train joint models of aerial scenes and their reference segmenter; an interrupted stage is continued.

    python -m experiments.bundled.train_aerial segmenter       # the reference segmenter, of 6,000 scenes
    python -m experiments.bundled.train_aerial joint 25 100    # joint models of exactly 25 and of 100 scenes
    python -m experiments.bundled.train_aerial enlarge 100     # one that makes pairs twice as large
    python -m experiments.bundled.train_aerial compare 100     # predictions and codes, trained for a short time
    python -m experiments.bundled.train_aerial measure 25 100  # draw pairs and measure how good they are
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
from attnlab.joint import JointDiffusion, class_proportions
from attnlab.pipelines import BUNDLED, seed
from attnlab.scenes import aerial
from attnlab.segmentation import Segmenter, shrink, train_segmenter
from attnlab.segmentation.folders import Pairs
from attnlab.storage import replacing

from ..studies import pair_quality
from . import cards, shipping

__all__ = ["AERIAL_PRESETS", "COMPARED_TIMESTEPS", "FIRST_SEGMENTER_SEED", "FIRST_TEST_SEED", "FIRST_VALIDATION_SEED"]
__all__ += ["AerialPreset", "AerialTraining", "main", "measured"]

_log = logging.getLogger(__name__)
_NUM_CLASSES = len(aerial.CLASSES)
FIRST_SEGMENTER_SEED = 100_000  # of the scenes that the segmenter learns from
FIRST_VALIDATION_SEED = aerial.HELD_OUT + 100_000
FIRST_TEST_SEED = aerial.HELD_OUT + 200_000
_VARIANTS = {  # none of them is conditioned on class proportions
    "clean, bits": {},
    "v, bits": {"prediction": "v_prediction"},
    "epsilon, bits": {"prediction": "epsilon"},
    "clean, one-hot": {"codes": "one-hot"},
    "clean, bits, never its own guess": {"self_conditioning": False},
}
COMPARED_TIMESTEPS = (100, 300, 500, 700, 900)  # of 1000, at which x0 predictions of variants are compared


@dataclass(frozen=True)
class AerialPreset:
    """How large a joint model is, and for how long it and the segmenter are trained."""

    size: int = 64
    channels: tuple[int, ...] = (64, 96, 160)
    shuffle: int = 2
    enlarger_channels: tuple[int, ...] = (32, 64, 96)  # channels of the model that makes pairs twice as large
    batch: int = 16
    segmenter_scenes: int = 6000
    segmenter_steps: int = 5000
    variant_steps: int = 200  # of each variant that is compared
    validation_scenes: int = 100  # whose error decides when to stop training a joint model
    enlarger_steps: int = 1500
    schedule: training.Schedule = field(  # of a joint model of 100 scenes: see `steps_of`
        default=training.Schedule(steps=4500, lr=8e-4, weight_decay=1e-4, checkpoint=250)
    )

    def steps_of(self, count: int) -> int:
        """Return the steps of a joint model of `count` scenes: with more scenes, memorizing them takes longer."""
        return max(1, round(self.schedule.steps * (count / 100) ** 0.75))


def measured() -> dict:
    """Read what was measured of the bundled joint models, by stage and number of scenes."""
    return json.loads((BUNDLED / "aerial/measured.json").read_text("utf-8"))


AERIAL_PRESETS = {
    "cpu": AerialPreset(),
    "gpu": AerialPreset(
        shuffle=1,
        batch=256,
        segmenter_scenes=20_000,
        segmenter_steps=20_000,
        enlarger_steps=5000,
        schedule=training.Schedule(10_000, 8e-4, ema=0.9995),
    ),
}


@dataclass(frozen=True)
class AerialTraining:
    """The training of all aerial models in the folder `work`."""

    preset: AerialPreset
    work: Path
    device: torch.device

    def scenes(self, first: int, count: int, scale: int = 1) -> Pairs:
        """Render images and labels of the seeds first, first + 1, ..., `scale` times as large."""
        found = [aerial.render(s, self.preset.size * scale) for s in range(first, first + count)]
        return np.stack([s.image for s in found]), np.stack([s.labels for s in found])

    def segmenter(self) -> Segmenter:
        """Return the reference segmenter, trained if it is not there yet."""
        folder = self.work / "segmenter"
        if not (folder / "classes.json").exists():
            pairs = self.scenes(FIRST_SEGMENTER_SEED, self.preset.segmenter_scenes)
            options = {"architecture": "unet", "augmentations": ("rotate90", "color"), "lr": 2e-3}
            options |= {"steps": self.preset.segmenter_steps, "device": self.device}
            train_segmenter(*pairs, aerial.CLASSES, **options).save_pretrained(folder)
        return Segmenter.from_pretrained(folder, self.device)

    def joint(self, count: int, variant: str = "") -> JointDiffusion:
        """Train a joint model of `count` scenes, or continue; a variant is trained for a short time."""
        preset, pairs = self.preset, self.scenes(0, count)
        options = {"channels": preset.channels, "shuffle": preset.shuffle, "proportions": not variant}
        options |= _VARIANTS.get(variant, {})
        model = JointDiffusion.new(*pairs, aerial.CLASSES, **options)
        schedule = replace(preset.schedule, steps=preset.steps_of(count))
        if variant:
            schedule = replace(schedule, steps=preset.variant_steps, ema=0.99)
        return self._fitted(model, pairs, f"joint{count}{variant and f' {variant}'}", schedule, 1)

    def enlarger(self, count: int) -> JointDiffusion:
        """Train a model of `count` scenes that makes pairs twice as large, or continue."""
        preset, pairs = self.preset, self.scenes(0, count, 2)
        options = {"channels": preset.enlarger_channels, "shuffle": 2 * preset.shuffle, "upscale": 2}
        model = JointDiffusion.new(*pairs, aerial.CLASSES, self_conditioning=False, **options)
        schedule = replace(preset.schedule, steps=preset.enlarger_steps)
        return self._fitted(model, pairs, f"enlarge{count}", schedule, 2)

    def _fitted(self, model, pairs, name, schedule, scale):
        model.unet.to(self.device)
        check = self.scenes(FIRST_VALIDATION_SEED, self.preset.validation_scenes, scale)
        return model.fit(*pairs, self.work / name, schedule, batch=self.preset.batch, check=check)

    def compare(self, count: int, samples: int = 100) -> dict:
        """Measure each variant: errors of its x0 predictions of validation scenes by timestep, IoU of its samples.

        Errors of colors are root mean squares in 0..1, those of labels fractions of pixels with another class.
        """
        images, labels = self.scenes(FIRST_VALIDATION_SEED, samples)
        found = {}
        for name in _VARIANTS:
            model = self.joint(count, name)
            x0, generator, off = model.codec.encode(images, labels)[0], seed(0), {"colors": [], "labels": []}
            for time in COMPARED_TIMESTEPS:
                predicted = model.predict_x0(model.add_noise(x0, time, generator).to(self.device), time)
                colors, classes, _ = model.codec.decode(predicted)
                off["colors"].append(float(np.sqrt(((colors / 255.0 - images / 255.0) ** 2).mean())))
                off["labels"].append(float((classes != labels).mean()))
            drawn, classes, _ = model.sample(samples, seed(0))
            found[name] = off | {"judge on samples": pair_quality.agreement(self.segmenter(), drawn, classes).tolist()}
        return {"scenes": count, "steps": self.preset.variant_steps, "times": COMPARED_TIMESTEPS, "variants": found}

    def enlarge(self, count: int, tests: int = 50) -> dict:
        """Measure how well the enlarger restores held-out scenes, and how well repeating pixels does."""
        model, large = self.enlarger(count), self.scenes(FIRST_TEST_SEED, tests, 2)
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
        """Measure the pairs that a joint model of `count` scenes draws, beside held-out scenes.

        `asked` pairs are conditioned on the class proportions of held-out scenes, and as many are unconditional.
        """
        segmenter, real = self.segmenter(), self.scenes(0, count)
        images, labels = self.scenes(FIRST_TEST_SEED, tests)
        model = self.joint(count)
        drawn, found, margins = model.sample(samples, seed(0))
        wanted = class_proportions(labels[:asked], _NUM_CLASSES)
        conditional, unconditional = (
            class_proportions(model.sample(asked, seed(1), proportions=x)[1], _NUM_CLASSES)
            for x in (wanted, np.full(_NUM_CLASSES, np.nan))
        )
        of_found, shuffled = class_proportions(found, _NUM_CLASSES), pair_quality.shuffled(found)
        of_tests, of_drawn = (pair_quality.features(segmenter, x) for x in (images, drawn))
        half = pair_quality.features(segmenter, self.scenes(FIRST_VALIDATION_SEED, samples)[0])
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
                "scenes learned from": class_proportions(real[1], _NUM_CLASSES).mean(0).tolist(),
                "samples": of_found.mean(0).tolist(),
                "samples, standard error": stats.sem(of_found).tolist(),
                "samples without a word": unconditional.mean(0).tolist(),
                "samples without a word, standard error": stats.sem(unconditional).tolist(),
            },
            "class shares off those of a held-out scene, mean": {
                "asked for": abs(conditional - wanted).mean(0).tolist(),
                "not asked for": abs(unconditional - wanted).mean(0).tolist(),
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
        """Make the models of `count` scenes, the segmenter and all measurements so far the bundled ones."""
        kept = {"aerial": self.joint(count), "aerial-x2": self.enlarger(count)}
        for name, model in kept.items():
            model.save_pretrained(BUNDLED / name)
        self.segmenter().save_pretrained(BUNDLED / "aerial-segmenter", torch.float16)
        shipping.thin_curve([self.work / f"joint{count}/curve.csv"], BUNDLED / "aerial/curve.csv")
        shutil.copy(self.work / "measured.json", BUNDLED / "aerial")
        for name, text in cards.joint_tables(measured(), aerial.CLASSES).items():
            cards.write_card(BUNDLED / name, text)


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("segmenter", "joint", "enlarge", "compare", "measure", "ship"))
    parser.add_argument("counts", nargs="*", type=int, help="scenes of each joint model")
    parser.add_argument("--preset", choices=AERIAL_PRESETS, default="cpu")
    parser.add_argument("--work", default="runs/aerial", type=Path, help="folder of checkpoints and results")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args(given)
    if (given.stage == "segmenter") == bool(given.counts):
        parser.error("segmenter takes no numbers of scenes, the other stages one or more")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    models = AerialTraining(AERIAL_PRESETS[given.preset], given.work, torch.device(given.device))
    if given.stage == "segmenter":
        models.segmenter()
    for count in given.counts:
        found = getattr(models, given.stage)(count)
        if isinstance(found, dict):
            _log.info(json.dumps(found, indent=1, ensure_ascii=False))
            _keep(models.work / "measured.json", f"{given.stage} {count}", found)


def _keep(path, name, found):
    """Add a measurement to the file of all measurements."""
    before = json.loads(path.read_text("utf-8")) if path.exists() else {}
    with replacing(path) as part:
        part.write_text(json.dumps(before | {name: found}, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
