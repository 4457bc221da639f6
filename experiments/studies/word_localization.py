"""Study what makes words localize: captions, context in the text, padding; by the diffusion loss alone, no masks.

Each variant trains a text encoder and a denoiser from nothing, on the same rendered scenes. Its words' maps are
measured as diffusers calls a model, with padding visible, on scenes that no other study uses.

    python -m experiments.studies.word_localization                    # on 2 cores: some 15 minutes per run
    python -m experiments.studies.word_localization --variants dense-0-hidden --seeds 1 --steps 500
    python -m experiments.studies.word_localization --device cuda --workers 3 --together 8 --minutes 7

The same call goes on after an interruption. Runs that --minutes ended are measured where they stand.
"""

import argparse
import json
import logging
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import chain
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from transformers import CLIPTokenizer

from attnlab import load_segmenter, seed, training
from attnlab.maps.heatmaps import resize
from attnlab.pipelines import BUNDLED, best_device
from attnlab.scenes import street
from attnlab.segmentation import Segmenter
from attnlab.storage import File, claim_folder, write, write_text

from ..bundled.colors import color_rates
from ..bundled.denoiser_training import Examples, tokenize, train_together
from ..bundled.likeness import image_quality
from ..bundled.localize import TIMESTEPS, WordCase, summarize_cases
from ..bundled.seen import Seen, restore_seen
from ..bundled.steer import prompt_of, shown_classes, shown_when_asked
from ..bundled.text_encoder import train_tokenizer
from ..bundled.text_to_image import TextToLatent, attention_scores, new_scheduler
from ..bundled.vae import encode_images
from .word_training import VARIANTS, Variant, start_training

__all__ = ["FIRST_MEASURED_SEED", "FIRST_THRESHOLD_SEED", "WordLocalizationStudy", "main", "measure", "variants_table"]
__all__ += ["token_maps"]

