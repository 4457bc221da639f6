"""What a generated data set is worth: segmenters trained on few real pairs, with and without generated ones.

The real world is the renderer, whose masks are exact; the generated pairs are a bundled model's images with the masks
of its own attention. Every segmenter takes the same number of steps and is tested on the same held-out scenes.

    python -m experiments.studies.generated_pairs      # all of it, into experiments/results/generated_pairs.json
    study = Study(sizes=(10,), seeds=2)                # or a part of it
    record = study.run("runs/downstream", workers=2)   # again after an interruption: it goes on
    ious(record, 10, "tiny")                           # (seed, class)
"""

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from attnlab import LinearMap, TokenLibrary, fit_tokens, linear_daam, load_pipeline, load_segmenter, record_image
from attnlab import seed as seeded
from attnlab.dataset import Dataset, Filters, Recipe, generate_dataset, label
from attnlab.metrics import class_ious, confusion
from attnlab.recording.recorder import record
from attnlab.scenes import street
from attnlab.segmentation import Segmenter, train_segmenter
from attnlab.segmentation.folders import Pairs

from ..bundled.localize import TIMESTEPS
from .jobs import claim, mean_and_interval, run_arms

CLASSES = ("fire", "smoke", "water")
TRAINING = street.HELD_OUT + 500_000  # first seeds: no bundled model saw these scenes, nor what notebooks look at
MORE = street.HELD_OUT + 550_000
TESTS = street.HELD_OUT + 600_000
SEEN = 0.02  # a scene counts if one of the classes covers this share of it
PROMPTS = ("a burning {thing} with fire and smoke {when}", "water and a {thing} {when}", "a {thing} on a road {when}")
LISTS = {
    "thing": ("house", "tree", "car", "building"),
    "when": ("on a sunny day", "at night", "at dusk", "in winter"),
}
ADDED = {  # what is added to the real pairs, and what its maker saw
    "": "nothing",
    "tiny": "tiny, its words' masks: its attention was trained on exact masks",
    "tiny, oracle": "tiny, the oracle's masks: both were trained on exact masks",
    "tiny-plain": "tiny-plain, its words' masks: trained on captions alone",
    "tiny-plain, tokens": "tiny-plain, masks of tokens learned from the same real pairs: captions and these masks",
    "tiny-plain, oracle": "tiny-plain, the oracle's masks: captions, and exact masks for the oracle",
    "rendered": "as many more real pairs: exact",
}
log = logging.getLogger(__name__)
RECORD = Path(__file__).parents[1] / "results" / "generated_pairs.json"


def scenes(count: int, first: int, classes: Sequence[str] = CLASSES, size: int = 64) -> Pairs:
    """Rendered scenes, from a seed on, that show at least one of the classes: images, and labels 0, 1.. of them."""
    images, labels, number = [], [], first
    while len(images) < count:
        scene = street.render(number, size)
        masks = [scene.mask(name) for name in classes]
        if max(mask.mean() for mask in masks) >= SEEN:
            images.append(scene.image)
            labels.append(sum(i * mask for i, mask in enumerate(masks, 1)).astype(np.uint8))
        number += 1
    return np.stack(images), np.stack(labels)


def pairs_of(dataset: Dataset) -> Pairs:
    """A data set as arrays."""
    pairs = list(dataset)
    return np.stack([np.asarray(p.image) for p in pairs]), np.stack([p.labels for p in pairs])


def with_truth(pairs: Pairs, segmenter: Segmenter, classes: Sequence[str] = CLASSES) -> Pairs:
    """Return the same images with the labels of a reference segmenter: what better masks would be worth."""
    found, labels = segmenter.segment(pairs[0]), np.zeros(pairs[1].shape, np.uint8)
    for number, name in enumerate(classes, 1):
        labels[found == segmenter.classes.index(name)] = number
    return pairs[0], labels


def learned(pipe, few: Pairs) -> TokenLibrary:
    """A token of each class that few real pairs show; the model is told the names of the classes in each."""
    images, labels = few
    present = [[name for i, name in enumerate(CLASSES, 1) if (one == i).any()] for one in labels]
    looked = record_image(
        pipe, list(images), [" and ".join(names) for names in present], timesteps=TIMESTEPS, generator=seeded(0)
    )
    maps = [linear_daam(one) for one in looked]
    tokens = TokenLibrary()
    for i, name in enumerate(CLASSES, 1):
        if (labels == i).any():
            tokens.add(fit_tokens(maps, {name: list(labels == i)}, {name: name})[name])
    return tokens


