"""Choose and measure the settings of the recipes for `tiny`: how many images are kept, and how right their labels are.

    python -m experiments.studies.recipe_quality choose flood-tiny    # maps and masks, on three sets of images
    python -m experiments.studies.recipe_quality report flood-tiny    # as it stands, on images that chose nothing

The reference segmenter says what an image shows. IoU of a class is the mean over images whose prompt says its word;
ignored pixels do not count. A report makes a data set of all prompts alike, without `kept`, which leaves out whatever
comes after enough.
"""

import argparse
import itertools
import json
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

import attnlab as al
from attnlab import metrics
from attnlab.dataset import Dataset, Filters, Recipe, find_recipe, generate_dataset, known_recipes, label
from attnlab.masks import IGNORE
from attnlab.recording.recorder import record
from attnlab.scenes.captions import VISIBLE_AREA
from attnlab.segmentation import Segmenter, load_segmenter
from attnlab.storage import write_text

from ..bundled.seen import rate
from .mask_settings import every_setting

__all__ = ["RECIPE_QUALITY_RESULTS", "LabeledImage", "choose_settings", "draw_recipe", "main", "quality_of"]

RECIPE_QUALITY_RESULTS = Path(__file__).parents[1] / "results" / "recipe_quality.json"
_CHOOSING, _REPORTING = (
    10_000_000,
    20_000_000,
)  # first seeds of images that settings are chosen on, and of reported ones
_PROPAGATED = (0, 1)  # how often maps are propagated, of what is tried
_ATTENTION = 16  # height of the self-attention along which they are
_GRIDS = (
    {"method": ("otsu",)},
    {"method": ("threshold",), "level": (0.3, 0.4, 0.5, 0.6)},
    {"method": ("random_walker",), "low": (0.1, 0.2), "high": (0.7, 0.8), "beta": (500.0, 2000.0)},
)  # of masks: what was best for some word in `mask_settings`


class LabeledImage(NamedTuple):
    """A generated image, the maps of its classes for each number of propagations, and what it shows."""

    image: np.ndarray  # uint8 (row, column, rgb)
    heats: dict[int, dict[str, np.ndarray]]  # (row, column) by class
    truth: np.ndarray  # uint8 (row, column): numbers of the recipe's classes, 0 for the others


