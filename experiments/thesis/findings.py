"""Test which of the thesis's findings hold: one measured sentence per model and track, and a page of them.

A finding is a difference that should be positive; it *holds* where the 95% bootstrap interval of its mean over classes
lies above 0, *does not hold* where it lies below, and is *open* otherwise, or with fewer than 10 images.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from attnlab.maps.heatmaps import minmax, upscale
from attnlab.metrics import THRESHOLDS, best_threshold, mean_over_classes, miou_curve

from .examples import PROMPT_WORDS
from .experiment import TRACKS, Experiment, by_resolution, over_classes, summarize_curve
from .tables import as_columns, at_chosen_threshold

__all__ = ["Evidence", "Finding", "findings", "page"]

_MIN_IMAGES = 10  # with fewer images a finding stays open
_CHOSEN = "mean IoU over classes at thresholds chosen on the images that tokens are learned from"


class Evidence(NamedTuple):
    """What was measured of a finding on a model and track: the difference with its 95% interval, number of images."""

    model: str
    track: str
    text: str
    difference: tuple[float, float, float]
    images: int

    @property
    def verdict(self) -> str:
        """Whether the finding "holds", "does not hold", or is "open"."""
        _, low, high = self.difference
        if self.images < _MIN_IMAGES or low <= 0 <= high:
            return "open"
        return "holds" if low > 0 else "does not hold"


class Finding(NamedTuple):
    """A finding of the thesis, what was published, how it is measured here, and the evidence."""

    claim: str
    published: str
    measure: str
    evidence: Sequence[Evidence]


def findings(experiments: Sequence[Experiment]) -> list[Finding]:
    """Measure all findings, in the order of the thesis."""
    first = (_linear_loses, _optimizing_helps, _linear_suffices, _more_images_help)
    return [one(experiments) for one in (*first, _tokens_carry_over, _rider, _start_token, _resolution)]


def page(found: Sequence[Finding], about: str) -> str:
    """Write the findings as Markdown."""
    verdicts = [e.verdict for finding in found for e in finding.evidence]
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in ("holds", "does not hold", "open") if v in verdicts)
    parts = ["# Do the thesis's findings hold?", about, " ".join(__doc__.split("\n\n")[1].split())]
    parts.append(f"Of {len(verdicts)} verdicts: {counts}.")
    for number, one in enumerate(found, 1):
        parts += [f"## {number}. {one.claim}", f"{one.published} Here: {one.measure}."]
        lines = [
            f"- {e.model}, {e.track} ({e.images} images): {e.text}. **{e.verdict.capitalize()}.**" for e in one.evidence
        ]
        parts.append("\n".join(lines) or "Nothing here can tell: too few images, or nothing to compare.")
    return "\n\n".join(parts) + "\n"


def _linear_loses(experiments) -> Finding:
    return Finding(
        "Without the softmax, maps of words are worse",
        "Maximum mIoU 53.2 by DAAM, 38.3 by Linear DAAM.",
        f"DAAM minus Linear DAAM, {_CHOSEN}",
        _evidence(experiments, partial(_versus, first=("DAAM", None), second=("Linear DAAM", None))),
    )


def _optimizing_helps(experiments) -> Finding:
    return Finding(
        "An optimized token is better than the word",
        "Maximum mIoU of Linear DAAM 38.3 with the word, 66.6 with a token learned from 2 images.",
        f"token minus word, Linear DAAM, {_CHOSEN}",
        _evidence(experiments, partial(_versus, first=("Linear DAAM, optimized", None), second=("Linear DAAM", None))),
    )


def _linear_suffices(experiments) -> Finding:
    def difference(x, track):
        text, bounds, count = _versus(x, track, ("Linear DAAM, optimized", None), ("DAAM, optimized", None))
        return text, tuple(bound + 0.05 for bound in bounds), count

    return Finding(
        "Optimized, linear maps are as good as softmax maps",
        "Maximum mIoU 66.6 and 67.3.",
        f"linear minus softmax, {_CHOSEN}; it holds where linear maps lose less than 5 points",
        _evidence(experiments, difference),
    )


def _more_images_help(experiments) -> Finding:
    def difference(x, track):
        method, (one, *_, most) = "Linear DAAM, optimized", x.training
        return _versus(x, track, (method, most), (method, one), (f"{most} images", f"{one} image"))

    return Finding(
        "More images than one help the token",
        "Maximum mIoU on test images 63.1 from 1, 67.3 from 2, 65.4 from 5 images.",
        f"token of the most minus token of one, Linear DAAM, {_CHOSEN}",
        _evidence([x for x in experiments if len(x.training) > 1], difference),
    )


def _tokens_carry_over(experiments) -> Finding:
    """Compare tokens learned in the other track with the word, both at thresholds chosen in this one."""

    def difference(method):
        def of(x, track):
            other = TRACKS[1 - TRACKS.index(track)]
            names = [name for name in x.names(track) if name in x.names(other)]
            carried = {name: _carried(x, x.token(method, other, name), track, name) for name in names}
            words = at_chosen_threshold(x, "Linear DAAM", track)
            words = {name: words[name] for name in names}
            return _compared(carried, words, (f"{method}, from {other} images", "word"))

        return of

    both = [x for x in experiments if set(x.names(TRACKS[0])) & set(x.names(TRACKS[1]))]
    methods = ("Linear DAAM, optimized", "fit_token")
    return Finding(
        "A learned token carries over to images of another kind",
        "Shown there on other images of the class.",
        "token learned in the other track (generated or rendered) minus the word, mean IoU over the classes that both "
        "tracks have, at thresholds chosen on images of this track",
        [e for method in methods for e in _evidence(both, difference(method))],
    )


def _carried(x, token, track, name) -> np.ndarray:
    """Return the IoU (image,) of the test examples with a token, at the best threshold of the train examples."""
    train, tests = x.train[track, name][: x.usual], x.tests[track, name]
    examples = [*train, *tests]
    ious = miou_curve([minmax(e.linear[token], e.truth.shape) for e in examples], [e.truth for e in examples])
    tau = best_threshold(THRESHOLDS, ious[:, : len(train)])
    return ious[np.searchsorted(THRESHOLDS, tau), len(train) :]


def _rider(experiments) -> Finding:
    def difference(x, track):
        inside, beside, elsewhere = (np.array(v) for v in zip(*_on_riders(x, track), strict=True))
        text = f"{inside.mean():.2f} on the rider, {beside.mean():.2f} on the bicycle, {elsewhere.mean():.2f} elsewhere"
        return text, mean_over_classes((beside - elsewhere)[:, None]), len(inside)

    shown = [x for x in experiments if any(_on_riders(x, track) for track in TRACKS)]
    return Finding(
        "The rider's word looks at the bicycle",
        "DAAM of “rider” covers the bicycle as well, and reaches a maximum mIoU of 31.0.",
        "mean of the map on pixels of each, as a multiple of its mean over the image; it holds where the bicycle has "
        "more than what is neither",
        _evidence(shown, difference, usable=_on_riders),
    )


def _start_token(experiments) -> Finding:
    def difference(x, track):
        found = {name: np.array([_on_start(e) for e in x.tests[track, name]]) for name in x.names(track)}
        inside, outside, overall = (as_columns({n: v[:, k] for n, v in found.items()}) for k in range(3))
        means = [mean_over_classes(v)[0] for v in (outside, inside, overall)]
        text = f"{means[0]:.3f} on the background, {means[1]:.3f} on the object; {means[2]:.0%} of all attention"
        return text, mean_over_classes(outside - inside), len(inside)

    return Finding(
        "The start token takes what no word claims",
        "Its map shows the background.",
        "mean share of attention of the start token's DAAM map on the background minus on the main object, mean over "
        "classes",
        _evidence(experiments, difference),
    )


def _resolution(experiments) -> Finding:
    def difference(x, track):
        found = {name: by_resolution(x.tests[track, name]) for name in x.names(track)}
        heights = list(next(iter(found.values())))
        best = [summarize_curve(over_classes({n: v[height] for n, v in found.items()})).maximum for height in heights]
        text = ", ".join(
            f"{100 * value:.1f} from {height} x {height}" for height, value in zip(heights, best, strict=True)
        )
        high, rest = (
            {n: _at_best(v[height]) for n, v in found.items()}
            for height in (heights[-1], heights[int(np.argmax(best[:-1]))])
        )
        difference = as_columns(high) - as_columns(rest)
        return f"maximum mIoU {text}", mean_over_classes(difference), len(difference)

    return Finding(
        "Layers of the highest resolution align best",
        "There 64 x 64 layers have the best mIoU of all. OVAM's ablation with Stable Diffusion 1.5 says the opposite: "
        "71.5 from 16 x 16 alone, 40.2 from 64 x 64 alone.",
        "DAAM from layers of the largest maps minus that from the best other size, mean IoU over classes, each at its "
        "best threshold; of models whose maps have several sizes",
        _evidence(experiments, difference, usable=_have_several_heights),
    )


def _evidence(experiments, difference: Callable, usable: Callable = Experiment.names) -> list[Evidence]:
    pairs = [(x, track) for x in experiments for track in TRACKS if usable(x, track)]
    return [Evidence(x.model, track, *difference(x, track)) for x, track in pairs]


def _versus(x, track, first, second, names=None):
    """Compare two (method, number of train examples), as `_compared` does."""
    ious = [at_chosen_threshold(x, method, track, count) for method, count in (first, second)]
    return _compared(*ious, names or (first[0], second[0]))


def _compared(first, second, names):
    """Compare two methods' IoU (image,) by class: a sentence, the difference with its interval, number of images."""
    first, second = as_columns(first), as_columns(second)
    mean, low, high = mean_over_classes(first - second)
    values = [100 * mean_over_classes(v)[0] for v in (first, second)]
    sentence = f"{names[0]} {values[0]:.1f}, {names[1]} {values[1]:.1f}: "
    return sentence + f"{100 * mean:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})", (mean, low, high), len(first)


def _on_riders(x, track) -> list[tuple[float, float, float]]:
    """Return DAAM of "rider" on riders, on bicycles and elsewhere, as multiples of its mean, per image with both."""
    found = []
    for e in x.tests.get((track, "rider"), []):
        bicycle, riders = e.mask("bicycle"), e.mask("rider")
        if bicycle is not None and bicycle.any():
            heat = upscale(e.maps[PROMPT_WORDS["rider"]], e.truth.shape)
            found.append([float(heat[where].mean() / heat.mean()) for where in (riders, bicycle, ~(bicycle | riders))])
    return found


def _on_start(e) -> tuple[float, float, float]:
    """Return the mean attention probability of the start token on the main object, elsewhere, and over the image."""
    heat = upscale(e.maps.start, e.truth.shape)
    return float(heat[e.truth].mean()), float(heat[~e.truth].mean()), float(heat.mean())


def _have_several_heights(x, track) -> bool:
    examples = [e for name in x.names(track) for e in x.tests[track, name]]
    return len({maps.shape[-2] for e in examples for maps in e.layers.values()}) > 1


def _at_best(ious):
    return ious[np.searchsorted(THRESHOLDS, best_threshold(THRESHOLDS, ious))]