FIRST_THRESHOLD_SEED = street.HELD_OUT + 700_000  # of the scenes on which thresholds are chosen
FIRST_MEASURED_SEED = street.HELD_OUT + 750_000
_SIDE = 64  # of scenes, in pixels
_BATCH = 150  # scenes or images that are measured at once
_RESULTS = Path(__file__).parents[1] / "results" / "word_localization.json"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WordLocalizationStudy:
    """How much is trained and measured, where, and on which device."""

    work: Path  # scenes, checkpoints, results
    device: torch.device
    steps: int = 2000
    batch: int = 32
    scenes: int = 12_000
    tuning: int = 150  # scenes on which thresholds are chosen
    tests: int = 300  # scenes that are measured
    images: int = 20  # of each class and color; 0: none are drawn
    known: int = 600  # scenes that tell colors

    def claim(self) -> None:
        """Make the folder this study's; ValueError if it holds one with other settings."""
        claim_folder(self.work, {k: v for k, v in asdict(self).items() if k not in ("work", "device")})

    def captioned(self, first: int, count: int, pool: ProcessPoolExecutor | None = None) -> dict:
        """Render scenes once, encode them and caption them both ways; or read what an earlier run left.

        Returns {"latents": (scene, channel, row, column), "labels": (scene, row, column), "sparse", "dense": [(caption,
        its words), ...]}.
        """
        path, render = self.work / f"scenes-{first}-{count}.safetensors", partial(street.render_both, size=_SIDE)
        return self._captioned(path, range(first, first + count), render, ("sparse", "dense"), pool)

    def near(self, pool: ProcessPoolExecutor | None = None) -> dict:
        """Render near views of a third of the training scenes, as `captioned`, with dense captions alone."""
        count = self.scenes // 3
        return self._captioned(self.work / f"near-0-{count}.safetensors", range(count), _near_view, ("dense",), pool)

    def _captioned(self, path, seeds, render, kinds, pool):
        if not path.exists():
            pairs = list(pool.map(render, seeds, chunksize=50) if pool else map(render, seeds))
            images, labels = (np.stack([getattr(pair[0], name) for pair in pairs]) for name in ("image", "labels"))
            vae = self.autoencoder()
            made = {"latents": encode_images(vae, images) * vae.config.scaling_factor, "labels": torch.tensor(labels)}
            captions = {
                kind: [(scene.caption, scene.words) for scene in scenes]
                for kind, scenes in zip(kinds, zip(*pairs, strict=True), strict=True)
            }
            write(path, "Scenes", made, captions)
        file = File(path, "Scenes")
        return {"latents": file.read("latents"), "labels": file.read("labels"), **file.metadata}

    def seen(self, first: int, count: int) -> Seen:
        """Restore scenes and let the reference segmenter see them, once; or read what an earlier run left."""
        path = self.work / f"seen-{first}-{count}.safetensors"
        if not path.exists():
            scenes = (street.render(s, size=_SIDE) for s in range(first, first + count))
            captions, *arrays = restore_seen(self.autoencoder(), self.segmenter(), scenes)
            tensors = {name: torch.from_numpy(x) for name, x in zip(("images", "labels"), arrays, strict=True)}
            write(path, "Seen", tensors, {"captions": captions})
        file = File(path, "Seen")
        return Seen(file.metadata["captions"], *(file.read(name).numpy() for name in ("images", "labels")))

    def segmenter(self) -> Segmenter:
        """Return the reference segmenter."""
        return load_segmenter("street", self.device)

    def autoencoder(self) -> AutoencoderKL:
        """Return the autoencoder of the bundled models."""
        return AutoencoderKL.from_pretrained(BUNDLED / "tiny-plain" / "vae", dtype=torch.float32).to(self.device)

    def tokenizer(self, variant: Variant) -> CLIPTokenizer:
        """Return the tokenizer, which all variants share, with a variant's window."""
        folder = self.work / "tokenizer"
        if not (folder / "merges.txt").exists():
            scenes = self.captioned(0, self.scenes)
            train_tokenizer([caption for caption, _ in scenes["sparse"] + scenes["dense"]], folder)
        return CLIPTokenizer.from_pretrained(folder, model_max_length=variant.window)

    def file(self, variant: Variant, number: int) -> Path:
        """Return the file of the results of a variant with a seed."""
        return self.work / f"{variant.name}-{number}.json"

    def run(self, jobs: Sequence[tuple[Variant, int]], workers=1, together=1, deadline=float("inf")) -> None:
        """Train and measure variants with seeds; `results` reads what is known of them.

        Each of `workers` processes trains `together` of them side by side. All are to be measured at `deadline`, in
        seconds as `time.time` counts.
        """
        with ProcessPoolExecutor() as pool:  # its processes start before a GPU is used
            for first, count in ((0, self.scenes), *self.ranges):
                self.captioned(first, count, pool)
            if any(variant.near for variant, _ in jobs):
                self.near(pool)
        self.tokenizer(jobs[0][0])
        missing = [job for job in jobs if not any(found["steps"] == self.steps for found in self.results([job]))]
        groups = [missing[i : i + together] for i in range(0, len(missing), together)]
        with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
            for done in [pool.submit(self.train_group, group, deadline) for group in groups]:
                done.result()

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """First seed and number of the scenes for thresholds, and of those that are measured."""
        return (FIRST_THRESHOLD_SEED, self.tuning), (FIRST_MEASURED_SEED, self.tests)

    def results(self, jobs: Sequence[tuple[Variant, int]]) -> list[dict]:
        """Read the results of those jobs that have some."""
        return [json.loads(self.file(*job).read_text()) for job in jobs if self.file(*job).exists()]

    def train_group(self, jobs: Sequence[tuple[Variant, int]], deadline=float("inf"), interval=120.0) -> None:
        """Train some jobs, a step of each in turn, and measure them; write checkpoints every `interval` seconds."""
        if deadline - time.time() < 20:
            return
        examples = cache(self._examples)  # read once for all runs that learn from the same
        runs, on_gpu = [self._start(examples, *job) for job in jobs], self.device.type == "cuda"
        if deadline < float("inf"):  # a measurement of each is to be done by then, so one is timed
            for _ in range(1 + on_gpu):  # the first one on a GPU takes longer
                start = time.time()
                measure(self, runs[0].average, jobs[0][0])
            deadline -= 10 + 1.2 * len(runs) * (time.time() - start)
        train_together(runs, deadline, interval)
        for variant, run in ((variant, run) for (variant, _), run in zip(jobs, runs, strict=True) if run.done):
            start = time.time()
            result = {"variant": variant.name, "seed": run.schedule.seed, "steps": run.done, "of": self.steps}
            result |= measure(self, run.average, variant) | {"trained side by side": len(runs)}
            result["device"] = torch.cuda.get_device_name() if on_gpu else "CPU"
            result["seconds"] = {"training": run.seconds, "measurement": time.time() - start}
            write_text(self.file(variant, run.schedule.seed), json.dumps(result, indent=1) + "\n")
            if run.done == self.steps:
                run.path.unlink()

    def _examples(self, kind, near, keywords, window):
        parts = [self.captioned(0, self.scenes), *([self.near()] if near else ())]
        captions = list(chain(*(part[kind] for part in parts)))
        tokenizer = self.tokenizer(Variant(kind, 0, "visible", window=window))
        latents = torch.cat([part["latents"] for part in parts])
        return Examples.of(latents, captions, tokenizer, keywords=keywords).to(self.device)

    def _start(self, examples, variant, number):
        schedule, path = training.Schedule(self.steps, lr=1e-3, ema=0.997, seed=number), self.file(variant, number)
        learned = examples(variant.captions, variant.near, bool(variant.keywords), variant.window)
        given = learned, self.tokenizer(variant), path.with_suffix(".checkpoint")
        return start_training(variant, schedule, *given, self.device, self.batch)