def relabeled(looked: Sequence[tuple[np.ndarray, LinearMap]], tokens: TokenLibrary, recipe: Recipe) -> Pairs:
    """Pairs of generated images by learned tokens: what generate_dataset makes of them, without generating again."""
    made = [(x, label({n: maps.upscaled(tokens[n], x.shape[:2]) for n in tokens}, x, recipe)) for x, maps in looked]
    kept = [(x, one.labels) for x, one in made if one.rejected is None]
    return np.stack([x for x, _ in kept]), np.stack([y for _, y in kept])


@dataclass(frozen=True)
class Study:
    """What is compared.

    sizes : numbers of real pairs
    seeds : repetitions, each with other real pairs and another start
    images : of each of 48 prompts
    denoising, steps : of a generation, of a segmenter
    tests : held-out scenes
    """

    sizes: tuple[int, ...] = (10, 30, 100)
    seeds: int = 5
    images: int = 6
    denoising: int = 20
    steps: int = 500
    tests: int = 400

    def recipe(self, model: str, **changes) -> Recipe:
        """Of the generated pairs."""
        asked = {"images": self.images, "steps": self.denoising, "filters": Filters(area=None)} | changes
        return Recipe(PROMPTS, {name: name for name in CLASSES}, model, lists=LISTS, **asked)

    def arms(self) -> list[tuple[int, str, int]]:
        """(real pairs, what is added, seed), seed by seed. 0 real pairs: what is added, alone."""
        alone = [kind for kind in ADDED if kind not in ("", "tiny-plain, tokens")]
        arms = [(n, kind) for n in self.sizes for kind in ADDED] + [(0, kind) for kind in alone]
        return [(*arm, s) for s in range(self.seeds) for arm in arms]

    def few(self, n: int, s: int) -> Pairs:
        """The n real pairs of a seed."""
        images, labels = _real(max(self.sizes))
        some = np.random.default_rng([s, n]).permutation(len(images))[:n]
        return images[some], labels[some]

    def run(self, out: str | Path, workers: int = 2) -> dict:
        """Make the pairs, train every arm in `workers` processes of one thread, write and return out/record.json.

        What is there is not made again. ValueError if the folder holds a study with other settings.
        """
        out = Path(out)
        settings = claim(out, self)
        sets, arms = self.make_sets(out), self.arms()
        confusions = run_arms(partial(self.train, out), arms, out / "arms", workers)
        found = [
            {"real": n, "added": kind, "seed": s, "iou": class_ious(one).round(4).tolist()}
            for (n, kind, s), one in zip(arms, confusions, strict=True)
        ]
        result = {"study": settings, "sets": sets, "arms": found}
        (out / "record.json").write_text(json.dumps(result, indent=1) + "\n")
        return result

    def make_sets(self, out: Path) -> dict[str, dict]:
        """Every set of pairs that is added; how many pairs each has, and the IoU of its labels with the oracle's."""
        segmenter = load_segmenter("street", "cpu")
        made = {"rendered": scenes(len(self.recipe("tiny")), MORE)}
        for model in ("tiny", "tiny-plain"):
            made[model] = pairs_of(generate_dataset(self.recipe(model), out / model))
            made[f"{model}, oracle"] = with_truth(made[model], segmenter)
        wanted = [(n, s) for s in range(self.seeds) for n in self.sizes]
        names = {(n, s): f"tiny-plain, tokens {n} {s}" for n, s in wanted}
        if not all(_pairs_file(out, name).exists() for name in names.values()):
            made |= self._token_sets(names)
        for name, pairs in made.items():
            _save_pairs(_pairs_file(out, name), pairs)
        metadata = {}
        for name in [*list(ADDED)[1:4], *names.values()]:
            pairs = _load_pairs(_pairs_file(out, name))
            counts = confusion(pairs[1], with_truth(pairs, segmenter)[1], len(CLASSES) + 1)
            metadata[name] = {"pairs": len(pairs[0]), "iou with the oracle": class_ious(counts)[1:].round(4).tolist()}
        return metadata

    def _token_sets(self, names):
        recipe = self.recipe("tiny-plain", map="linear", mask={"method": "zero"})
        pipe = load_pipeline("tiny-plain", device="cpu")
        pipe.set_progress_bar_config(disable=True)
        looked = _generated(pipe, recipe)
        wanted = tqdm(names.items(), desc="tokens")
        return {name: relabeled(looked, learned(pipe, self.few(n, s)), recipe) for (n, s), name in wanted}

    def train(self, out: Path, n: int, kind: str, s: int) -> list[list[int]]:
        """Train the segmenter of an arm: its confusion (class, class), pixels of all tests."""
        name = f"{kind} {n} {s}" if kind == "tiny-plain, tokens" else kind
        more = _load_pairs(_pairs_file(out, name)) if kind else None
        first, extra = (self.few(n, s), more) if n else (more, None)
        options = {"extra": extra, "steps": self.steps, "seed": s, "progress": False}
        segmenter = train_segmenter(*first, ("background", *CLASSES), **options)
        return segmenter.evaluate(*_tests(self.tests)).sum(0).tolist()


