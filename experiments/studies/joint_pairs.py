"""What pairs of a joint model are worth, in the manner of SatSynth's study (PROTOCOLS: Toker et al., CVPR 2024).

A joint model learned from n scenes with masks, and nothing else. A segmenter learns from the same n scenes, alone or
with R drawn pairs for each of them. Validation scenes choose how to mix and how to augment, tests take no part in it.

    python -m experiments.studies.joint_pairs           # all of it, into experiments/results/joint_pairs.json
"""

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from attnlab.masks import IGNORE
from attnlab.metrics import class_ious
from attnlab.pipelines import seed
from attnlab.scenes import aerial
from attnlab.segmentation import train_segmenter

from ..bundled.train_aerial import PRESETS, TESTS, VALIDATION, Run
from .jobs import claim, run_arms

MORE = 200_000  # first seed of further scenes, which nobody has but the arms that say so
FIRST = "geometry and color"  # augmentation while ways of mixing are compared
MIXES = ("half", "pool", "pretrain", "half, ignore band")
BAND = 0.9  # pixels of drawn pairs with a smaller margin do not count, where the mix says so
OPTIONS = {"architecture": "unet", "batch": 8, "lr": 2e-3, "progress": False}  # of every segmenter
BASIC = ("rotate90", "crop", "color")
WAYS = {"flips": (), "geometry and color": BASIC, "CutMix": (*BASIC, "cutmix"), "Copy-Paste": (*BASIC, "copy-paste")}
ADDED = {
    "": "nothing",
    "drawn": "pairs drawn by the joint model of the same scenes",
    "drawn, segmented": "their images, with the masks of a segmenter of the same scenes",
    "drawn, judged": "their images, with the masks of the judge, which saw thousands of other scenes",
    "rendered": "as many further scenes: exact",
}
log = logging.getLogger(__name__)
RECORD = Path(__file__).parents[1] / "results" / "joint_pairs.json"


@dataclass(frozen=True)
class Study:
    """What is compared.

    sizes : scenes that the joint model and the segmenter learn from
    ratios : drawn pairs for each of them
    tried : the size at which ways of mixing and of augmenting are compared, for all sizes
    trial : the ratio at which they, and kinds of masks, are compared
    tries : seeds of what is compared on validation scenes
    seeds : of everything else
    steps : of each segmenter; with fewer it is training that is scarce, not labels
    """

    sizes: tuple[int, ...] = (25, 50, 100)
    ratios: tuple[int, ...] = (1, 2, 3, 4, 5)
    tried: int = 25
    trial: int = 3
    tries: int = 2
    seeds: int = 5
    steps: int = 800
    validation: int = 200
    tests: int = 400

    def run(self, work: str | Path, workers: int = 2) -> dict:
        """Draw pairs, compare on validation scenes, then train the rest; write and return work/study/record.json.

        `work` is the folder of `experiments.bundled.train_aerial`, with the judge and the joint models of all sizes.
        """
        work = Path(work)
        folder = work / "study"
        settings = claim(folder, self)
        self.draw(work, self.tried)
        found = self._trained(work, workers, self.trials())
        mix, way = self.choose(found)
        for n in self.sizes:
            self.draw(work, n)
            found |= self._trained(work, workers, self.finals(n, mix, way))
        arms = [dict(zip(("scenes", "added", "ratio", "mix", "way", "seed"), arm, strict=True)) | {
            kind: class_ious(confusion).tolist() for kind, confusion in one.items()
        } for arm, one in found.items()]  # fmt: skip
        record = {"study": settings, "mix": mix, "way": way, "arms": arms}
        (folder / "record.json").write_text(json.dumps(record, indent=1) + "\n")
        return record

    def trials(self) -> list[tuple]:
        """Arms that decide: ways of mixing at one ratio, augmentations without drawn pairs."""
        n = self.tried
        arms = [(n, "drawn", self.trial, mix, FIRST) for mix in MIXES] + [(n, "", 0, "half", way) for way in WAYS]
        return [(*arm, s) for arm in arms for s in range(self.tries)]

    def finals(self, n: int, mix: str, way: str) -> list[tuple]:
        """Scenes alone, drawn pairs at every ratio, with masks exchanged, then images as well; all augmented alike."""
        ratios = {"": (0,), "drawn": self.ratios}
        arms = [(n, kind, r, mix_of(kind, mix), way) for kind in ADDED for r in ratios.get(kind, (self.trial,))]
        return [(*arm, s) for arm in arms for s in range(self.seeds)]

    def choose(self, found: dict) -> tuple[str, str]:
        """The mix and the augmentation with the highest mIoU on validation scenes, mean over tries."""
        scores = {arm: np.mean([_miou(found[*arm[:-1], s]["validation"]) for s in range(self.tries)]) for arm in found}
        best = [max((arm for arm in found if arm[1] == added), key=scores.get) for added in ("drawn", "")]
        return best[0][3], best[1][4]

    def draw(self, work: Path, n: int) -> None:
        """As many pairs as the highest ratio wants, drawn once for each size, and others' masks of their images."""
        path = work / "study" / f"drawn {n}.npz"
        if path.exists():
            return
        run = Run(PRESETS["cpu"], work, torch.device("cpu"))
        images, labels, margins = run.joint(n).sample(n * max(self.ratios), seed(n))
        own = train_segmenter(*_scenes(0, n), aerial.CLASSES, augmentations=BASIC, steps=self.steps, **OPTIONS)
        masks = {"segmented": own.segment(images), "judged": run.segmenter().segment(images)}
        part = path.with_name("drawn.part.npz")
        np.savez(part, images=images, labels=labels, margins=margins, **masks)
        part.replace(path)

    def train(self, work: Path, n: int, added: str, ratio: int, mix: str, way: str, s: int) -> dict:
        """Confusions (class, class), pixels of all validation and of all test scenes, of the segmenter of an arm."""
        extra = _extra(work, n, added, n * ratio, BAND if "band" in mix else None) if added else None
        options = OPTIONS | {"mix": mix.split(",")[0], "augmentations": WAYS[way], "steps": self.steps, "seed": s}
        segmenter = train_segmenter(*_scenes(0, n), aerial.CLASSES, extra=extra, **options)
        sets = {"validation": _scenes(VALIDATION, self.validation), "test": _scenes(TESTS, self.tests)}
        return {kind: segmenter.evaluate(*pairs).sum(0).tolist() for kind, pairs in sets.items()}

    def _trained(self, work, workers, arms):
        return dict(zip(arms, run_arms(partial(self.train, work), arms, work / "study" / "arms", workers), strict=True))


