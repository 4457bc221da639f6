"""Generate or render images of the thesis's classes, record them, and learn tokens from them; each result is kept.

    gallery = Gallery.load("tiny-plain", "runs/cache")
    cars = gallery.generated("car", range(50))      # images of "a car in an urban environment"
    scenes = gallery.rendered("car", 50)            # rendered scenes that show a car, recorded with the same prompt
    token = gallery.learn(cars[:2], "thesis")

Results are kept in a `Cache`, so an interrupted run continues. Queries are not kept: for softmax maps of learned
tokens, which need them, images are generated a second time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path

import numpy as np
import torch
from diffusers import PNDMScheduler
from PIL import Image
from tqdm import tqdm

from attnlab import storage
from attnlab.learning.fit import Whitening, fit_token
from attnlab.learning.optimize import PRESETS, OptimizerSettings, optimize_token
from attnlab.maps.softmax import ovam
from attnlab.pipelines import bundled, load_pipeline, seed
from attnlab.recording import Recording
from attnlab.recording.existing import record_image
from attnlab.recording.recorder import record
from attnlab.recording.texts import TextEncoder
from attnlab.scenes import street
from attnlab.segmentation import Segmenter, load_segmenter
from attnlab.tokens import Token, TokenLibrary

from .cache import Cache, hash_array, hash_weights
from .examples import MIN_OBJECT_AREA, PROMPT, PROMPT_WORDS, Example, main_object, read_labels, write_example

__all__ = ["Gallery"]

_STEPS = 30  # of a generation, as in the thesis
_THESIS_MODEL = {"stabilityai/stable-diffusion-2-base": "d28fc8045793886e512c5389771d3b3d560f9575"}
"""The thesis's model, and its revision."""
_RENDERED_SIDE = 64  # rendered scenes are chosen at this size, which takes milliseconds per scene
_BATCH_PIXELS = 10 * _RENDERED_SIDE**2  # of all images that are generated together