def draw_recipe(recipe: Recipe, count: int, segmenter: Segmenter) -> list[LabeledImage]:
    """Draw `count` images of a recipe's prompts, in turn, from the recipe's seed on."""
    pipe = al.load_pipeline(recipe.model, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    texts = np.random.default_rng(recipe.seed).permutation(recipe.texts)
    prompts, found = [str(texts[i % len(texts)]) for i in range(count)], []
    for start in tqdm(range(0, count, recipe.batch), desc="images", leave=False):
        some = range(start, min(start + recipe.batch, count))
        call = {"num_inference_steps": recipe.steps, "guidance_scale": recipe.guidance}
        call["generator"] = [al.seed(recipe.seed_of(i)) for i in some]
        with record(pipe, keep="maps", self_attention=_ATTENTION) as recording:
            images = [np.asarray(image) for image in pipe(prompts[some.start : some.stop], **call).images]
        truths = _truths(recipe, images, segmenter)
        found += [LabeledImage(*one) for one in zip(images, _heats(recipe, recording), truths, strict=True)]
    return found


def _heats(recipe, recording):
    """Yield the maps of each image's classes, by number of propagations, as large as the image."""
    for one in recording:
        maps, attention = al.daam(one), one.self_attention(_ATTENTION)
        words = {name: word for name, word in recipe.classes.items() if word in maps}
        every = {power: al.propagate(maps, *attention, power) if power else maps for power in _PROPAGATED}
        yield {power: {name: of.upscale((64, 64))[w] for name, w in words.items()} for power, of in every.items()}


def _truths(recipe, images, segmenter):
    """Return what images show by the numbers of a recipe's classes, uint8 (image, row, column)."""
    found = segmenter.segment(images)
    numbers = [1 + [*recipe.classes].index(name) if name in recipe.classes else 0 for name in segmenter.classes]
    return np.array(numbers, np.uint8)[found]


def choose_settings(recipe: Recipe, repeats: Sequence[Sequence[LabeledImage]]) -> list[tuple[dict, list[float]]]:
    """Try maps and masks on several sets of images: settings and the mean IoU of each set, best mean first."""
    open_ = Filters(area=None, flat=None, blank=None, duplicates=None)
    masks, tried = [*itertools.chain(*map(every_setting, _GRIDS))], []
    for power, mask in tqdm([*itertools.product(_PROPAGATED, masks)], desc="settings", leave=False):
        changed = replace(recipe, mask=mask, band=0.0, filters=open_)
        means = [_mean_iou(changed, images, power) for images in repeats]
        tried.append(({"propagate": power, "mask": mask}, means))
    return sorted(tried, key=lambda one: -np.mean(one[1]))


def _mean_iou(recipe, images, power):
    """Return the mean over classes of their mean IoU over images whose prompt names them."""
    labels = [label(one.heats[power], one.image, recipe).labels for one in images]
    ious = _ious(recipe, labels, [one.truth for one in images], [set(one.heats[power]) for one in images])
    return float(np.nanmean(ious, axis=0).mean())


def _ious(recipe, labels, truths, named):
    """Return the IoU of each class (image, class), NaN where the prompt does not name it."""
    rows = []
    for own, truth, names in zip(labels, truths, named, strict=True):
        valid = own != IGNORE
        pairs = [(own[valid] == n, truth[valid] == n) for n in range(1, len(recipe.classes) + 1)]
        rows.append([metrics.iou(*p) if c in names else np.nan for c, p in zip(recipe.classes, pairs, strict=True)])
    return np.array(rows)


def quality_of(dataset: Dataset, segmenter: Segmenter) -> dict:
    """Measure a data set of label images: what is kept, what is shown, IoU of labels, with 95% intervals and n."""
    recipe, pairs = dataset.recipe, [*dataset]
    labels, truths = (
        np.stack(x) for x in ([p.labels for p in pairs], _truths(recipe, [p.image for p in pairs], segmenter))
    )
    prompts = [pair.metadata["prompt"] for pair in pairs]
    named = [{name for name, word in recipe.classes.items() if word in prompt} for prompt in prompts]
    ious, numbers = _ious(recipe, labels, truths, named), enumerate(recipe.classes, 1)
    visible = {name: (truths == n).mean((1, 2)) >= VISIBLE_AREA for n, name in numbers}
    asked = {name: np.array([name in names for names in named]) for name in recipe.classes}
    count = len(pairs) + len(dataset.rejected)
    kept = np.arange(count) < len(pairs)
    reasons = Counter(line["reason"].split(" of ")[0] for line in dataset.rejected)
    return {
        "made": count,
        "kept": _with_interval(kept),
        "rejected": dict(reasons.most_common()),
        "without a class": sum(not names for names in named),
        "iou": {name: _with_interval(ious[asked[name], i]) for i, name in enumerate(recipe.classes)},
        "shown when asked": {name: _with_interval(visible[name][asked[name]]) for name in recipe.classes},
        "shown unasked": {name: _with_interval(visible[name][~asked[name]]) for name in recipe.classes},
        "ignored pixels": round(float((labels == IGNORE).mean()), 4),
    }


def _with_interval(values):
    """Return mean, ends of its 95% interval, and number: Wilson's of what is true or false, else the bootstrap's."""
    ends = rate(values)["interval"] if values.dtype == bool else metrics.bootstrap_interval(values)
    return [*(round(float(x), 4) for x in (values.mean(), *ends)), len(values)]


def _choose(recipe, args, segmenter):
    sets = [
        draw_recipe(replace(recipe, seed=_CHOOSING + 1000 * k), args.images, segmenter) for k in range(args.repeats)
    ]
    for settings, means in choose_settings(recipe, sets)[: args.best]:
        print(f"{np.mean(means):.3f} ({', '.join(f'{x:.3f}' for x in means)})  {json.dumps(settings)}", flush=True)
    every = [*itertools.chain(*sets)]
    print(f"{_mean_iou(recipe, every, recipe.propagate):.3f}  as the recipe stands, on all of them")


def _report(name, recipe, args, segmenter):
    with TemporaryDirectory() as scratch:
        recipe = replace(recipe, seed=args.seed, images=args.each, kept=None, threads=args.threads)
        dataset = generate_dataset(recipe, Path(args.out or scratch, name))
        found = quality_of(dataset, segmenter)
    print(json.dumps(found, indent=1))
    if not args.keep:
        return
    known = json.loads(RECIPE_QUALITY_RESULTS.read_text()) if RECIPE_QUALITY_RESULTS.exists() else {}
    write_text(RECIPE_QUALITY_RESULTS, json.dumps(known | {name: found}, indent=1, sort_keys=True) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Choose or report."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.studies.recipe_quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=("choose", "report"))
    parser.add_argument("recipe", choices=[name for name in known_recipes() if name.endswith("-tiny")])
    parser.add_argument("--model", help="another bundled model, such as tiny-plain")
    parser.add_argument("--steps", type=int, help="other denoising steps")
    parser.add_argument("--guidance", type=float, help="another guidance")
    parser.add_argument("--images", type=int, default=40, help="choose: images in each set")
    parser.add_argument("--repeats", type=int, default=3, help="choose: sets of images")
    parser.add_argument("--best", type=int, default=12, help="choose: settings that are shown")
    parser.add_argument("--each", type=int, default=2, help="report: images of each prompt")
    parser.add_argument("--threads", type=int, default=2, help="report: 1 where other work has the cores")
    parser.add_argument("--seed", type=int, default=_REPORTING, help="report: seed of the first record")
    parser.add_argument("--out", help="report: folder for the data set, which stays")
    parser.add_argument("--keep", action="store_true", help=f"report: write to {RECIPE_QUALITY_RESULTS.name}")
    args = parser.parse_args(argv)
    recipe, segmenter = Recipe.load(find_recipe(args.recipe)), load_segmenter("street", "cpu")
    changes = {key: getattr(args, key) for key in ("model", "steps", "guidance") if getattr(args, key) is not None}
    recipe = replace(recipe, **changes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of masks that come out empty
        if args.what == "choose":
            _choose(recipe, args, segmenter)
        else:
            _report(args.recipe, recipe, args, segmenter)


if __name__ == "__main__":
    main()
