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

__all__ = ["Scenes", "cached_scenes", "render_many", "training_scenes"]

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

    def __add__(self, other: "Scenes") -> "Scenes":
        arrays = (np.concatenate([getattr(one, name) for one in (self, other)]) for name in ("images", "labels"))
        return Scenes(*arrays, self.captions + other.captions, self.words + other.words)


def render_many(first: int, count: int, size: int, near: bool = False, workers: int | None = None) -> Scenes:
    """Render scenes, or near views, of the seeds first, first + 1, ...; default: a process for each core."""
    starts = range(first, first + count, _BLOCK)
    with ProcessPoolExecutor(workers) as pool:
        jobs = pool.map(_render_block, [(s, min(_BLOCK, first + count - s), size, near) for s in starts])
        blocks = list(tqdm(jobs, total=len(starts), desc="rendering scenes"))
    arrays = (np.concatenate([getattr(block, name) for block in blocks]) for name in ("images", "labels"))
    lists = (list(chain(*(getattr(block, name) for block in blocks))) for name in ("captions", "words"))
    return Scenes(*arrays, *lists)


def _render_block(job):
    first, count, size, near = job
    return Scenes.of(street.render(seed, size, near=near) for seed in range(first, first + count))


def training_scenes(folder: Path, count: int, near: int, size: int) -> Scenes:
    """Render the first `count` training scenes and after them `near` near views, or read what an earlier run left."""
    scenes = cached_scenes(folder, 0, count, size)
    return scenes + cached_scenes(folder, 0, near, size, near=True) if near else scenes


def cached_scenes(folder: Path, first: int, count: int, size: int, near: bool = False) -> Scenes:
    """Render scenes as `render_many`, or read them from `folder`, where an earlier run left them."""
    stem = folder / f"{'near' if near else 'scenes'}_{first}_{count}_{size}"
    arrays, texts = stem.with_suffix(".npz"), stem.with_suffix(".json")
    if not (arrays.exists() and texts.exists()):
        folder.mkdir(parents=True, exist_ok=True)
        scenes = render_many(first, count, size, near)
        texts.write_text(json.dumps([scenes.captions, scenes.words]))
        with replacing(arrays) as part:
            np.savez(part, images=scenes.images, labels=scenes.labels)
    stored = np.load(arrays)
    captions, words = json.loads(texts.read_text())
    return Scenes(stored["images"], stored["labels"], captions, words)