class Gallery:
    """A model's images of the classes, generated and rendered, and the tokens learned from them.

    Parameters
    ----------
    pipe : DiffusionPipeline
        As for `record`.
    folder : str or Path
        Where the folder of results is made.
    segmenter : Segmenter, optional
        Reference segmenter, whose labels are the truth of generated images.
    masks : str or Path
        Folder with masks of generated images instead, white where the main object is: car_0000.png,
        traffic_light_0049.png, ... (class and seed). Images without one count as missing.
    **call
        For the pipeline: num_inference_steps, guidance_scale, ...
    """

    def __init__(self, pipe, folder: str | Path, *, segmenter: Segmenter | None = None, masks: str | Path = "", **call):
        if not hasattr(pipe, "unet"):
            raise ValueError(f"{type(pipe).__name__} has no U-Net, which the thesis is about: tiny-plain or tiny do")
        self.pipe, self.segmenter, self.masks, self.call = pipe, segmenter, Path(masks) if masks else None, call
        if self.masks and not self.masks.is_dir():
            raise FileNotFoundError(f"masks={str(masks)!r} is no folder; name one with car_0000.png, car_0001.png, ...")
        pipe.set_progress_bar_config(disable=True)
        self.encoder = TextEncoder.of(pipe)
        self.bundled = getattr(pipe, "name_or_path", None) in bundled()  # and so trained on rendered scenes
        self.model = Path(getattr(pipe, "name_or_path", None) or "model").name
        made_from = {"weights": hash_weights(pipe.components), "scheduler": dict(pipe.scheduler.config), "call": call}
        made_from["segmenter"] = segmenter and hash_weights({"segmenter": segmenter.model})
        self.cache = Cache(folder, self.model, made_from)
        self.batch = max(1, _BATCH_PIXELS // self.size**2)
        self._whitenings: dict[tuple[str, ...], Whitening] = {}

    @classmethod
    def load(cls, model: str, folder: str | Path, masks: str | Path = "", steps: int = _STEPS) -> "Gallery":
        """Make the gallery of a model by its name, with the thesis's settings: 30 steps, guidance 7.5 (bundled: 4).

        The thesis's own model gets its revision and scheduler; a bundled one without masks the reference segmenter.
        """
        options = {"revision": _THESIS_MODEL[model]} if model in _THESIS_MODEL else {}
        pipe = load_pipeline(model, **options)
        if model in _THESIS_MODEL:
            pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config)
        small = model in bundled()
        segmenter = load_segmenter() if small and not masks else None
        guidance = 4.0 if small else 7.5
        return cls(pipe, folder, segmenter=segmenter, masks=masks, num_inference_steps=steps, guidance_scale=guidance)

    @property
    def size(self) -> int:
        """Side of its images, in pixels."""
        return self.pipe.unet.config.sample_size * self.pipe.vae_scale_factor

    def generated(self, name: str, seeds: Sequence[int]) -> list[Example]:
        """Generate images of "a ⟨class⟩ in an urban environment", one per seed, with the same noise for every class.

        Images that do not show the class are among them, see `Example.shown`.
        """
        missing = sorted({s // self.batch for s in seeds if not self.cache.example("generated", name, s).exists()})
        for group in tqdm(missing, desc=f"{self.model}: {name}, generated", leave=False, delay=1, disable=not missing):
            some = range(
                group * self.batch, (group + 1) * self.batch
            )  # whatever is asked for: bits depend on the batch
            images, recording = self._generate(name, some)
            labels = [None] * len(some) if self.segmenter is None else self.segmenter.segment(images)
            for number, *parts in zip(some, images, labels, recording, strict=True):
                write_example(self.cache.example("generated", name, number), name, *parts)
        return [self._read("generated", name, s) for s in seeds]

    def rendered(self, name: str, count: int, first: int = street.HELD_OUT) -> list[Example]:
        """Render scenes that show the class, from seed `first` on, and record them with the same prompt."""
        numbers, number = [], first
        while len(numbers) < count:
            if _object_areas(number)[name] >= MIN_OBJECT_AREA:
                numbers.append(number)
            number += 1
        missing = [n for n in numbers if not self.cache.example("rendered", name, n).exists()]
        for n in tqdm(missing, desc=f"{self.model}: {name}, rendered", leave=False, delay=1, disable=not missing):
            scene = street.render(n, self.size)
            image = Image.fromarray(scene.image)
            recording = self._record_existing(name, n, image)
            write_example(self.cache.example("rendered", name, n), name, image, scene.labels, recording)
        return [self._read("rendered", name, n) for n in numbers]

    def learn(
        self, examples: Sequence[Example], preset: str | OptimizerSettings, unlabeled: Sequence[Example] = ()
    ) -> Token:
        """Learn a token of the examples' class, from its word: by a preset of `optimize_token`, or by "fit_token".

        `unlabeled`: images without masks, for the whitening of "fit_token".
        """
        name = examples[0].name
        settings = PRESETS.get(preset, preset) if isinstance(preset, str) else preset
        made_from = {"settings": settings if isinstance(settings, str) else asdict(settings)}
        made_from["train"] = [(e.id, hash_array(e.truth)) for e in examples]
        made_from["unlabeled"] = [e.id for e in unlabeled] if settings == "fit_token" else []

        def make(path):
            masks, word = [e.truth for e in examples], PROMPT_WORDS[name]
            if settings == "fit_token":
                whitening = self._whitening(unlabeled) if unlabeled else None
                token = fit_token([e.linear for e in examples], masks, word, name=name, unlabeled=whitening)
            else:
                recorded = self.recordings(examples) if settings.softmax else [e.linear for e in examples]
                token = optimize_token(list(recorded), masks, word, settings, name=name)
                if (ran := len(token.metadata["losses"])) < settings.epochs:  # interrupted, it returns what it has
                    raise RuntimeError(f"optimization ended after {ran} of {settings.epochs} epochs: nothing is kept")
            TokenLibrary([token]).save(path)

        return TokenLibrary.load(self.cache.kept("tokens", made_from, make))[name]

    def softmax(self, token: Token, examples: Sequence[Example]) -> np.ndarray:
        """Return attention probabilities of a token next to its background: float32 (example, row, column)."""
        made_from = {"token": [hash_array(t.value.numpy()) for t in (token.background, token)]}
        made_from["of"] = [e.id for e in examples]

        def make(path):
            maps = np.stack([ovam(one, token)[token] for one in self.recordings(examples)])
            storage.write(path, "Maps", {"maps": torch.from_numpy(maps)}, made_from)

        return storage.File(self.cache.kept("softmax", made_from, make), "Maps").read("maps").numpy()

    def recordings(self, examples: Sequence[Example]) -> Iterator[Recording]:
        """Record the examples once more, with all queries; only one batch is in memory at a time."""
        for i in range(0, len(examples), self.batch):
            some = examples[i : i + self.batch]
            if some[0].track == "generated":
                yield from self._generate(some[0].name, [e.number for e in some])[1]
            else:
                yield from (self._record_existing(e.name, e.number, e.image) for e in some)

    def _generate(self, name, seeds):
        with record(self.pipe, dtype=torch.float16) as recording:
            prompts = [PROMPT.format(name)] * len(seeds)
            images = self.pipe(prompts, generator=[seed(s) for s in seeds], **self.call).images
        return images, recording

    def _record_existing(self, name, number, image):
        return record_image(self.pipe, image, PROMPT.format(name), dtype=torch.float16, generator=seed(number))

    def _read(self, track, name, number) -> Example:
        path = self.cache.example(track, name, number)
        labels = read_labels(path)
        truth = None if labels is None else main_object(labels == street.CLASSES.index(name))
        if track == "generated" and self.masks:
            labels, truth = None, self._mask(path.stem)
        return Example(name, track, number, truth, labels, path, self.encoder)

    def _mask(self, stem):
        path = self.masks / f"{stem}.png"
        if not path.exists():
            return None
        mask = Image.fromarray(storage.read_rgb(path)).convert("L")
        if mask.width != mask.height:
            raise ValueError(f"{path} is {mask.width} x {mask.height}: the images are {self.size} x {self.size}")
        if 1 < (highest := mask.getextrema()[1]) < 128:
            raise ValueError(f"{path} goes up to {highest}: a mask is black and white, or 0 and 1")
        return np.asarray(mask.resize((self.size, self.size), Image.Resampling.NEAREST)) > (127 if highest > 1 else 0)

    def _whitening(self, unlabeled):
        ids = tuple(e.id for e in unlabeled)
        if ids not in self._whitenings:
            self._whitenings[ids] = Whitening.of(e.linear for e in unlabeled)
        return self._whitenings[ids]


@cache
def _object_areas(number: int) -> dict[str, float]:
    """Return the fraction of a rendered scene that the main object of each class covers."""
    scene = street.render(number, _RENDERED_SIDE)
    return {name: float(main_object(scene.mask(name)).mean()) for name in PROMPT_WORDS}
