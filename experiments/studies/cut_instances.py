"""Measure how well masks are cut into single things: connected regions, DBSCAN clusters, edges of self-attention.

Held-out street scenes know their single things exactly. "exact": the exact mask of each class is cut, so that cutting
alone is measured. "words": the DAAM map of each class that the caption names becomes a mask (Otsu), which is cut.

    python -m experiments.studies.cut_instances                 # settings on tuning scenes, then once on others
    python -m experiments.studies.cut_instances --tuning 4 --scenes 6 --seeds 1 --resamples 20 --work runs/try

The measure is AP50 of pycocotools: masks that overlap a thing by an IoU of 0.5, mean over classes, at most 100 a class
and image. Things of less than 0.4% of the image, which captions do not count either, are ignored, and so are the far
blocks of a skyline. A found thing is as sure as it is large ("exact"), or as its mean heat over the map's maximum
("words"). The same call goes on after an interruption.
"""

import argparse
import contextlib
import hashlib
import io
import itertools
import json
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from skimage.measure import label
from tqdm import tqdm

import attnlab as al
from attnlab.dataset.instances import split_instances
from attnlab.masks import mask_by
from attnlab.plots.styling import save_figure
from attnlab.scenes import Scene, street
from attnlab.storage import write_text

from .intervals import holm
from .jobs import run_jobs

__all__ = ["CUT_GRID", "FIRST_CUT_SEED", "FIRST_TUNED_CUT_SEED", "average_precision", "cut_scenes", "draw_cuts"]
__all__ += ["main", "match_things", "summarize_cuts"]

FIRST_TUNED_CUT_SEED = street.HELD_OUT + 800_000  # of the scenes on which settings are chosen
FIRST_CUT_SEED = street.HELD_OUT + 850_000  # of the scenes that are measured
CUT_GRID = [
    *({"method": "connected", "min_area": a} for a in (0.001, 0.002, 0.004)),
    *({"method": "dbscan", "eps": e, "min_samples": 4, "min_area": 0.002} for e in (0.025, 0.036, 0.05, 0.07)),
    *({"method": "edges", "level": x, "min_area": 0.004} for x in (0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5)),
]
"""Settings that are tried of each method."""
_TASKS = ("exact", "words")
_SIDE, _HEIGHT = 64, 16  # of scenes in pixels, and of the self-attention of the bundled models
_LEAST = 0.004 * _SIDE**2  # pixels of the smallest thing that is counted
_RECALLS = np.linspace(0, 1, 101)  # of COCO's mean over recall
_AT_ONCE = 20  # images that are recorded together
_RESULTS = Path(__file__).parents[1] / "results" / "instances.json"


def cut_scenes(settings: Sequence[Mapping], model: str, seed: int, first: int, count: int, *_: object) -> dict:
    """Cut the masks of `count` scenes from seed `first` on by each of the settings, with the model's noise by `seed`.

    Returns {"things": {task: rows}, "found": {task: rows of each settings}}, rows as `match_things` gives them.
    """
    pipe, generator = al.load_pipeline(model), al.seed(seed)
    truths, cuts = {task: [] for task in _TASKS}, {task: [[] for _ in settings] for task in _TASKS}
    for begin in range(first, first + count, _AT_ONCE):
        scenes = [street.render(s, _SIDE) for s in range(begin, min(begin + _AT_ONCE, first + count))]
        given = [scene.image for scene in scenes], [scene.caption for scene in scenes]
        recordings = al.record_image(pipe, *given, generator=generator, self_attention=_HEIGHT)
        for number, (scene, recording) in enumerate(zip(scenes, recordings, strict=True), begin - first):
            heats, attention = _heats_of(recording, scene), recording.self_attention(_HEIGHT)
            for task in _TASKS:
                masks = _masks_of(scene, heats if task == "words" else None)
                truths[task] += [one for name in masks for one in _truth(scene, number, name)]
                for found, (name, mask) in itertools.product(zip(cuts[task], settings, strict=True), masks.items()):
                    things = split_instances(mask, attention=attention, **found[1])
                    heat = heats[name] / heats[name].max() if task == "words" else None
                    found[0].extend(_found(things, heat, number, name))
    matched = {task: [match_things(truths[task], one, count) for one in cuts[task]] for task in _TASKS}
    things = {task: matched[task][0][0] for task in _TASKS}
    return {"things": things, "found": {task: [rows for _, rows in matched[task]] for task in _TASKS}}


