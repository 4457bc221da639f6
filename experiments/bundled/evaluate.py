"""Measure the bundled models, and write the results into their folders and cards.

Of a pipeline: how well its words' maps find their objects (`localize`), whether prompts steer it (`steer`), whether
things have the color and the number that was asked (`colors`, `counting`), how far its images are from rendered ones
(`likeness`), its autoencoder's PSNR, the time one image takes on the CPU. Of the reference segmenter: its IoU and its
recall of small objects, on scenes as rendered and as the autoencoder restores them. All on seeds that no model was
trained on.

    python -m experiments.bundled.evaluate tiny street-segmenter  # these only
    python -m experiments.bundled.evaluate --tables                # write the tables again from earlier measurements
"""

import argparse
import json
import logging
import time

import numpy as np
import torch
from tqdm import tqdm

from attnlab import load_pipeline, load_segmenter, seed
from attnlab.pipelines import BUNDLED
from attnlab.recording.checks import own_size
from attnlab.scenes import street

from . import cards, street_segmenter, vae
from .colors import color_rates
from .counting import number_rates
from .likeness import image_quality, noise_copies
from .localize import TUNING, localization
from .seen import restore_seen
from .steer import steering

__all__ = ["main"]

_log = logging.getLogger(__name__)
_NAMES = ("street-segmenter", *cards.PIPELINES)


def _measure_pipeline(name: str, scenes: int, images: int) -> dict:
    pipe, segmenter = load_pipeline(name, device="cpu"), load_segmenter("street", "cpu")
    pipe.set_progress_bar_config(disable=True)
    size = own_size(pipe)
    held_out = _rendered(street.HELD_OUT, size, 2 * scenes)
    tests = restore_seen(pipe.vae, segmenter, held_out)
    tuning = restore_seen(pipe.vae, segmenter, _rendered(TUNING, size, 2 * scenes))
    return {
        "maps": localization(pipe, scenes),
        "steering": steering(pipe, segmenter, images, scenes),
        "colors": color_rates(pipe, segmenter, tuning, tests, images),
        "numbers": number_rates(pipe, segmenter, tests, images),
        "quality": image_quality(pipe, segmenter, held_out[: 8 * images]),
        "copies": noise_copies(pipe),
        "PSNR": vae.psnr(pipe.vae, np.stack([s.image for s in held_out[:scenes]])),
        "seconds an image": _seconds(pipe),
        "cores": torch.get_num_threads(),
    }


def _measure_segmenter(name: str, scenes: int, images: int) -> dict:
    segmenter, autoencoder = load_segmenter("street", "cpu"), load_pipeline("tiny", device="cpu").vae
    held_out = _rendered(street.HELD_OUT, segmenter.model.config.sample_size, scenes)
    pictures, labels = np.stack([s.image for s in held_out]), np.stack([s.labels for s in held_out])
    sets = {"sharp": pictures, "restored": street_segmenter.restore(autoencoder, pictures)}
    return {kind: street_segmenter.measure_segmenter(segmenter, x, labels) for kind, x in sets.items()}


def _rendered(first, size, count):
    return [street.render(s, size) for s in range(first, first + count)]


def _seconds(pipe, repeats: int = 7) -> float:
    """Return the median time of one image of 20 steps with guidance."""
    times = []
    for k in tqdm(range(repeats), desc="timing", leave=False, delay=1):
        start = time.perf_counter()
        pipe("a house", num_inference_steps=20, guidance_scale=4.0, generator=seed(k))
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(_NAMES)}; default: all that are there")
    parser.add_argument("--scenes", type=int, default=500, help="held-out scenes")
    parser.add_argument("--images", type=int, default=50, help="images per class")
    parser.add_argument("--tables", action="store_true", help="measure nothing")
    given = parser.parse_args()
    if wrong := set(given.names) - set(_NAMES):
        parser.error(f"no model {', '.join(wrong)}; there are {', '.join(_NAMES)}")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    there = [name for name in _NAMES if (BUNDLED / name).exists()]
    for name in () if given.tables else given.names or there:
        measure = _measure_segmenter if name == "street-segmenter" else _measure_pipeline
        found = measure(name, given.scenes, given.images)
        (BUNDLED / name / "measured.json").write_text(json.dumps(found, indent=1) + "\n")
    found = {n: json.loads(p.read_text()) for n in _NAMES if (p := BUNDLED / n / "measured.json").exists()}
    for name in found:
        text = (cards.segmenter_tables if name == "street-segmenter" else cards.pipeline_tables)(name, found)
        cards.write_card(BUNDLED / name, text)
        _log.info("%s\n\n%s\n", name, text)


if __name__ == "__main__":
    main()