def ious(record: dict, real: int, added: str) -> np.ndarray:
    """IoU (seed, class) of an arm in a record, without the background."""
    found = [arm["iou"] for arm in record["arms"] if (arm["real"], arm["added"]) == (real, added)]
    if not found:
        raise KeyError(f"no arm of {real} real pairs and {added!r} added")
    return np.array(found, float)[:, 1:]


def table(record: dict) -> list[dict]:
    """A row for each arm: mean IoU of each class, of all, and what adding the pairs gains over the real ones alone.

    Gains are paired by seed: the same real pairs and the same start of the segmenter. Intervals are 95%, over seeds.
    """
    rows = []
    for n, kind in dict.fromkeys((arm["real"], arm["added"]) for arm in record["arms"]):
        own = ious(record, n, kind)
        row = {"real pairs": n, "added": kind or "nothing"}
        row |= {name: round(float(value), 3) for name, value in zip(CLASSES, own.mean(0), strict=True)}
        mean, low, high = mean_and_interval(own.mean(1))
        row["mean (95% interval)"] = f"{mean:.3f} ({low:.3f} to {high:.3f})"
        gain = mean_and_interval(own.mean(1) - ious(record, n, "").mean(1)) if n and kind else None
        row["gain"] = "{:+.3f} ({:+.3f} to {:+.3f})".format(*gain) if gain else ""
        rows.append(row)
    return rows


def _generated(pipe, recipe):
    """(image, LinearMap) of every record of a recipe."""
    found = []
    for batch in tqdm([b for n in range(recipe.shards) for b in recipe.batches(n)], desc="images"):
        noise = [seeded(recipe.seed_of(i)) for i in batch]
        with record(pipe, keep="sum") as recording:
            made = pipe(
                [recipe.prompt(i) for i in batch],
                generator=noise,
                num_inference_steps=recipe.steps,
                guidance_scale=recipe.guidance,
            )
        found += [(np.asarray(x), linear_daam(one)) for x, one in zip(made.images, recording, strict=True)]
    return found


@lru_cache(maxsize=1)
def _real(count):
    return scenes(count, TRAINING)


@lru_cache(maxsize=1)
def _tests(count):
    return scenes(count, TESTS)


def _pairs_file(out, name):
    return Path(out) / f"{name}.npz"


def _save_pairs(path, pairs):
    part = path.with_name("pairs.part.npz")
    np.savez(part, images=pairs[0], labels=pairs[1])
    part.replace(path)


def _load_pairs(path):
    with np.load(path) as file:
        return file["images"], file["labels"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/downstream", help="folder for pairs and results; goes on there")
    parser.add_argument("--seeds", type=int, default=Study.seeds)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    found = Study(seeds=given.seeds).run(given.out, given.workers)
    RECORD.write_text(json.dumps(found, indent=1) + "\n")
    for row in table(found):
        log.info(" | ".join(map(str, row.values())))


if __name__ == "__main__":
    main()