def _near_view(number):
    return (street.render(number, _SIDE, near=True),)


@torch.no_grad()
def token_maps(model: TextToLatent, latents, ids, generator) -> tuple[torch.Tensor, float]:
    """Return the DAAM map (scene, token, row, column) of every token of noised scenes, and the mean loss.

    As `daam` gives it for `record_image`, many scenes at once; no token is masked.
    """
    scheduler, device, layers, losses = new_scheduler(), model.unet.device, defaultdict(float), []
    noise = torch.randn(len(latents), len(TIMESTEPS), *latents.shape[1:], generator=generator).to(device)
    latents, ids = latents.to(device), ids.to(device)
    for k, timestep in enumerate(sorted(TIMESTEPS, reverse=True)):
        timestep = torch.full((len(latents),), timestep, device=device)
        with attention_scores(model.unet) as scores:
            predicted = model(scheduler.add_noise(latents, noise[:, k], timestep), timestep, ids, None)
        losses.append(F.mse_loss(predicted, scheduler.get_velocity(latents, noise[:, k], timestep)))
        for name, score in scores.items():
            layers[name] += score.softmax(-1).mT.flatten(0, 1) / len(TIMESTEPS)  # (scene x head, token, pixel)
    maps = 0
    for probabilities in layers.values():
        size = (round(probabilities.shape[-1] ** 0.5),) * 2  # of square latents
        resized = resize(probabilities.unflatten(-1, size), latents.shape[-2:], "bicubic")
        maps = maps + resized.unflatten(0, (len(latents), -1)).mean(1) / len(layers)
    return maps.cpu(), float(torch.stack(losses).mean())


def _cases(model, tokenizer, scenes, kind):
    """Return a case for each class that a caption names, of the mean map of its words; and the mean loss."""
    captions, words = zip(*scenes[kind], strict=True)
    tokens = tokenize(tokenizer, list(captions), return_offsets_mapping=True)
    generator, cases, losses = seed(0), [], []
    for some in torch.arange(len(captions)).split(_BATCH):
        maps, loss = token_maps(model, scenes["latents"][some], tokens.input_ids[some], generator)
        losses += [loss] * len(some)
        for i, values in zip(some.tolist(), maps, strict=True):
            positions, labels = defaultdict(list), scenes["labels"][i].numpy()
            for p, (a, b) in enumerate(tokens.offset_mapping[i].tolist()):
                if name := words[i].get(captions[i][a:b]):
                    positions[name].append(p)
            small = {name: values[p].mean(0)[None, None] for name, p in positions.items()}
            heats = {name: resize(heat, labels.shape, "bicubic")[0, 0].numpy() for name, heat in small.items()}
            for name, heat in heats.items():
                others = [other for other in heats if other != name]
                other = heats[others[i % len(others)]] if others else None
                cases.append(WordCase(i, name, heat, labels == street.CLASSES.index(name), other))
    return cases, float(np.mean(losses))


def measure(study: WordLocalizationStudy, model: TextToLatent, variant: Variant) -> dict:
    """Measure the maps of words of both kinds of captions, the loss at the maps' timesteps, and what prompts do."""
    tokenizer, scenes = study.tokenizer(variant), [study.captioned(*one) for one in study.ranges]
    maps, losses = {}, {}
    for kind in ("sparse", "dense"):
        (tuning, _), (tests, losses[kind]) = (_cases(model, tokenizer, some, kind) for some in scenes)
        maps[kind] = summarize_cases(tuning, tests)
    found = {"maps": maps, "loss": losses}
    return found | _prompting(study, _pipeline(study, model, tokenizer)) if study.images else found


def _pipeline(study, model, tokenizer):
    from diffusers import StableDiffusionPipeline  # only here: its import warns of torchvision, which is not wanted

    none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    parts = (study.autoencoder(), model.text_encoder, tokenizer, model.unet, new_scheduler())
    pipe = StableDiffusionPipeline(*parts, **none)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _prompting(study, pipe):
    """Measure steering, colors of one thing and of two in a prompt, and the distance to rendered scenes."""
    segmenter, (tuning, tests), count = study.segmenter(), study.ranges, study.known
    read = color_rates(pipe, segmenter, *(study.seen(first, count) for first, _ in (tuning, tests)), study.images)
    means = {kind: float(np.mean([row["rate"] for row in read[kind].values()])) for kind in ("one", "two")}
    scenes = [street.render(s, size=_SIDE) for s in range(tests[0], tests[0] + 8 * study.images)]
    distances = image_quality(pipe, segmenter, scenes)
    return {"steering": _steering(study, pipe, segmenter), "colors": means | {"rows": read}, "distance": distances}


