"""Measure what drawn pairs are worth where labels are scarce, with segmenters that are trained to a plateau.

Labeled sets of scenes, the joint models of each, what they draw and the segmenters are all drawn again: a gain is the
difference of an arm and the labels alone on the same set, and its interval goes over sets. Arms differ in what is added
to each batch of labeled scenes; how much it counts is chosen by validation scenes, on a set that is for nothing else.
Gains are those of test scenes, which decide nothing: choose --sizes, --sets and --arms before the stage "arms", for
example by the table of the tuning set.

    python -m experiments.studies.scarce_labels --stage plan          # core hours of each stage, and what it could show
    python -m experiments.studies.scarce_labels --stage curve report  # of exact scenes: how much is to be gained
    python -m experiments.studies.scarce_labels                       # all stages: 50 labeled scenes, 6 sets
    python -m experiments.studies.scarce_labels --sizes 25 100        # other sizes, into the same folder

The same call goes on after an interruption: each training has a file of its own in --work, and joint models have
checkpoints. More sizes, sets and arms may be asked for later, other settings may not. All sets share one model of
unlabeled scenes, which they begin from: intervals do not cover that it might have been another one.
"""

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from attnlab.masks import IGNORE
from attnlab.metrics import class_ious
from attnlab.scenes import aerial
from attnlab.segmentation import Segmenter, load_segmenter
from attnlab.segmentation.folders import Pairs
from attnlab.storage import claim_folder, write_text

from . import pair_generators, scarce_sets, scarce_tables
from .jobs import run_jobs
from .pair_quality import describe_pairs
from .plateau import train_to_plateau
from .scarce_arms import ARMS, DRAWN, arm_loss
from .scarce_jobs import ScarceLabels, ScarceParts
from .scarce_plan import plan_table
from .scarce_sets import FIRST_TUNING_SET

__all__ = ["SCARCE_RESULTS", "SCARCE_STAGES", "ScarceRun"]

