"""Measure what pairs of a joint model are worth, as SatSynth's study does (PROTOCOLS: Toker et al., CVPR 2024).

A joint model learned from n scenes with masks, and nothing else. A segmenter learns from the same n scenes, alone or
with R drawn pairs for each of them. How to mix and to augment is chosen on validation scenes, never on test scenes.

    python -m experiments.studies.joint_pairs           # all of it, into experiments/results/joint_pairs.json
"""

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
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
from attnlab.storage import claim_folder, replacing

from ..bundled.train_aerial import AERIAL_PRESETS, FIRST_TEST_SEED, FIRST_VALIDATION_SEED, AerialTraining
from .jobs import run_jobs

__all__ = ["COMPARED_AUGMENTATIONS", "COMPARED_MIXES", "FIRST_FURTHER_SEED", "JOINT_PAIRS_RESULTS", "KINDS_OF_PAIRS"]
__all__ += ["TRIAL_AUGMENTATION", "JointPairsStudy", "by_ratio", "gain", "ious_by_seed", "mean_and_error", "mix_of"]
__all__ += ["runs_table", "trials"]

FIRST_FURTHER_SEED = 200_000  # of scenes that only the runs with further scenes see
TRIAL_AUGMENTATION = "geometry and color"  # while ways of mixing are compared
COMPARED_MIXES = ("half", "pool", "pretrain", "half, ignore band")
_MIN_MARGIN = 0.9  # pixels of drawn pairs with a smaller margin are ignored, where the mix says "ignore band"
_SEGMENTER_OPTIONS = {"architecture": "unet", "batch": 8, "lr": 2e-3, "progress": False}
_BASIC = ("rotate90", "crop", "color")
COMPARED_AUGMENTATIONS = {"flips": (), "geometry and color": _BASIC}
COMPARED_AUGMENTATIONS |= {"CutMix": (*_BASIC, "cutmix"), "Copy-Paste": (*_BASIC, "copy-paste")}
KINDS_OF_PAIRS = {  # that are added to the scenes
    "": "nothing",
    "drawn": "pairs drawn by the joint model of the same scenes",
    "drawn, segmented": "their images, with the masks of a segmenter of the same scenes",
    "drawn, judged": "their images, with the masks of the reference segmenter, which saw thousands of other scenes",
    "rendered": "as many further scenes: exact",
}
JOINT_PAIRS_RESULTS = Path(__file__).parents[1] / "results" / "joint_pairs.json"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class JointPairsStudy:
    """What is compared."""

    sizes: tuple[int, ...] = (25, 50, 100)  # numbers of scenes that the joint model and the segmenter learn from
    ratios: tuple[int, ...] = (1, 2, 3, 4, 5)  # drawn pairs per scene
    tried: int = 25  # the size at which mixes and augmentations are compared, for all sizes
    trial: int = 3  # the ratio at which they, and other masks, are compared
    tries: int = 2  # seeds of the runs that are compared on validation scenes
    seeds: int = 5  # of all other runs
    steps: int = 800  # of each segmenter; with fewer steps, training is what is scarce, not labels
    validation: int = 200  # scenes
    tests: int = 400  # scenes

    def run(self, work: str | Path, workers: int = 2) -> dict:
        """Draw pairs, compare on validation scenes, then train the rest; write and return work/study/record.json.

        `work` is the folder of `experiments.bundled.train_aerial`, with its segmenter and joint models of all sizes.
        """
        work = Path(work)
        folder = work / "study"
        settings = claim_folder(folder, asdict(self), "study.json")
        self.draw(work, self.tried)
        found = self._trained(work, workers, self.trials())
        mix, way = self.choose(found)
        for n in self.sizes:
            self.draw(work, n)
            found |= self._trained(work, workers, self.finals(n, mix, way))
        runs = [dict(zip(("scenes", "added", "ratio", "mix", "way", "seed"), job, strict=True)) | {
            kind: class_ious(confusion).tolist() for kind, confusion in one.items()
        } for job, one in found.items()]  # fmt: skip
        record = {"study": settings, "mix": mix, "way": way, "arms": runs}
        (folder / "record.json").write_text(json.dumps(record, indent=1) + "\n")
        return record

    def trials(self) -> list[tuple]:
        """List the runs that choose: mixes at one ratio, augmentations without drawn pairs."""
        jobs = [(self.tried, "drawn", self.trial, mix, TRIAL_AUGMENTATION) for mix in COMPARED_MIXES]
        jobs += [(self.tried, "", 0, "half", way) for way in COMPARED_AUGMENTATIONS]
        return [(*job, s) for job in jobs for s in range(self.tries)]

    def finals(self, n: int, mix: str, way: str) -> list[tuple]:
        """List the runs of n scenes alone, with drawn pairs at every ratio, and with other masks or images."""
        ratios = dict.fromkeys(KINDS_OF_PAIRS, (self.trial,)) | {"": (0,), "drawn": self.ratios}
        jobs = [(n, kind, r, mix_of(kind, mix), way) for kind in KINDS_OF_PAIRS for r in ratios[kind]]
        return [(*job, s) for job in jobs for s in range(self.seeds)]

    def choose(self, found: dict) -> tuple[str, str]:
        """Choose the mix and the augmentation with the highest mean mIoU on validation scenes."""
        scores = {job: np.mean([_miou(found[*job[:-1], s]["validation"]) for s in range(self.tries)]) for job in found}
        best = [max((job for job in found if job[1] == added), key=scores.get) for added in ("drawn", "")]
        return best[0][3], best[1][4]

    def draw(self, work: Path, n: int) -> None:
        """Draw the pairs of the highest ratio, once per size, and let two segmenters label their images."""
        path = work / "study" / f"drawn {n}.npz"
        if path.exists():
            return
        models = AerialTraining(AERIAL_PRESETS["cpu"], work, torch.device("cpu"))
        images, labels, margins = models.joint(n).sample(n * max(self.ratios), seed(n))
        options = _SEGMENTER_OPTIONS | {"augmentations": _BASIC, "steps": self.steps}
        own = train_segmenter(*_scenes(0, n), aerial.CLASSES, **options)
        masks = {"segmented": own.segment(images), "judged": models.segmenter().segment(images)}
        with replacing(path) as part:
            np.savez(part, images=images, labels=labels, margins=margins, **masks)

    def train(self, work: Path, n: int, added: str, ratio: int, mix: str, way: str, s: int) -> dict:
        """Train the segmenter of one run; return its confusions (class, class) on validation and on test scenes."""
        extra = _extra(work, n, added, n * ratio, _MIN_MARGIN if "band" in mix else None) if added else None
        options = _SEGMENTER_OPTIONS | {"augmentations": COMPARED_AUGMENTATIONS[way], "steps": self.steps, "seed": s}
        segmenter = train_segmenter(*_scenes(0, n), aerial.CLASSES, extra=extra, mix=mix.split(",")[0], **options)
        sets = {"validation": _scenes(FIRST_VALIDATION_SEED, self.validation)}
        sets["test"] = _scenes(FIRST_TEST_SEED, self.tests)
        return {kind: segmenter.evaluate(*pairs).sum(0).tolist() for kind, pairs in sets.items()}

    def _trained(self, work, workers, jobs):
        return dict(zip(jobs, run_jobs(partial(self.train, work), jobs, work / "study" / "arms", workers), strict=True))


