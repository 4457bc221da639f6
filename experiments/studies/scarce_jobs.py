"""Settings of the study of scarce labels, and which trainings its parts consist of."""

from dataclasses import dataclass, field

from attnlab import training

from .jobs import Job
from .plateau import Plateau
from .scarce_arms import ARMS, DRAWN
from .scarce_sets import BLOCK, FIRST_TUNING_SET

__all__ = ["ScarceLabels", "ScarceParts"]


@dataclass(frozen=True)
class ScarceLabels:
    """What makes results comparable: a folder holds those of one such set of settings."""

    ratio: int = 4  # drawn pairs, or further exact scenes, per labeled scene
    weights: tuple[float, ...] = (0.25, 1.0)  # of what is added, among which validation scenes choose
    own_weights: bool = False  # whether each lever on drawn pairs has a weight of its own
    tuning_seeds: int = 3
    seeds: int = 1  # of segmenters per set
    unlabeled: int = 2000  # scenes
    validation: int = 200
    tests: int = 400
    plateau: Plateau = field(default=Plateau())
    channels: tuple[int, ...] = (64, 96, 160)  # of joint models
    batch: int = 16
    drawing_steps: int = 50
    unlabeled_steps: int = 4500  # of the joint model of unlabeled scenes
    shared_steps: int = 1500  # of that model on each labeled set, after which it is a "shared" one
    own_steps: int = 1500  # of a joint model of the labeled scenes alone
    checkpoint: int = 250  # steps of joint models between checkpoints and looks at validation scenes

    def schedule(self, steps: int, lr: float, number: int) -> training.Schedule:
        """Return how a joint model is trained; `number` draws its batches."""
        return training.Schedule(steps, lr, weight_decay=1e-4, checkpoint=self.checkpoint, seed=number)


@dataclass(frozen=True)
class ScarceParts:
    """What of the study is run; jobs are the arguments of one training, (what, scenes, set, ...)."""

    study: ScarceLabels
    sizes: tuple[int, ...] = (50,)
    curve: tuple[int, ...] = (25, 50, 100, 200, 400)
    sets: int = 6
    arms: tuple[str, ...] = tuple(ARMS)

    def check(self) -> None:
        """Raise ValueError for unknown arms, or numbers of scenes or sets that there are not."""
        if unknown := [arm for arm in self.arms if arm not in ARMS]:
            raise ValueError(f"no arm {', '.join(unknown)}: there are {', '.join(ARMS)}")
        if not 0 < self.sets <= FIRST_TUNING_SET:
            raise ValueError(f"{self.sets} sets: give 1 to {FIRST_TUNING_SET}")
        counts = [*self.curve, *(n * (1 + self.study.ratio) for n in self.sizes)]
        if not 0 < min(counts) <= max(counts) <= BLOCK:
            most = BLOCK // (1 + self.study.ratio)
            raise ValueError(f"a set has {BLOCK} scenes, further ones too: give sizes of 1 to {most}")

    def curve_jobs(self) -> list[Job]:
        """List trainings of labels alone, on three sets of each size: (arm, scenes, set, weight, seed)."""
        sets = range(min(3, self.sets))
        return [("labels", n, k, "1", s) for n in self.curve for k in sets for s in range(self.study.seeds)]

    def tuned_arms(self) -> tuple[str, ...]:
        """Return the arms that are trained on the tuning set: those whose weight some arm takes."""
        return tuple(dict.fromkeys(self.source(arm) for arm in self.arms if ARMS[arm].tuned))

    def tuning_jobs(self) -> tuple[list[Job], list[Job]]:
        """List trainings on the tuning set: first of labels alone, which teach some of the others."""
        seeds = range(self.study.tuning_seeds)
        places = [(n, FIRST_TUNING_SET, str(w), s) for n in self.sizes for w in self.study.weights for s in seeds]
        alone = [("labels", n, FIRST_TUNING_SET, "1", s) for n in self.sizes for s in seeds]
        return alone, [(arm, *place) for place in places for arm in self.tuned_arms()]

    def arm_jobs(self, weights: dict) -> tuple[list[Job], list[Job]]:
        """List trainings that gains come from, with weights by (arm, scenes): first of labels alone."""
        places = [(n, k, s) for n in self.sizes for k in range(self.sets) for s in range(self.study.seeds)]
        others = [(arm, n, k, weights[arm, n], s) for n, k, s in places for arm in self.arms if arm != "labels"]
        return [("labels", n, k, "1", s) for n, k, s in places], others

    def model_jobs(self, tuning: bool) -> tuple[list[Job], list[Job]]:
        """List joint models, of the tuning set or of the others: (kind, scenes, set).

        First comes the one of unlabeled scenes, which "shared" ones begin as.
        """
        jobs = list(dict.fromkeys((DRAWN[name].model, n, k) for name, n, k in self.drawing_jobs(tuning)))
        shared = any(kind == "shared" for kind, _, _ in jobs)
        return [("unlabeled", self.study.unlabeled, 0)] if shared else [], jobs

    def drawing_jobs(self, tuning: bool) -> list[Job]:
        """List pairs to draw, for the tuning set or for the others: (a name of DRAWN, scenes, set)."""
        arms, sets = (self.tuned_arms(), (FIRST_TUNING_SET,)) if tuning else (self.arms, range(self.sets))
        names = [name for name in DRAWN if any(ARMS[arm].added == name for arm in arms)]
        return [(name, n, k) for n in self.sizes for k in sets for name in names]

    def source(self, arm: str) -> str:
        """Return the arm whose weight an arm takes, "" if it has none."""
        return arm if self.study.own_weights and ARMS[arm].tuned else ARMS[arm].tuned