def mix_of(added: str, mix: str) -> str:
    """How what is added is mixed, where `mix` was chosen for drawn pairs: further scenes are like the first ones."""
    return {"": "half", "rendered": "pool"}.get(added, mix)


def ious(record: dict, kind: str = "test", **arm) -> np.ndarray:
    """IoU (seed, class) of an arm: `scenes`, `added`, `ratio`, `mix`, `way`; on "validation" or "test" scenes."""
    found = [one for one in record["arms"] if all(one[name] == value for name, value in arm.items())]
    if not found or len({(one["added"], one["ratio"], one["mix"], one["way"]) for one in found}) > 1:
        raise KeyError(f"{len(found)} trainings, of no arm or of several, for {arm}")
    return np.array([one[kind] for one in sorted(found, key=lambda one: one["seed"])], float)


def gain(record: dict, kind: str = "test", **arm) -> np.ndarray:
    """What an arm has over its scenes alone with the same augmentation, (seed, class)."""
    alone = {"scenes": arm["scenes"], "added": "", "ratio": 0, "mix": "half", "way": arm["way"]}
    return ious(record, kind, **arm) - ious(record, kind, **alone)


def by_ratio(record: dict, scenes: int) -> list[np.ndarray]:
    """Test IoU (seed, class) with 0, then with each ratio of drawn pairs, mixed and augmented as chosen."""
    arms = [{"added": "", "ratio": 0, "mix": "half"}]
    arms += [{"added": "drawn", "ratio": ratio, "mix": record["mix"]} for ratio in record["study"]["ratios"]]
    return [ious(record, scenes=scenes, way=record["way"], **arm) for arm in arms]


def table(record: dict) -> list[dict]:
    """Test mIoU of each arm and its gain over the scenes alone, paired by seed; with standard errors over seeds.

    Without the arms that were compared on validation scenes and not chosen: see `trials`.
    """
    rows = []
    for arm in _arms(record):
        if (arm["mix"], arm["way"]) != (mix_of(arm["added"], record["mix"]), record["way"]):
            continue
        if arm["scenes"] not in record["study"]["sizes"]:
            continue
        row = arm | dict(zip(("mIoU", "error"), mean_and_error(ious(record, **arm).mean(1)), strict=True))
        if arm["added"]:
            row |= dict(zip(("gain", "error of gain"), mean_and_error(gain(record, **arm).mean(1)), strict=True))
        rows.append(row)
    return sorted(rows, key=lambda row: (row["scenes"], list(ADDED).index(row["added"]), row["ratio"]))


def trials(record: dict) -> list[dict]:
    """Validation mIoU, mean over tries, of the ways of mixing and of augmenting that were compared."""
    study = record["study"]
    tried = [arm for arm in _arms(record) if arm["scenes"] == study["tried"]]
    tried = [arm for arm in tried if (arm["added"], arm["ratio"]) in (("", 0), ("drawn", study["trial"]))]
    tried = [arm for arm in tried if not arm["added"] or arm["way"] == FIRST]
    return [arm | {"mIoU": float(ious(record, "validation", **arm)[: study["tries"]].mean(1).mean())} for arm in tried]


def _arms(record):
    names = ("scenes", "added", "ratio", "mix", "way")
    found = dict.fromkeys(tuple(one[name] for name in names) for one in record["arms"])
    return [dict(zip(names, values, strict=True)) for values in found]


def mean_and_error(values: np.ndarray) -> tuple[float, float | None]:
    """Mean over seeds, (seed,), and its standard error, if there is more than one."""
    return float(np.mean(values)), float(stats.sem(values)) if len(values) > 1 else None


def _miou(confusion):
    return np.nanmean(class_ious(confusion))


def _extra(work, n, added, count, band):
    if added == "rendered":
        return _scenes(MORE, count)
    with np.load(work / "study" / f"drawn {n}.npz") as file:
        images, labels = file["images"][:count], file[added.split(", ")[1] if ", " in added else "labels"][:count]
        return images, labels if band is None else np.where(file["margins"][:count] < band, IGNORE, labels)


@lru_cache(maxsize=8)
def _scenes(first, count):
    return Run(PRESETS["cpu"], Path(), torch.device("cpu")).scenes(first, count)


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", default="runs/aerial", type=Path, help="folder with the judge and the joint models")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread")
    parser.add_argument("--sizes", type=int, nargs="+", default=Study.sizes, help="scenes that are learned from")
    parser.add_argument("--ratios", type=int, nargs="+", default=Study.ratios, help="drawn pairs for each of them")
    parser.add_argument("--tries", type=int, default=Study.tries, help="seeds of what validation scenes decide")
    given = parser.parse_args(given)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    study = Study(tuple(given.sizes), tuple(given.ratios), tried=given.sizes[0], tries=given.tries)
    record = study.run(given.work, given.workers)
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    for row in table(record):
        log.info(" | ".join(map(str, row.values())))


if __name__ == "__main__":
    main()