def mix_of(added: str, mix: str) -> str:
    """Return how a kind of pairs is mixed, if `mix` was chosen for drawn ones: further scenes are simply pooled."""
    return {"": "half", "rendered": "pool"}.get(added, mix)


def ious_by_seed(record: dict, kind: str = "test", **run) -> np.ndarray:
    """Return the IoU (seed, class) of a run on "test" or "validation" scenes.

    A run is given by its `scenes`, `added`, `ratio`, `mix` and `way` (of augmenting), as far as they are needed.
    """
    found = [one for one in record["arms"] if all(one[name] == value for name, value in run.items())]
    if not found or len({(one["added"], one["ratio"], one["mix"], one["way"]) for one in found}) > 1:
        raise KeyError(f"{len(found)} trainings, of no run or of several, for {run}")
    return np.array([one[kind] for one in sorted(found, key=lambda one: one["seed"])], float)


def gain(record: dict, kind: str = "test", **run) -> np.ndarray:
    """Return the gain in IoU (seed, class) of a run over its scenes alone with the same augmentation."""
    alone = {"scenes": run["scenes"], "added": "", "ratio": 0, "mix": "half", "way": run["way"]}
    return ious_by_seed(record, kind, **run) - ious_by_seed(record, kind, **alone)


def by_ratio(record: dict, scenes: int) -> list[np.ndarray]:
    """Return test IoU (seed, class) with 0, then with each ratio of drawn pairs, mixed and augmented as chosen."""
    runs = [{"added": "", "ratio": 0, "mix": "half"}]
    runs += [{"added": "drawn", "ratio": ratio, "mix": record["mix"]} for ratio in record["study"]["ratios"]]
    return [ious_by_seed(record, scenes=scenes, way=record["way"], **run) for run in runs]


