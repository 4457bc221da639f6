"""Train joint models of aerial scenes and the segmenter that judges them; an interrupted stage is continued.

    python -m attnlab.tiny.aerial judge           # a segmenter that saw 1,500 scenes
    python -m attnlab.tiny.aerial joint 25 100    # joint models of exactly 25 and of 100 scenes
    python -m attnlab.tiny.aerial measure 100     # draw pairs and say how good they are

A joint model of n scenes saw the seeds 0 to n - 1. When to stop is decided on validation scenes, of which the judge and
the joint models saw none.
"""

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import SegformerForSemanticSegmentation

from .. import segment, training
from ..joint import JointDiffusion, quality
from ..pipelines import seed
from ..scenes import aerial

log = logging.getLogger(__name__)
COUNT = len(aerial.CLASSES)
JUDGED = 100_000  # first seeds: of the judge's scenes
VALIDATION = aerial.HELD_OUT + 100_000
TESTS = aerial.HELD_OUT + 200_000


@dataclass(frozen=True)
class Preset:
    """How large a joint model is, and for how long it and the judge are trained."""

    size: int = 64
    channels: tuple[int, ...] = (64, 96, 128)
    shuffle: int = 2
    batch: int = 16
    judged: int = 1500  # scenes
    steps: int = 2500  # of the judge
    schedule: training.Schedule = field(
        default=training.Schedule(steps=4000, rate=8e-4, weight_decay=1e-4, checkpoint=500)
    )


PRESETS = {
    "cpu": Preset(),
    "gpu": Preset(shuffle=1, batch=256, steps=4000, schedule=training.Schedule(10_000, 8e-4, ema=0.9995)),
}


@dataclass(frozen=True)
class Run:
    """Training in a folder."""

    preset: Preset
    work: Path
    device: torch.device

    def scenes(self, first: int, count: int) -> segment.Pairs:
        """Images and labels of seeds first, first + 1, ..."""
        found = [aerial.render(s, self.preset.size) for s in range(first, first + count)]
        return np.stack([s.image for s in found]), np.stack([s.labels for s in found])

    def judge(self) -> SegformerForSemanticSegmentation:
        """The judge, trained if it is not there yet."""
        folder = self.work / "judge"
        if not (folder / "config.json").exists():
            pairs, steps = self.scenes(JUDGED, self.preset.judged), self.preset.steps
            model = segment.train(*pairs, COUNT, ways=("turn",), steps=steps, device=self.device)
            model.save_pretrained(folder)
        return SegformerForSemanticSegmentation.from_pretrained(folder).to(self.device).eval()

    def joint(self, count: int) -> JointDiffusion:
        """A joint model of so many scenes, trained to its end."""
        preset, pairs = self.preset, self.scenes(0, count)
        model = JointDiffusion.new(*pairs, aerial.CLASSES, channels=preset.channels, shuffle=preset.shuffle)
        model.unet.to(self.device)
        check = self.scenes(VALIDATION, 100)
        return model.fit(*pairs, self.work / f"joint{count}", preset.schedule, batch=preset.batch, check=check)

    def measure(self, count: int, samples: int = 300, tests: int = 400) -> dict:
        """Quality of the pairs that a joint model of so many scenes draws, beside held-out scenes."""
        judge, (images, labels), real = self.judge(), self.scenes(TESTS, tests), self.scenes(0, count)
        drawn, found, margins = self.joint(count).sample(samples, seed(0))
        of_tests, of_drawn = (quality.features(judge, x) for x in (images, drawn))
        half = quality.features(judge, self.scenes(VALIDATION, samples)[0])
        return {
            "scenes": count,
            "samples": samples,
            "IoU of the judge": {
                "held-out scenes": quality.agreement(judge, images, labels, COUNT).tolist(),
                "samples": quality.agreement(judge, drawn, found, COUNT).tolist(),
                "samples, shuffled masks": quality.agreement(judge, drawn, quality.shuffled(found), COUNT).tolist(),
            },
            "class shares": {
                "scenes learned from": quality.class_shares(real[1], COUNT).tolist(),
                "samples": quality.class_shares(found, COUNT).tolist(),
            },
            "median distance to the nearest scene learned from": {
                "held-out scenes": float(np.median(quality.nearest(images, real[0]))),
                "samples": float(np.median(quality.nearest(drawn, real[0]))),
            },
            "Fréchet distance to held-out scenes, the judge's encoder": {
                "other scenes": quality.frechet_distance(of_tests, half),
                "samples": quality.frechet_distance(of_tests, of_drawn),
            },
            "pixels with margin below 0.9": float((margins < 0.9).mean()),
        }


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("judge", "joint", "measure"))
    parser.add_argument("counts", nargs="*", type=int, help="scenes of each joint model")
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--work", default="runs/aerial", type=Path, help="folder of checkpoints and results")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args(given)
    if (given.stage == "judge") == bool(given.counts):
        parser.error("judge takes no numbers of scenes, the other stages one or more")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run = Run(PRESETS[given.preset], given.work, torch.device(given.device))
    if given.stage == "judge":
        run.judge()
    for count in given.counts:
        if given.stage == "joint":
            run.joint(count)
        else:
            found = json.dumps(run.measure(count), indent=1, ensure_ascii=False)
            (run.work / f"measured{count}.json").write_text(found + "\n", "utf-8")
            log.info(found)


if __name__ == "__main__":
    main()
