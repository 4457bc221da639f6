"""What the study of scarce labels takes, in hours of one core, and what it could show."""

from math import sqrt

from ..bundled.cards import markdown_table
from .intervals import half_width
from .scarce_arms import ARMS
from .scarce_jobs import ScarceParts

__all__ = ["SECONDS", "expected_hours", "plan_table"]

SECONDS = {  # of one core (AMD EPYC with AVX-512 bfloat16, beside other work), as measured
    "labeled step": 0.13,  # of a segmenter, 8 pairs of 64 pixels
    "look": 1.0,  # of it at 200 validation scenes
    "joint step": 0.85,  # of a joint model, 16 pairs
    "joint check": 14.0,  # of it, 100 scenes
    "drawn pair": 0.86,  # in 50 steps
    "measured set": 20.0,
}
_SPREAD = 0.01  # of the gain over sets, standard deviation: assumed until there are some
_EXPECTED_STEPS = 2000  # of a segmenter until its plateau, of `Plateau.steps` at most: not measured


def expected_hours(parts: ScarceParts) -> dict[str, float]:
    """Return the core hours of each stage."""
    weights = dict.fromkeys(((arm, n) for arm in parts.arms for n in parts.sizes), "1")
    curve, arms = set(parts.curve_jobs()), {job for jobs in parts.arm_jobs(weights) for job in jobs}
    tuning = [job for jobs in parts.tuning_jobs() for job in jobs]
    models = [job for jobs in parts.model_jobs(False) for job in jobs if job[0] != "unlabeled"]
    first = [job for jobs in parts.model_jobs(True) for job in jobs]
    return {
        "curve": _segmenters(parts.study, curve),
        "tune": _models(parts, first) + _drawn(parts, True) + _segmenters(parts.study, tuning),
        "generators": _models(parts, models) + _drawn(parts, False),
        "arms": _segmenters(parts.study, arms - curve),
        "measure": len(parts.drawing_jobs(False)) * SECONDS["measured set"] / 3600,
    }


def _segmenters(study, jobs):
    steps = min(_EXPECTED_STEPS, study.plateau.steps)
    cost = {arm: 2.35 if arm in ("soft", "consistent") else 1.9 for arm in ARMS} | {"labels": 1.0}  # of a labeled step
    looks = steps / study.plateau.every * SECONDS["look"]
    return sum(steps * SECONDS["labeled step"] * cost[arm] + looks for arm, *_ in jobs) / 3600


def _drawn(parts, tuning):
    return sum(n * parts.study.ratio for _, n, _ in parts.drawing_jobs(tuning)) * SECONDS["drawn pair"] / 3600


def _models(parts, jobs):
    study = parts.study
    steps = {"unlabeled": study.unlabeled_steps, "shared": study.shared_steps, "own": study.own_steps}
    each = SECONDS["joint step"] + SECONDS["joint check"] / study.checkpoint
    return sum(steps[kind] * each for kind, _, _ in jobs) / 3600


def plan_table(parts: ScarceParts) -> str:
    """Write the core hours of each stage, and the smallest gain that so many sets and tests could show."""
    hours = expected_hours(parts)
    rows = [[stage, f"{value:.1f}"] for stage, value in hours.items()] + [["all", f"{sum(hours.values()):.1f}"]]
    tests = max(1, len(parts.sizes) * sum(arm != "labels" for arm in parts.arms))
    least, most = (half_width(_SPREAD / sqrt(parts.sets), parts.sets, 0.05 / n) for n in (1, tests))
    about = (
        f"{parts.sets} sets, {tests} tests: if gains of sets have a standard deviation of {_SPREAD}, the smallest gain "
        f"that is seen is {most:.3f} (of the first one that Holm's procedure looks at) to {least:.3f} (of the last)."
    )
    return f"{markdown_table(['stage', 'core hours'], rows)}\n\n{about}"
