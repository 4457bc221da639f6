"""Measure what a generated data set is worth: train segmenters on few real pairs, with and without generated ones.

Real pairs are rendered scenes, whose masks are exact; generated pairs are a bundled model's images with masks of its
own attention. Every segmenter is trained for the same number of steps and tested on the same held-out scenes.

    python -m experiments.studies.generated_pairs      # all of it, into experiments/results/generated_pairs.json
    study = GeneratedPairsStudy(sizes=(10,), seeds=2)  # or a part of it
    record = study.run("runs/downstream", workers=2)   # after an interruption, the same call continues
    run_ious(record, 10, "tiny")                       # (seed, class)
"""

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from attnlab import LinearMap, TokenLibrary, fit_tokens, linear_daam, load_pipeline, load_segmenter, record_image, seed
from attnlab.dataset import Dataset, Filters, Recipe, generate_dataset, label
from attnlab.metrics import class_ious, confusion
from attnlab.recording.recorder import record
from attnlab.scenes import street
from attnlab.segmentation import Segmenter, train_segmenter
from attnlab.segmentation.folders import Pairs
from attnlab.storage import claim_folder, replacing

from ..bundled.localize import TIMESTEPS
from .jobs import mean_and_interval, run_jobs

__all__ = ["ADDED_PAIRS", "DISASTERS", "FIRST_REAL_SEED", "FIRST_REAL_TEST_SEED", "GENERATED_PAIRS_RESULTS"]
__all__ += ["MIN_CLASS_AREA", "GeneratedPairsStudy", "gains_table", "learn_tokens", "real_pairs", "run_ious"]
__all__ += ["with_reference_labels"]

DISASTERS = ("fire", "smoke", "water")  # the classes
FIRST_REAL_SEED = street.HELD_OUT + 500_000  # no bundled model saw these scenes, no notebook shows them
_FIRST_FURTHER_REAL_SEED = street.HELD_OUT + 550_000
FIRST_REAL_TEST_SEED = street.HELD_OUT + 600_000
MIN_CLASS_AREA = 0.02  # a scene counts if one of the classes covers at least this fraction of it
_PROMPTS = ("a burning {thing} with fire and smoke {when}", "water and a {thing} {when}", "a {thing} on a road {when}")
_LISTS = {
    "thing": ("house", "tree", "car", "building"),
    "when": ("on a sunny day", "at night", "at dusk", "in winter"),
}
ADDED_PAIRS = {  # what is added to the real pairs, and what its maker saw; "oracle" is the reference segmenter
    "": "nothing",
    "tiny": "tiny, its words' masks: its attention was trained on exact masks",
    "tiny, oracle": "tiny, the reference segmenter's masks: both were trained on exact masks",
    "tiny-plain": "tiny-plain, its words' masks: trained on captions alone",
    "tiny-plain, tokens": "tiny-plain, masks of tokens learned from the same real pairs: captions and these masks",
    "tiny-plain, oracle": "tiny-plain, the reference segmenter's masks: captions, and exact masks for the segmenter",
    "rendered": "as many more real pairs: exact",
}
_log = logging.getLogger(__name__)
GENERATED_PAIRS_RESULTS = Path(__file__).parents[1] / "results" / "generated_pairs.json"


def real_pairs(count: int, first: int) -> Pairs:
    """Render scenes, from seed `first` on, that show at least one of the classes; labels are 0 for none, 1, ..."""
    images, labels, number = [], [], first
    while len(images) < count:
        scene = street.render(number)
        masks = [scene.mask(name) for name in DISASTERS]
        if max(mask.mean() for mask in masks) >= MIN_CLASS_AREA:
            images.append(scene.image)
            labels.append(sum(i * mask for i, mask in enumerate(masks, 1)).astype(np.uint8))
        number += 1
    return np.stack(images), np.stack(labels)


_rendered_once = lru_cache(maxsize=2)(real_pairs)


def _as_arrays(dataset: Dataset) -> Pairs:
    pairs = list(dataset)
    return np.stack([np.asarray(p.image) for p in pairs]), np.stack([p.labels for p in pairs])


def with_reference_labels(pairs: Pairs, segmenter: Segmenter) -> Pairs:
    """Return the same images with the labels of a reference segmenter, to measure what better masks are worth."""
    found, labels = segmenter.segment(pairs[0]), np.zeros(pairs[1].shape, np.uint8)
    for number, name in enumerate(DISASTERS, 1):
        labels[found == segmenter.classes.index(name)] = number
    return pairs[0], labels