def runs_table(record: dict) -> list[dict]:
    """Tabulate the test mIoU of each run and its gain over the scenes alone, paired by seed, with standard errors.

    Mixes and augmentations that were not chosen on validation scenes are in `trials` alone.
    """
    rows = []
    for run in _runs(record):
        if (run["mix"], run["way"]) != (mix_of(run["added"], record["mix"]), record["way"]):
            continue
        if run["scenes"] not in record["study"]["sizes"]:
            continue
        row = run | dict(zip(("mIoU", "error"), mean_and_error(ious_by_seed(record, **run).mean(1)), strict=True))
        if run["added"]:
            row |= dict(zip(("gain", "error of gain"), mean_and_error(gain(record, **run).mean(1)), strict=True))
        rows.append(row)
    return sorted(rows, key=lambda row: (row["scenes"], list(KINDS_OF_PAIRS).index(row["added"]), row["ratio"]))


def trials(record: dict) -> list[dict]:
    """Tabulate the mean validation mIoU of the mixes and augmentations that were compared."""
    study = record["study"]
    tried = [run for run in _runs(record) if run["scenes"] == study["tried"]]
    tried = [run for run in tried if (run["added"], run["ratio"]) in (("", 0), ("drawn", study["trial"]))]
    tried = [run for run in tried if not run["added"] or run["way"] == TRIAL_AUGMENTATION]
    scores = [ious_by_seed(record, "validation", **run)[: study["tries"]].mean(1).mean() for run in tried]
    return [run | {"mIoU": float(score)} for run, score in zip(tried, scores, strict=True)]


def _runs(record):
    names = ("scenes", "added", "ratio", "mix", "way")
    found = dict.fromkeys(tuple(one[name] for name in names) for one in record["arms"])
    return [dict(zip(names, values, strict=True)) for values in found]


def mean_and_error(values: np.ndarray) -> tuple[float, float | None]:
    """Return the mean over seeds, (seed,), and its standard error, if there is more than one seed."""
    return float(np.mean(values)), float(stats.sem(values)) if len(values) > 1 else None


def _miou(confusion):
    return np.nanmean(class_ious(confusion))


def _extra(work, n, added, count, margin):
    """Return the pairs that are added; pixels with a smaller margin are ignored."""
    if added == "rendered":
        return _scenes(FIRST_FURTHER_SEED, count)
    with np.load(work / "study" / f"drawn {n}.npz") as file:
        images, labels = file["images"][:count], file[added.split(", ")[1] if ", " in added else "labels"][:count]
        return images, labels if margin is None else np.where(file["margins"][:count] < margin, IGNORE, labels)


@lru_cache(maxsize=8)
def _scenes(first, count):
    return AerialTraining(AERIAL_PRESETS["cpu"], Path(), torch.device("cpu")).scenes(first, count)


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = JointPairsStudy()
    parser.add_argument("--work", default="runs/aerial", type=Path, help="folder with segmenter and joint models")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread")
    parser.add_argument("--sizes", type=int, nargs="+", default=default.sizes, help="scenes that are learned from")
    parser.add_argument("--ratios", type=int, nargs="+", default=default.ratios, help="drawn pairs per scene")
    parser.add_argument("--tries", type=int, default=default.tries, help="seeds of what validation scenes decide")
    given = parser.parse_args(given)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    study = JointPairsStudy(tuple(given.sizes), tuple(given.ratios), tried=given.sizes[0], tries=given.tries)
    record = study.run(given.work, given.workers)
    JOINT_PAIRS_RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    for row in runs_table(record):
        _log.info(" | ".join(map(str, row.values())))


if __name__ == "__main__":
    main()
