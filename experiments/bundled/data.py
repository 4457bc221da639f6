"""Render many scenes into arrays, and keep them on disk between runs."""

import json
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from tqdm import tqdm

from attnlab.scenes import Scene, street
from attnlab.storage import replacing

__all__ = ["Scenes", "cached_scenes", "render_many"]

_BLOCK = 500  # scenes per task of the process pool


@dataclass(frozen=True)
class Scenes:
    """Many scenes: images uint8 (scene, row, column, rgb), labels uint8 (scene, row, column), captions, their words."""

    images: np.ndarray
    labels: np.ndarray
    captions: list[str]
    words: list[dict[str, str]]

    @classmethod
    def of(cls, scenes: Iterable[Scene]) -> "Scenes":
        """Stack scenes of one size."""
        images, labels, captions, words = zip(*((s.image, s.labels, s.caption, s.words) for s in scenes), strict=True)
        return cls(np.stack(images), np.stack(labels), list(captions), list(words))

    def __len__(self):
        return len(self.captions)


def render_many(first: int, count: int, size: int, workers: int | None = None) -> Scenes:
    """Render scenes of the seeds first, first + 1, ...; default: as many processes as there are cores."""
    starts = range(first, first + count, _BLOCK)
    with ProcessPoolExecutor(workers) as pool:
        jobs = pool.map(_render_block, [(s, min(_BLOCK, first + count - s), size) for s in starts])
        blocks = list(tqdm(jobs, total=len(starts), desc="rendering scenes"))
    arrays = (np.concatenate([getattr(block, name) for block in blocks]) for name in ("images", "labels"))
    lists = (list(chain(*(getattr(block, name) for block in blocks))) for name in ("captions", "words"))
    return Scenes(*arrays, *lists)


def _render_block(job):
    first, count, size = job
    return Scenes.of(street.render(seed, size) for seed in range(first, first + count))


def cached_scenes(folder: Path, first: int, count: int, size: int) -> Scenes:
    """Render scenes as `render_many`, or read them from `folder`, where an earlier run left them."""
    stem = folder / f"scenes_{first}_{count}_{size}"
    arrays, texts = stem.with_suffix(".npz"), stem.with_suffix(".json")
    if not (arrays.exists() and texts.exists()):
        folder.mkdir(parents=True, exist_ok=True)
        scenes = render_many(first, count, size)
        texts.write_text(json.dumps([scenes.captions, scenes.words]))
        with replacing(arrays) as part:
            np.savez(part, images=scenes.images, labels=scenes.labels)
    stored = np.load(arrays)
    captions, words = json.loads(texts.read_text())
    return Scenes(stored["images"], stored["labels"], captions, words)
