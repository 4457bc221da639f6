"""Rendered scenes as arrays, kept on disk between runs."""

import json
import logging
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from ..scenes import street

BLOCK = 500  # scenes a task of the process pool


@dataclass(frozen=True)
class Scenes:
    """Many scenes: images uint8 (scene, row, column, rgb), labels uint8 (scene, row, column), captions, their words."""

    images: np.ndarray
    labels: np.ndarray
    captions: list[str]
    words: list[dict[str, str]]

    def __len__(self):
        return len(self.captions)


def render_many(first: int, count: int, size: int, workers: int = 2) -> Scenes:
    """Scenes of the seeds first, first + 1, ..."""
    starts = range(first, first + count, BLOCK)
    with ProcessPoolExecutor(workers) as pool:
        jobs = pool.map(_render_block, [(s, min(BLOCK, first + count - s), size) for s in starts])
        blocks = list(tqdm(jobs, total=len(starts), desc="rendering scenes"))
    images, labels, captions, words = zip(*blocks, strict=True)
    return Scenes(np.concatenate(images), np.concatenate(labels), list(chain(*captions)), list(chain(*words)))


def _render_block(job):
    first, count, size = job
    scenes = [street.render(seed, size) for seed in range(first, first + count)]
    return (
        np.stack([s.image for s in scenes]),
        np.stack([s.labels for s in scenes]),
        [s.caption for s in scenes],
        [s.words for s in scenes],
    )


def report(result: dict, out: Path | None) -> None:
    """Log a result as JSON, and write it to the file `out` where one is given."""
    text = json.dumps(result, indent=1)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger(__name__).info(text)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n")


def cached(folder: Path, first: int, count: int, size: int) -> Scenes:
    """`render_many`, read from `folder` where an earlier run left it."""
    stem = folder / f"scenes_{first}_{count}_{size}"
    arrays, texts = stem.with_suffix(".npz"), stem.with_suffix(".json")
    if not (arrays.exists() and texts.exists()):
        folder.mkdir(parents=True, exist_ok=True)
        scenes = render_many(first, count, size)
        texts.write_text(json.dumps([scenes.captions, scenes.words]))
        part = stem.with_suffix(".part.npz")
        np.savez(part, images=scenes.images, labels=scenes.labels)
        part.replace(arrays)
    stored = np.load(arrays)
    captions, words = json.loads(texts.read_text())
    return Scenes(stored["images"], stored["labels"], captions, words)