def learn_tokens(pipe, pairs: Pairs) -> TokenLibrary:
    """Learn a token of each class in a few pairs; the prompt of each image names its classes."""
    images, labels = pairs
    present = [[name for i, name in enumerate(DISASTERS, 1) if (one == i).any()] for one in labels]
    prompts = [" and ".join(names) for names in present]
    recording = record_image(pipe, list(images), prompts, timesteps=TIMESTEPS, generator=seed(0))
    maps = [linear_daam(one) for one in recording]
    tokens = TokenLibrary()
    for i, name in enumerate(DISASTERS, 1):
        if (labels == i).any():
            tokens.add(fit_tokens(maps, {name: list(labels == i)}, {name: name})[name])
    return tokens


def _label_with_tokens(images: Sequence[tuple[np.ndarray, LinearMap]], tokens: TokenLibrary, recipe: Recipe) -> Pairs:
    """Label generated images as `generate_dataset` does, but with learned tokens, and without generating again."""
    made = [(x, label({n: maps.upscaled(tokens[n], x.shape[:2]) for n in tokens}, x, recipe)) for x, maps in images]
    kept = [(x, one.labels) for x, one in made if one.rejected is None]
    return np.stack([x for x, _ in kept]), np.stack([y for _, y in kept])


@dataclass(frozen=True)
class GeneratedPairsStudy:
    """What is compared."""

    sizes: tuple[int, ...] = (10, 30, 100)  # numbers of real pairs
    seeds: int = 5  # repetitions, each with other real pairs and another start of the segmenter
    images: int = 6  # generated images of each of 48 prompts
    denoising: int = 20  # steps of a generation
    steps: int = 500  # of the training of each segmenter
    tests: int = 400  # held-out scenes

    def recipe(self, model: str, **changes) -> Recipe:
        """Return the recipe of the generated pairs."""
        options = {"images": self.images, "steps": self.denoising, "filters": Filters(area=None)} | changes
        return Recipe(_PROMPTS, {name: name for name in DISASTERS}, model, lists=_LISTS, **options)

    def jobs(self) -> list[tuple[int, str, int]]:
        """List the runs (real pairs, what is added, seed), seed by seed; with 0 real pairs what is added is alone."""
        alone = [kind for kind in ADDED_PAIRS if kind not in ("", "tiny-plain, tokens")]
        jobs = [(n, kind) for n in self.sizes for kind in ADDED_PAIRS] + [(0, kind) for kind in alone]
        return [(*job, s) for s in range(self.seeds) for job in jobs]

    def few(self, n: int, s: int) -> Pairs:
        """Return the n real pairs of a seed."""
        images, labels = _rendered_once(max(self.sizes), FIRST_REAL_SEED)
        some = np.random.default_rng([s, n]).permutation(len(images))[:n]
        return images[some], labels[some]

    def run(self, out: str | Path, workers: int = 2) -> dict:
        """Make the pairs, train every segmenter in `workers` processes of one thread, write and return out/record.json.

        Results that are there are not computed again. ValueError if the folder holds a study with other settings.
        """
        out = Path(out)
        settings = claim_folder(out, asdict(self), "study.json")
        sets, jobs = self.make_sets(out), self.jobs()
        confusions = run_jobs(partial(self.train, out), jobs, out / "arms", workers)
        found = [
            {"real": n, "added": kind, "seed": s, "iou": class_ious(one).round(4).tolist()}
            for (n, kind, s), one in zip(jobs, confusions, strict=True)
        ]
        result = {"study": settings, "sets": sets, "arms": found}
        (out / "record.json").write_text(json.dumps(result, indent=1) + "\n")
        return result

    def make_sets(self, out: Path) -> dict[str, dict]:
        """Make every set of added pairs; return its size, and the IoU of its labels with the reference segmenter's."""
        segmenter = load_segmenter("street", "cpu")
        made = {"rendered": real_pairs(len(self.recipe("tiny")), _FIRST_FURTHER_REAL_SEED)}
        for model in ("tiny", "tiny-plain"):
            made[model] = _as_arrays(generate_dataset(self.recipe(model), out / model))
            made[f"{model}, oracle"] = with_reference_labels(made[model], segmenter)
        wanted = [(n, s) for s in range(self.seeds) for n in self.sizes]
        names = {(n, s): f"tiny-plain, tokens {n} {s}" for n, s in wanted}
        if not all(_pairs_file(out, name).exists() for name in names.values()):
            made |= self._token_sets(names)
        for name, pairs in made.items():
            _save_pairs(_pairs_file(out, name), pairs)
        metadata = {}
        for name in [*list(ADDED_PAIRS)[1:4], *names.values()]:
            pairs = _load_pairs(_pairs_file(out, name))
            counts = confusion(pairs[1], with_reference_labels(pairs, segmenter)[1], len(DISASTERS) + 1)
            metadata[name] = {"pairs": len(pairs[0]), "iou with the oracle": class_ious(counts)[1:].round(4).tolist()}
        return metadata

    def _token_sets(self, names):
        recipe = self.recipe("tiny-plain", map="linear", mask={"method": "zero"})
        pipe = load_pipeline("tiny-plain", device="cpu")
        pipe.set_progress_bar_config(disable=True)
        images = _generate(pipe, recipe)
        wanted = tqdm(names.items(), desc="tokens")
        return {name: _label_with_tokens(images, learn_tokens(pipe, self.few(n, s)), recipe) for (n, s), name in wanted}

    def train(self, out: Path, n: int, kind: str, s: int) -> list[list[int]]:
        """Train the segmenter of one run; return its confusion (class, class), pixels of all test scenes."""
        name = f"{kind} {n} {s}" if kind == "tiny-plain, tokens" else kind
        more = _load_pairs(_pairs_file(out, name)) if kind else None
        first, extra = (self.few(n, s), more) if n else (more, None)
        options = {"extra": extra, "steps": self.steps, "seed": s, "progress": False}
        segmenter = train_segmenter(*first, ("background", *DISASTERS), **options)
        return segmenter.evaluate(*_rendered_once(self.tests, FIRST_REAL_TEST_SEED)).sum(0).tolist()