def _heats_of(recording, scene):
    """Return the mean map (row, column) of the words of each class of things that the caption names."""
    maps, found = al.daam(recording).upscale(_SIDE), defaultdict(list)
    for query in maps:
        name = scene.words.get(query if isinstance(query, str) else query[0])
        if name in street.THINGS:
            found[name].append(maps[query])
    return {name: np.mean(heats, axis=0) for name, heats in found.items()}


def _masks_of(scene, heats=None):
    """Return the mask of each class of things: the exact one, or that of its map."""
    if heats is None:
        return {name: mask for name in street.THINGS if (mask := scene.mask(name)).any()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of flat maps, whose masks are empty
        return {name: mask_by({"method": "otsu"}, heat) for name, heat in heats.items()}


def _annotation(mask, number, name):
    rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    where = {"image_id": number + 1, "category_id": street.CLASSES.index(name)}
    return {**where, "segmentation": rle, "area": int(mask.sum()), "bbox": coco_mask.toBbox(rle).tolist()}


def _truth(scene, number, name):
    """List the annotations of the exact things of a class; pixels that are of none are a crowd, which is ignored."""
    own = scene.mask(name)
    return [
        _annotation(own & (scene.instances == i), number, name) | {"iscrowd": int(i == 0)}
        for i in np.unique(scene.instances[own])
    ]


def _found(things, heat, number, name):
    """List the annotations of what was cut; without a map its area says how sure it is."""
    masks = (things == i for i in range(1, things.max() + 1))
    scored = ((mask, float(mask.mean() if heat is None else heat[mask].mean())) for mask in masks)
    return [_annotation(mask, number, name) | {"score": score} for mask, score in scored]


def match_things(truths: Sequence[dict], found: Sequence[dict], count: int) -> tuple[list, list]:
    """Match COCO annotations of `count` images by pycocotools at an IoU of 0.5.

    Returns [(image, class, number of things)] and [(image, class, score, whether it is one of the things)]; what is
    ignored is in neither.
    """
    images = [{"id": i, "height": _SIDE, "width": _SIDE} for i in range(1, count + 1)]
    frame = {"info": {}, "images": images, "categories": [{"id": i} for i in range(len(street.CLASSES))]}
    both = []
    for annotations in (truths, found):
        both.append(COCO())
        numbered = [{"iscrowd": 0, **one, "id": i} for i, one in enumerate(annotations, 1)]
        both[-1].dataset = {**frame, "annotations": numbered}
        with contextlib.redirect_stdout(io.StringIO()):
            both[-1].createIndex()
    measured = COCOeval(*both, "segm")
    measured.params.iouThrs, measured.params.maxDets = np.array([0.5]), [100]
    measured.params.areaRng, measured.params.areaRngLbl = [[_LEAST, _SIDE**2]], ["all"]
    with contextlib.redirect_stdout(io.StringIO()):
        measured.evaluate()
    things, rows = [], []
    for one in filter(None, measured.evalImgs):
        where = int(one["image_id"]) - 1, int(one["category_id"])
        things.append((*where, int(len(one["gtIgnore"]) - np.sum(one["gtIgnore"]))))
        right, ignored = one["dtMatches"][0] > 0, one["dtIgnore"][0]
        scored = zip(one["dtScores"], right.tolist(), ignored, strict=True)
        rows += [(*where, float(score), is_right) for score, is_right, is_out in scored if not is_out]
    return things, rows


class _Bench:
    """Rows of one cutting, sorted for many draws of scenes."""

    def __init__(self, things, rows):
        self.parts = []
        for name in sorted({name for _, name, number in things if number}):
            counts = np.array([(image, number) for image, kind, number in things if kind == name])
            own = sorted((row for row in rows if row[1] == name), key=lambda row: -row[2])
            found = np.array([(row[0], row[3]) for row in own], int).reshape(-1, 2)
            self.parts.append((counts, found))

    def precision(self, weights):
        """Return the mean over classes of COCO's average precision, where scene i was drawn `weights[i]` times."""
        values = [_class_precision(counts, found, weights) for counts, found in self.parts]
        known = [value for value in values if value is not None]
        return float(np.mean(known)) if known else np.nan


def _class_precision(counts, found, weights):
    total = weights[counts[:, 0]] @ counts[:, 1]
    if total == 0:
        return None
    drawn = weights[found[:, 0]]
    right, wrong = np.cumsum(drawn * found[:, 1]), np.cumsum(drawn * (1 - found[:, 1]))
    precision = right / np.maximum(right + wrong, 1)
    highest = np.maximum.accumulate(precision[::-1])[::-1]  # at this recall or a higher one
    at = np.searchsorted(right / total, _RECALLS, side="left")
    return float(np.append(highest, 0)[at].mean())


def average_precision(things: Sequence, rows: Sequence, count: int) -> float:
    """Return AP50, 0..1, the mean over classes, of what `match_things` gives for `count` images."""
    return _Bench(things, rows).precision(np.ones(count, int))


def _touching(first, count):
    """Say of each scene whether two counted things of a class are in one connected region."""
    return [_touches(street.render(s, _SIDE)) for s in tqdm(range(first, first + count), desc="scenes", delay=1)]


def _touches(scene: Scene) -> bool:
    large = np.bincount(scene.instances.ravel()) >= _LEAST
    large[0] = False
    for name in street.THINGS:
        regions = label(scene.mask(name), connectivity=2)
        both = np.stack([regions, scene.instances])[:, (regions > 0) & large[scene.instances]]
        pairs = np.unique(both, axis=1)
        if pairs.shape[1] and np.bincount(pairs[0]).max() > 1:
            return True
    return False


def _choose(results, models, seeds, count):
    """Return the settings of each method with the highest mean AP50 over tasks, models and seeds; and all means."""
    means = []
    for k in range(len(CUT_GRID)):
        values = [
            average_precision(results[m, s]["things"][task], results[m, s]["found"][task][k], count)
            for m, s, task in itertools.product(models, seeds, _TASKS)
        ]
        means.append(float(np.mean(values)))
    chosen = {}
    for settings, mean in zip(CUT_GRID, means, strict=True):
        name = settings["method"]
        if name not in chosen or mean > chosen[name][1]:
            chosen[name] = settings, mean
    return [settings for settings, _ in chosen.values()], means


def summarize_cuts(
    results: Mapping,
    settings: Sequence[Mapping],
    models: Sequence[str],
    seeds: Sequence[int],
    touching: Sequence[bool],
    resamples: int = 1000,
) -> dict:
    """Return AP50 of each method in each task with 95% intervals, and differences: bootstrap over scenes and seeds.

    `results` has what `cut_scenes` returns by (model, seed). Every draw takes the same scenes and seeds for all
    methods; p values are two-sided, corrected by Holm over all differences.
    """
    count, rng, names = len(touching), np.random.default_rng(0), [s["method"] for s in settings]
    benches = {
        (m, s, task, name): _Bench(results[m, s]["things"][task], results[m, s]["found"][task][k])
        for m, s, task, (k, name) in itertools.product(models, seeds, _TASKS, enumerate(names))
    }
    draws = [(np.ones(count, int), list(seeds))]  # what was measured, then what might have been
    for _ in range(resamples):
        scenes = rng.multinomial(count, np.full(count, 1 / count))
        draws.append((scenes, rng.choice(seeds, len(seeds)).tolist()))
    groups = {"all": np.ones(count, int), "touching": np.array(touching, int)}
    values = {  # (draw, model)
        (task, group, name): np.empty((len(draws), len(models)))
        for task, group, name in itertools.product(_TASKS, groups, names)
    }
    for d, (weights, drawn) in enumerate(tqdm(draws, desc="draws", delay=1)):
        for (task, group, name), table in values.items():
            chosen = weights * groups[group]
            known = {s: [benches[m, s, task, name].precision(chosen) for m in models] for s in set(drawn)}
            table[d] = np.mean([known[s] for s in drawn], axis=0) if chosen.any() else np.nan
    found = {"scenes": count, "touching": int(np.sum(touching)), "resamples": resamples, "AP50": {}, "differences": []}
    for (task, group, name), table in values.items():
        row = {model: _interval(table[:, i]) for i, model in enumerate(models)}
        found["AP50"].setdefault(task, {}).setdefault(group, {})[name] = {"all models": _interval(table.mean(1)), **row}
    for task, group, (a, b) in itertools.product(_TASKS, groups, itertools.combinations(names, 2)):
        apart = (values[task, group, a] - values[task, group, b]).mean(1)
        low, high = (np.mean(side[1:]) for side in (apart <= 0, apart >= 0))
        p = min(1.0, 2 * (min(low, high) * resamples + 1) / (resamples + 1))
        found["differences"].append({"task": task, "scenes": group, "of": [a, b], "AP50": _interval(apart), "p": p})
    for one, p in zip(found["differences"], holm([one["p"] for one in found["differences"]])[0], strict=True):
        one["p by Holm"] = p
    return found


def _interval(values):
    """Return what was measured, and the 95% interval of the draws."""
    low, high = np.nanquantile(values[1:], [0.025, 0.975])
    return [round(float(x), 4) for x in (values[0], low, high)]


def draw_cuts(path: str | Path, seeds: Sequence[int], settings: Sequence[Mapping], model: str = "tiny") -> Path:
    """Draw scenes with their exact things and what each method cuts their exact masks into."""
    titles = ["scene", "exact things", *(one["method"] for one in settings)]
    figure, axes = plt.subplots(len(seeds), len(titles), figsize=(1.6 * len(titles), 1.7 * len(seeds)), squeeze=False)
    pipe = al.load_pipeline(model)
    for row, seed in zip(axes, seeds, strict=True):
        scene = street.render(seed, _SIDE)
        recording = al.record_image(pipe, scene.image, scene.caption, generator=al.seed(0), self_attention=_HEIGHT)
        given = {"attention": recording[0].self_attention(_HEIGHT)}
        masks = _masks_of(scene).values()
        cut = [[split_instances(mask, **given, **one) for mask in masks] for one in settings]
        shown = [scene.instances, *(_stacked(numbers) for numbers in cut)]
        row[0].imshow(scene.image)
        for cell, numbers in zip(row[1:], shown, strict=True):
            cell.imshow(np.ma.masked_equal(numbers % 20 + (numbers > 0), 0), cmap="tab20", vmin=1, vmax=20)
            cell.set_xlabel(f"{len(np.unique(numbers[numbers > 0]))} things")
        for cell, title in zip(row, titles, strict=True):
            cell.set(xticks=[], yticks=[], title=title if seed == seeds[0] else "")
    figure.tight_layout()
    return save_figure(figure, path)


def _stacked(cuts):
    """Number the things of several classes one after the other."""
    found = np.zeros((_SIDE, _SIDE), int)
    for numbers in cuts:
        found[numbers > 0] = numbers[numbers > 0] + found.max()
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Choose settings, measure them on other scenes, and write the results."""
    about = {"description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(prog="python -m experiments.studies.cut_instances", **about)
    parser.add_argument("--models", nargs="+", default=["tiny", "tiny-plain"], help="bundled models of streets")
    parser.add_argument("--tuning", type=int, default=40, help="scenes on which settings are chosen")
    parser.add_argument("--scenes", type=int, default=200, help="scenes that are measured")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the noise that is added to scenes")
    parser.add_argument("--resamples", type=int, default=1000, help="draws of the bootstrap")
    parser.add_argument("--workers", type=int, default=2, help="processes, each of one thread")
    parser.add_argument("--work", type=Path, default=Path("runs/instances"), help="folder of what is finished")
    parser.add_argument("--out", type=Path, default=_RESULTS, help="file of the results")
    parser.add_argument("--picture", type=Path, help="PNG of some scenes and how they are cut")
    args = parser.parse_args(argv)
    if low := [name for name in ("tuning", "scenes", "seeds", "resamples", "workers") if getattr(args, name) < 1]:
        parser.error(f"--{low[0]} is a whole number from 1 on")
    seeds = list(range(args.seeds))
    tuned = _run(args, CUT_GRID, seeds, FIRST_TUNED_CUT_SEED, args.tuning)
    settings, means = _choose(tuned, args.models, seeds, args.tuning)
    results = _run(args, settings, seeds, FIRST_CUT_SEED, args.scenes)
    touching = _touching(FIRST_CUT_SEED, args.scenes)
    tried = [{**one, "AP50": round(mean, 4)} for one, mean in zip(CUT_GRID, means, strict=True)]
    found = {"models": args.models, "seeds": args.seeds, "tuning scenes": args.tuning, "tried": tried}
    found |= {"settings": settings} | summarize_cuts(results, settings, args.models, seeds, touching, args.resamples)
    write_text(args.out, json.dumps(found, indent=1) + "\n")
    print(json.dumps({name: found[name] for name in ("settings", "AP50", "differences")}, indent=1))
    if args.picture:
        shown = itertools.islice((FIRST_CUT_SEED + i for i, touches in enumerate(touching) if touches), 3)
        draw_cuts(args.picture, [*shown, FIRST_CUT_SEED], settings)


def _run(args, settings, seeds, first, count):
    """Return what `cut_scenes` finds by (model, seed); what is known of these settings is read."""
    mark = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
    pairs = list(itertools.product(args.models, seeds))
    jobs = [(model, seed, first, count, mark) for model, seed in pairs]
    return dict(zip(pairs, run_jobs(partial(cut_scenes, settings), jobs, args.work, args.workers), strict=True))


if __name__ == "__main__":
    main()
