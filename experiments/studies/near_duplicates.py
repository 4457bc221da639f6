"""Measure how well thumbnails tell copies of an image from other images, beside difference hashes.

Different images are all pairs of rendered scenes, and of images that `tiny` draws of a few prompts, half of them dull
(fog, night). Copies are flipped, turned, resized, encoded as JPEG and cropped. Thresholds were chosen on the images of
`--part dev`; those of `--part claim` are others.

    python -m experiments.studies.near_duplicates                      # on 2 cores: some 5 minutes
    python -m experiments.studies.near_duplicates --scenes 50 --images 0

What tiny has drawn is kept in --work, and the same call goes on after an interruption.
"""

import argparse
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.stats import binomtest
from tqdm import tqdm

from attnlab import load_pipeline, seed
from attnlab.dataset.thumbnails import WITHIN, near_pairs, thumbnail
from attnlab.scenes import street
from attnlab.storage import replacing, write_text

__all__ = ["COPIES", "main", "measure_copies", "measure_others"]

_PROMPTS = (
    "a flooded street with water and a house",
    "a burning house with fire and smoke",
    "a tree on a road at night",
)
_PROMPTS += ("water and a car in winter", "a foggy road", "water and a house at dusk")
_FIRST = {"dev": 0, "claim": 100_000}  # seeds of images, and above street.HELD_OUT of scenes
_BITS = (2, 8)  # of 64: as Filters.duplicates has it, and the most that found no other image in part dev
_RESULTS = Path(__file__).parents[1] / "results" / "near_duplicates.json"


def _resized(image, scale):
    return image.resize([max(1, round(n * scale)) for n in image.size], Image.Resampling.BICUBIC)


def _encoded(image, quality):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def _cropped(image, share):
    cut = max(1, round(share * image.width))
    return image.crop((cut, cut, image.width - cut, image.height - cut))


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "flipped": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "turned by 90 degrees": lambda image: image.transpose(Image.Transpose.ROTATE_90),
    "half as large": lambda image: _resized(image, 0.5),
    "4 times as large, turned": lambda image: _resized(image, 4).transpose(Image.Transpose.ROTATE_270),
    "JPEG 75": lambda image: _encoded(image, 75),
    "JPEG 50": lambda image: _encoded(image, 50),
    "flipped, half as large, JPEG 75": lambda image: _encoded(_resized(image.transpose(0), 0.5), 75),
    "cropped by 1 of 64 a side": lambda image: _cropped(image, 1 / 64),
    "cropped by 2 of 64 a side": lambda image: _cropped(image, 2 / 64),
    "cropped by 3 of 64 a side": lambda image: _cropped(image, 3 / 64),
}
"""What is done to an image to make a copy."""


def measure_others(images: list[Image.Image]) -> dict:
    """Count images that pass for a copy of a different one, and such pairs: by thumbnails, and by difference hashes."""
    near = np.zeros((len(images), len(images)), bool)
    for pairs in near_pairs(np.stack([thumbnail(image) for image in images])):
        near[pairs.first, pairs.second] = True
    hashes = np.stack([_hash(image) for image in images])
    turned = np.stack([[_hash(one) for one in _turns(image)] for image in images])
    bits = np.stack([(hashes[:, None] ^ turned[None, :, k]).sum(-1) for k in range(8)]).min(0)
    found = {"thumbnails": _mistaken(near)}
    return found | {"hashes": {str(most): _mistaken(np.triu(bits <= most, 1)) for most in _BITS}}


def _mistaken(near):
    """Count the pairs, first before second, and of images the share that is in one: pairs depend on one another."""
    count = len(near)
    pairs = {"pairs": [int(near.sum()), count * (count - 1) // 2]}
    return pairs | {"images": _share(int((near | near.T).any(0).sum()), count)}


def measure_copies(images: list[Image.Image]) -> dict:
    """Count how many copies of each kind are found: by thumbnails, and by difference hashes."""
    first = np.stack([thumbnail(image) for image in images])
    turned, found = np.stack([[_hash(one) for one in _turns(image)] for image in images]), {}
    for name, copy in COPIES.items():
        copies = [copy(image) for image in images]
        near = near_pairs(first, np.stack([thumbnail(one) for one in copies]))
        own = sum(int((pairs.first == pairs.second).sum()) for pairs in near)
        bits = (np.stack([_hash(one) for one in copies])[:, None] ^ turned).sum(-1).min(1)
        hashes = {str(most): _share(int((bits <= most).sum()), len(images)) for most in _BITS}
        found[name] = {"thumbnails": _share(own, len(images)), "hashes": hashes}
    return found


def _hash(image):
    """Return the bits of `difference_hash`."""
    gray = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), int)
    return (gray[:, 1:] > gray[:, :-1]).ravel()


def _turns(image):
    flipped = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return [one.rotate(90 * k, expand=True) for one in (image, flipped) for k in range(4)]


def _share(found, count):
    """Return a count, its share and the share's exact 95% interval (Clopper and Pearson, Biometrika 1934)."""
    low, high = binomtest(found, count).proportion_ci() if count else (0.0, 1.0)
    return [found, count, round(found / max(count, 1), 6), round(low, 6), round(high, 6)]


def _drawn(count, part, work):
    """Draw images with tiny, as many of each prompt; batches that an earlier run drew are read."""
    images, pipe = [], None
    for number, prompt in enumerate(tqdm(_PROMPTS * bool(count), "drawing", unit="prompt")):
        path = Path(work, f"{part}-{number}-{count}.npy")
        if not path.exists():
            pipe = pipe or load_pipeline("tiny")
            pipe.set_progress_bar_config(disable=True)
            seeds = [seed(_FIRST[part] + 1000 * number + k) for k in range(count)]
            batches = [seeds[k : k + 10] for k in range(0, count, 10)]
            made = [pipe([prompt] * len(b), generator=b, num_inference_steps=10).images for b in batches]
            with replacing(path) as file:
                np.save(file, np.stack([np.asarray(image) for batch in made for image in batch]))
        images += [Image.fromarray(pixels) for pixels in np.load(path)]
    return images


def main(argv: list[str] | None = None) -> None:
    """Measure, print a table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--part", choices=_FIRST, default="claim", help="images to measure (claim)")
    parser.add_argument("--scenes", type=int, default=300, help="rendered scenes (300)")
    parser.add_argument("--images", type=int, default=50, help="images of tiny, of each of 6 prompts (50)")
    parser.add_argument("--work", type=Path, default=Path("runs/near_duplicates"), help="where drawn images are kept")
    parser.add_argument("--out", type=Path, default=_RESULTS, help="the file of results")
    args = parser.parse_args(argv)
    first = street.HELD_OUT + _FIRST[args.part]
    sets = {"rendered scenes": [Image.fromarray(street.render(first + k).image) for k in range(args.scenes)]}
    sets["images of tiny"] = _drawn(args.images, args.part, args.work)
    result = {"part": args.part, "within": WITHIN}
    for name, images in sets.items():
        if images:
            result[name] = {"different": measure_others(images), "copies": measure_copies(images)}
            print(f"{name}, n = {len(images)}: found, of, share, 95% interval")
            print("  different pairs:", result[name]["different"])
            for copy, row in result[name]["copies"].items():
                print(f"  {copy:32} thumbnails {row['thumbnails']}, hashes {row['hashes']}")
    write_text(args.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