SCARCE_STAGES = ("curve", "tune", "generators", "arms", "measure", "report")
SCARCE_RESULTS = Path(__file__).parents[1] / "results" / "scarce_labels.json"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScarceRun:
    """The study in the folder `work`, or a part of it."""

    parts: ScarceParts
    work: Path
    workers: int = 1

    @property
    def study(self) -> ScarceLabels:
        """Settings."""
        return self.parts.study

    def run(self, stages: Sequence[str] = SCARCE_STAGES) -> None:
        """Run stages, or go on; ValueError where the parts are not to be had, or the folder is of other settings."""
        self.parts.check()
        claim_folder(self.work, asdict(self.study), "study.json")
        for stage in stages:
            _log.info("stage %s", stage)
            getattr(self, f"run_{stage}")()

    def run_curve(self) -> None:
        """Train on more and more labeled scenes alone."""
        self._jobs(self.train, self.parts.curve_jobs(), "segmenters")

    def run_tune(self) -> None:
        """Train joint models of the tuning set, then arms on it with each weight."""
        self._draw_all(True)
        for jobs in self.parts.tuning_jobs():
            self._jobs(self.train, jobs, "segmenters")

    def run_generators(self) -> None:
        """Train the joint models of all other sets, and draw their pairs."""
        self._draw_all(False)

    def run_arms(self) -> None:
        """Train the labels alone, then all arms with the weights that were chosen."""
        weights = {(arm, n): self.choose(arm, n) for arm in self.parts.arms for n in self.parts.sizes}
        for jobs in self.parts.arm_jobs(weights):
            self._jobs(self.train, jobs, "segmenters")

    def run_measure(self) -> None:
        """Measure the drawn pairs of all sets but the tuning one."""
        self._jobs(self.measure, self.parts.drawing_jobs(False), "quality")

    def run_report(self) -> None:
        """Write work/record.json, and log its tables."""
        record = scarce_tables.collect_record(self.work, asdict(self.study))
        write_text(self.work / "record.json", json.dumps(record) + "\n")
        _log.info("\n\n".join(scarce_tables.record_tables(record)))

    def choose(self, arm: str, n: int) -> str:
        """Return the weight with the highest validation mIoU, the mean over seeds, on the tuning set of n scenes.

        FileNotFoundError where a training of it is missing.
        """
        if not ARMS[arm].tuned:
            return "1"
        rows = scarce_tables.segmenter_rows(self.work)
        scores = {str(weight): [] for weight in self.study.weights}
        for row in rows:
            if (row["arm"], row["scenes"], row["set"]) == (self.parts.source(arm), n, FIRST_TUNING_SET):
                scores[row["weight"]].append(row["validation"])
        if min(map(len, scores.values())) < self.study.tuning_seeds:
            raise FileNotFoundError(f"the weight of {arm} for {n} scenes is not chosen yet: run --stage tune first")
        return max(scores, key=lambda weight: np.mean(scores[weight]))

    def train_model(self, kind: str, n: int, k: int) -> list:
        """Train a joint model, or go on; return its checks (step, error on validation scenes)."""
        study, (images, labels) = self.study, scarce_sets.scarce_validation(min(100, self.study.validation))
        unlabeled, number = scarce_sets.unlabeled_scenes(study.unlabeled), 0
        match kind:
            case "unlabeled":
                pairs, steps, lr = unlabeled, study.unlabeled_steps, 8e-4
                model, labels = pair_generators.new_generator(pairs, study.channels), np.full_like(labels, IGNORE)
            case "shared":
                labeled, number = scarce_sets.labeled_set(k, n), 1 + k
                model = pair_generators.adapt_generator(self._model("unlabeled", study.unlabeled, 0) / "model", labeled)
                pairs, steps, lr = pair_generators.half_labeled(labeled, unlabeled), study.shared_steps, 4e-4
            case _:
                pairs, number, steps, lr = scarce_sets.labeled_set(k, n), 1 + k, study.own_steps, 8e-4
                model = pair_generators.new_generator(pairs, study.channels, number)
        given = study.schedule(steps, lr, number), (images, labels), study.batch
        return pair_generators.fit_and_keep(model, pairs, self._model(kind, n, k), *given)

    def draw(self, name: str, n: int, k: int) -> dict:
        """Draw the pairs of a labeled set; return how many."""
        count, folder = n * self.study.ratio, self._model(DRAWN[name].model, n, k)
        options = {"rare": DRAWN[name].rare, "steps": self.study.drawing_steps}
        pair_generators.draw_pairs(folder, self._drawn(name, n, k), count, 1 + k, **options)
        return {"pairs": count}

    def train(self, arm: str, n: int, k: int, weight: str, s: int) -> dict:
        """Train a segmenter; return its validation mIoU, its steps and, but for the tuning set, test IoU (class,)."""
        study, labeled = self.study, scarce_sets.labeled_set(k, n)
        asks = ARMS[arm].lever in ("filter", "soft")
        teacher = Segmenter.from_pretrained(self._teacher(n, k, s)) if asks else None
        extra, found = arm_loss(arm, study.plateau.batch, labeled, self._added(arm, n, k), teacher)
        valid, seed = scarce_sets.scarce_validation(study.validation), 100 * k + s
        segmenter = train_to_plateau(labeled, aerial.CLASSES, valid, study.plateau, extra, float(weight), seed)
        step, miou = max(segmenter.curve, key=lambda look: look[1])
        found |= {"validation": miou, "step": step, "steps": segmenter.curve[-1][0]}
        if k < FIRST_TUNING_SET:
            ious = class_ious(segmenter.evaluate(*scarce_sets.scarce_tests(study.tests)))
            found["test"] = [None if np.isnan(x) else round(x, 5) for x in ious.tolist()]
        if arm == "labels":
            segmenter.save_pretrained(self._teacher(n, k, s))
        return found

    def measure(self, name: str, n: int, k: int) -> dict:
        """Measure drawn pairs, beside validation scenes, by the reference segmenter, which saw thousands of others."""
        labeled, held_out = scarce_sets.labeled_set(k, n), scarce_sets.scarce_validation(self.study.validation)
        return describe_pairs(load_segmenter("aerial", "cpu"), self._pairs(name, n, k), labeled, held_out)

    def _added(self, arm, n, k) -> Pairs | None:
        match ARMS[arm].added:
            case "":
                return None
            case "unlabeled":
                return scarce_sets.unlabeled_scenes(self.study.unlabeled)
            case "exact":
                return scarce_sets.further_scenes(k, n, n * self.study.ratio)
            case name:
                return self._pairs(name, n, k)

    def _pairs(self, name, n, k):
        with np.load(self._drawn(name, n, k)) as file:
            return file["images"], file["labels"]

    def _draw_all(self, tuning):
        for jobs in self.parts.model_jobs(tuning):
            self._jobs(self.train_model, jobs, "models")
        self._jobs(self.draw, self.parts.drawing_jobs(tuning), "drawn")

    def _jobs(self, function, jobs, folder):
        return run_jobs(function, jobs, self.work / folder, self.workers)

    def _model(self, kind, n, k):
        return self.work / "models" / f"{kind} {n:04d} {k:04d}"

    def _drawn(self, name, n, k):
        return self.work / "drawn" / f"{name} {n:04d} {k:04d}.npz"

    def _teacher(self, n, k, s):
        return self.work / "teachers" / f"{n:04d} {k:04d} {s:04d}"


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = ScarceParts(ScarceLabels())
    parser.add_argument("--work", default="runs/scarce", type=Path, help="folder of all results")
    parser.add_argument("--stage", choices=("plan", *SCARCE_STAGES), nargs="+", default=SCARCE_STAGES, help="in order")
    parser.add_argument("--sizes", type=int, nargs="+", default=usual.sizes, help="labeled scenes of the arms")
    parser.add_argument("--curve", type=int, nargs="+", default=usual.curve, help="labeled scenes of the curve")
    parser.add_argument(
        "--sets", type=int, default=usual.sets, help="labeled sets of each size, besides that for tuning"
    )
    parser.add_argument("--arms", nargs="+", default=usual.arms, help=f"of {', '.join(ARMS)}")
    parser.add_argument("--seeds", type=int, default=usual.study.seeds, help="segmenters of each arm and set")
    parser.add_argument("--own-weights", action="store_true", help="choose a weight for each lever, not one for all")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread")
    parser.add_argument("--keep", action="store_true", help=f"report, and write the record to {SCARCE_RESULTS.name}")
    given = parser.parse_args(given)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    study = ScarceLabels(seeds=given.seeds, own_weights=given.own_weights)
    parts = ScarceParts(study, tuple(given.sizes), tuple(given.curve), given.sets, tuple(given.arms))
    try:
        parts.check()
    except ValueError as error:
        parser.error(str(error))
    if "plan" in given.stage:
        _log.info(plan_table(parts))
    stages = [stage for stage in given.stage if stage != "plan"]
    if given.keep and "report" not in stages:
        stages.append("report")
    if stages:
        ScarceRun(parts, given.work, given.workers).run(stages)
    if given.keep:
        write_text(SCARCE_RESULTS, (given.work / "record.json").read_text())


if __name__ == "__main__":
    main()