def run_ious(record: dict, real: int, added: str) -> np.ndarray:
    """Return the IoU (seed, class) of runs in a record, without the background."""
    found = [run["iou"] for run in record["arms"] if (run["real"], run["added"]) == (real, added)]
    if not found:
        raise KeyError(f"no run of {real} real pairs and {added!r} added")
    return np.array(found, float)[:, 1:]


def gains_table(record: dict) -> list[dict]:
    """Tabulate mean IoU of each class, of all classes, and what the added pairs gain over the real ones alone.

    Gains are paired by seed: the same real pairs and the same start of the segmenter. Intervals are 95%, over seeds.
    """
    rows = []
    for n, kind in dict.fromkeys((run["real"], run["added"]) for run in record["arms"]):
        own = run_ious(record, n, kind)
        row = {"real pairs": n, "added": kind or "nothing"}
        row |= {name: round(float(value), 3) for name, value in zip(DISASTERS, own.mean(0), strict=True)}
        mean, low, high = mean_and_interval(own.mean(1))
        row["mean (95% interval)"] = f"{mean:.3f} ({low:.3f} to {high:.3f})"
        gain = mean_and_interval(own.mean(1) - run_ious(record, n, "").mean(1)) if n and kind else None
        row["gain"] = "{:+.3f} ({:+.3f} to {:+.3f})".format(*gain) if gain else ""
        rows.append(row)
    return rows


def _generate(pipe, recipe):
    """Generate every image of a recipe: (image, LinearMap)."""
    found = []
    for batch in tqdm([b for n in range(recipe.shards) for b in recipe.batches(n)], desc="images"):
        call = {"num_inference_steps": recipe.steps, "guidance_scale": recipe.guidance}
        call["generator"] = [seed(recipe.seed_of(i)) for i in batch]
        with record(pipe, keep="sum") as recording:
            made = pipe([recipe.prompt(i) for i in batch], **call)
        found += [(np.asarray(x), linear_daam(one)) for x, one in zip(made.images, recording, strict=True)]
    return found


def _pairs_file(out, name):
    return Path(out) / f"{name}.npz"


def _save_pairs(path, pairs):
    with replacing(path) as part:
        np.savez(part, images=pairs[0], labels=pairs[1])


def _load_pairs(path):
    with np.load(path) as file:
        return file["images"], file["labels"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/downstream", help="folder for pairs and results; continues there")
    parser.add_argument("--seeds", type=int, default=GeneratedPairsStudy.seeds)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    found = GeneratedPairsStudy(seeds=given.seeds).run(given.out, given.workers)
    GENERATED_PAIRS_RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    for row in gains_table(found):
        _log.info(" | ".join(map(str, row.values())))


if __name__ == "__main__":
    main()