def _steering(study, pipe, segmenter):
    """Return how often images show the class they were asked for, and mean and least of all classes but thin ones."""
    images, generator = [], seed(0)
    prompts = np.repeat([prompt_of(name) for name in street.CLASSES], study.images)
    for some in np.array_split(prompts, -(-len(prompts) // _BATCH)):
        images += pipe(some.tolist(), num_inference_steps=20, guidance_scale=4.0, generator=generator).images
    shown = shown_classes(segmenter.segment(images), len(street.CLASSES))
    shown = shown.reshape(len(street.CLASSES), -1, len(street.CLASSES)).mean(1)  # (class that is asked for, class)
    asked, unasked = shown.diagonal(), (shown.sum(0) - shown.diagonal()) / (len(shown) - 1)
    rows = {name: {"asked": a, "unasked": b} for name, a, b in zip(street.CLASSES, asked, unasked, strict=True)}
    mean, least = shown_when_asked(rows, thin=False)
    return {"images a class": study.images, "mean": mean, "least": least, "classes": rows}


def variants_table(runs: Sequence[dict]) -> list[str]:
    """Tabulate results by variant, mean ± standard deviation over seeds: of its own captions, and of sparse ones."""
    head = (
        "variant seeds steps IoU pointing class_IoU sparse:_IoU pointing loss steering least colors two_colors distance"
    )
    rows = [head.replace(" ", " | ").replace("_", " ")]
    for name in dict.fromkeys(run["variant"] for run in runs):
        some, kind = [run for run in runs if run["variant"] == name], VARIANTS[name].captions
        own, sparse = ([run["maps"][one] for run in some] for one in (kind, "sparse"))
        by_class = [np.mean([row["iou"] for row in one["classes"].values()]) for one in own]
        values = [[one[what] for one in own] for what in ("word iou", "word pointing")] + [by_class]
        values += [[one[what] for one in sparse] for what in ("word iou", "word pointing")]
        values += [[run["loss"][kind] for run in some]]
        for part, whats in {"steering": ("mean", "least"), "colors": ("one", "two"), "distance": ("drawn",)}.items():
            values += [[run[part][what] for run in some if part in run] for what in whats]
        steps = " ".join(map(str, sorted({run["steps"] for run in some})))
        rows.append(" | ".join([name, str(len(some)), steps, *map(_mean, values)]))
    return rows


def _mean(values):
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}" if values else ""


def main(arguments: Sequence[str] | None = None) -> None:
    start, default = time.time(), WordLocalizationStudy(Path("runs/word_localization"), best_device())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3)
    sizes = {"steps": "of each training", "batch": "scenes per step", "scenes": "that are trained on"}
    sizes |= {"tuning": "scenes for thresholds", "tests": "scenes that are measured"}
    sizes |= {"images": "drawn, per class and color", "known": "scenes that tell colors"}
    for name, what in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=getattr(default, name), help=what)
    parser.add_argument("--device", default=default.device, help="cpu or cuda")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread")
    parser.add_argument("--together", type=int, default=1, help="runs that a process trains side by side; for GPUs")
    parser.add_argument("--minutes", type=float, help="end after so many, measurements included")
    parser.add_argument("--work", type=Path, default=default.work, help="folder of scenes, checkpoints and results")
    parser.add_argument("--out", type=Path, default=_RESULTS, help="file of all results")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "32"}  # of processes; queues of a GPU
    study = WordLocalizationStudy(given.work, torch.device(given.device), **{n: getattr(given, n) for n in sizes})
    jobs = [(VARIANTS[name], number) for number in range(given.seeds) for name in given.variants]
    deadline = start + 60 * given.minutes if given.minutes else float("inf")
    study.claim()
    try:
        study.run(jobs, given.workers, given.together, deadline)
    finally:  # the others where one failed, too
        settings = {name: getattr(given, name) for name in sizes} | {"first seeds and numbers of scenes": study.ranges}
        found = {"study": settings, "variants": {name: asdict(VARIANTS[name]) for name in given.variants}}
        found["runs"] = study.results(jobs)
        given.out.write_text(json.dumps(found, indent=1) + "\n")
        for row in variants_table(found["runs"]):
            _log.info(row)


if __name__ == "__main__":
    main()
