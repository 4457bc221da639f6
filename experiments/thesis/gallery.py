"""A model's images of the thesis's classes, and what was recorded of each: made once, then kept in a folder.

    gallery = Gallery.load("tiny-plain", "runs/cache")
    cars = gallery.generated("car", range(50))      # images of "a car in an urban environment"
    scenes = gallery.rendered("car", 50)            # rendered scenes that show a car, looked at with the same prompt
    token = gallery.learn(cars[:2], "thesis")

A file's name says by a hash what it was made from: the model's weights, the call, the code, the libraries. What is in
the folder already is not made again, so a run that was cut off goes on. Queries are not kept: what needs them, softmax
maps of learned tokens, generates its images a second time.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path

import numpy as np
import torch
from diffusers import PNDMScheduler
from PIL import Image
from tqdm.auto import tqdm

import attnlab
from attnlab import storage
from attnlab.learning.fit import Whitening, fit_token
from attnlab.learning.optimize import PRESETS, OptimizerSettings, optimize_token
from attnlab.maps.linear import linear_daam
from attnlab.maps.softmax import daam, ovam
from attnlab.pipelines import Oracle, bundled, load_oracle, load_pipeline, seed
from attnlab.recording.existing import record_image
from attnlab.recording.recorder import record
from attnlab.recording.recording import Recording
from attnlab.recording.texts import TextEncoder
from attnlab.scenes import street
from attnlab.tokens import Token, TokenLibrary

from .examples import PROMPT, SHOWN, WORDS, Example, beside, main_object

STEPS = 30
THESIS = {"stabilityai/stable-diffusion-2-base": "d28fc8045793886e512c5389771d3b3d560f9575"}
"""The thesis's model, and its revision."""
SIDE = 64  # rendered scenes are chosen at this size, whatever the model's: in milliseconds each
AFTER = {"cli", "dataset", "joint", "plots", "widgets", "__init__.py", "__main__.py"}
"""What of attnlab only draws, asks, starts notebooks or makes data sets: a change there leaves everything valid."""
AT_ONCE = 10 * SIDE**2  # pixels of the images that are generated together


class Gallery:
    """A model's images of the classes, generated and rendered, and the tokens learned from them.

    Parameters
    ----------
    pipe : as for `record`
    folder : where everything is kept, in a folder of its own for each model, call and version of the code
    oracle : says what generated images show
    masks : folder with masks of generated images instead, white where the main object is: car_0000.png,
        traffic_light_0049.png, ...: class and seed. Images without one count as missing
    call : for the pipeline: num_inference_steps, guidance_scale, ...
    """

    def __init__(self, pipe, folder: str | Path, *, oracle: Oracle | None = None, masks: str | Path = "", **call):
        self.pipe, self.oracle, self.masks, self.call = pipe, oracle, Path(masks) if masks else None, call
        if self.masks and not self.masks.is_dir():
            raise FileNotFoundError(f"masks={str(masks)!r} is no folder; name one with car_0000.png, car_0001.png, ...")
        pipe.set_progress_bar_config(disable=True)
        self.encoder = TextEncoder.of(pipe)
        self.model = Path(getattr(pipe, "name_or_path", None) or "model").name
        made = {"weights": _weights(pipe.components), "code": _code(), "versions": storage.versions(), "call": call}
        made |= {"scheduler": dict(pipe.scheduler.config), "oracle": oracle and _weights({"oracle": oracle.model})}
        self.folder = Path(folder) / f"{self.model}-{_digest(made)}"
        self.batch = max(1, AT_ONCE // self.size**2)
        self._whitenings: dict[tuple[str, ...], Whitening] = {}

    @classmethod
    def load(cls, model: str, folder: str | Path, masks: str | Path = "", steps: int = STEPS) -> "Gallery":
        """Of a model by its name, with the thesis's settings: 30 steps, guidance 7.5 (bundled models: 4).

        The thesis's own model gets its revision and scheduler, a bundled one the oracle where no masks are given.
        """
        options = {"revision": THESIS[model]} if model in THESIS else {}
        pipe = load_pipeline(model, **options)
        if model in THESIS:
            pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config)
        small = model in bundled()
        oracle = load_oracle() if small and not masks else None
        guidance = 4.0 if small else 7.5
        return cls(pipe, folder, oracle=oracle, masks=masks, num_inference_steps=steps, guidance_scale=guidance)

    @property
    def size(self) -> int:
        """Side of its images, in pixels."""
        return self.pipe.unet.config.sample_size * self.pipe.vae_scale_factor

    def generated(self, name: str, seeds: Sequence[int]) -> list[Example]:
        """Images of "a ⟨class⟩ in an urban environment", one a seed, the same noise for every class.

        Those that do not show the class are there as well, see `Example.shown`.
        """
        missing = sorted({s // self.batch for s in seeds if not self._path("generated", name, s).exists()})
        for group in tqdm(missing, desc=f"{self.model}: {name}, generated", leave=False, disable=not missing):
            some = range(group * self.batch, (group + 1) * self.batch)  # the same batches whatever is asked for
            images, recording = self._generate(name, some)
            labels = [None] * len(some) if self.oracle is None else self.oracle.segment(images)
            for parts in zip(some, images, labels, recording, strict=True):
                self._write("generated", name, *parts)
        return [self._read("generated", name, s) for s in seeds]

    def rendered(self, name: str, count: int, first: int = street.HELD_OUT) -> list[Example]:
        """Rendered scenes that show the class, from seed `first` on, looked at with the same prompt."""
        numbers, number = [], first
        while len(numbers) < count:
            if _sizes(number)[name] >= SHOWN:
                numbers.append(number)
            number += 1
        missing = [n for n in numbers if not self._path("rendered", name, n).exists()]
        for n in tqdm(missing, desc=f"{self.model}: {name}, rendered", leave=False, disable=not missing):
            scene = street.render(n, self.size)
            image = Image.fromarray(scene.image)
            self._write("rendered", name, n, image, scene.labels, self._look(name, n, image))
        return [self._read("rendered", name, n) for n in numbers]

    def learn(
        self, examples: Sequence[Example], preset: str | OptimizerSettings, unlabeled: Sequence[Example] = ()
    ) -> Token:
        """A token of the examples' class, from its word: by a preset of `optimize_token`, or by "fit_token".

        `unlabeled`: images that say how features vary, for "fit_token".
        """
        name = examples[0].name
        settings = PRESETS.get(preset, preset) if isinstance(preset, str) else preset
        known = {"settings": settings if isinstance(settings, str) else asdict(settings)}
        known["lesson"] = [(e.id, _hash(e.truth)) for e in examples]
        known["unlabeled"] = [e.id for e in unlabeled] if settings == "fit_token" else []

        def make(path):
            masks, word = [e.truth for e in examples], WORDS[name]
            if settings == "fit_token":
                whitening = self._whitening(unlabeled) if unlabeled else None
                token = fit_token([e.linear for e in examples], masks, word, name=name, unlabeled=whitening)
            else:
                recorded = self.recordings(examples) if settings.softmax else [e.linear for e in examples]
                token = optimize_token(list(recorded), masks, word, settings, name=name)
                if (ran := len(token.metadata["losses"])) < settings.epochs:  # interrupted, it returns what it has
                    raise RuntimeError(f"the descent ended after {ran} of {settings.epochs} epochs: nothing is kept")
            TokenLibrary([token]).save(path)

        return TokenLibrary.load(self._kept("tokens", known, make))[name]

    def softmax(self, token: Token, examples: Sequence[Example]) -> np.ndarray:
        """Maps of a token beside the background it was learned with: float32 (example, row, column), shares."""
        known = {"token": [_hash(t.value.numpy()) for t in (token.background, token)], "of": [e.id for e in examples]}

        def make(path):
            maps = np.stack([ovam(one, token)[token] for one in self.recordings(examples)])
            storage.write(path, "Maps", {"maps": torch.from_numpy(maps)}, known)

        return storage.File(self._kept("softmax", known, make), "Maps").read("maps").numpy()

    def recordings(self, examples: Sequence[Example]) -> Iterator[Recording]:
        """The examples recorded once more, with all queries, a batch in memory at a time."""
        for i in range(0, len(examples), self.batch):
            some = examples[i : i + self.batch]
            if some[0].track == "generated":
                yield from self._generate(some[0].name, [e.number for e in some])[1]
            else:
                yield from (self._look(e.name, e.number, e.image) for e in some)

    def _generate(self, name, seeds):
        with record(self.pipe, dtype=torch.float16) as recording:
            images = self.pipe(
                [PROMPT.format(name)] * len(seeds), generator=[seed(s) for s in seeds], **self.call
            ).images
        return images, recording

    def _look(self, name, number, image):
        return record_image(self.pipe, image, PROMPT.format(name), dtype=torch.float16, generator=seed(number))

    def _path(self, track, name, number) -> Path:
        return self.folder / track / f"{name.replace(' ', '_')}_{number:04d}.safetensors"

    def _write(self, track, name, number, image, labels, recording):
        path, word = self._path(track, name, number), WORDS[name]
        layers = list(recording.trace.sizes)
        tensors = {"image": np.asarray(image), "maps": daam(recording).values}
        tensors["steps"] = np.stack([m[word] for m in daam(recording, per="step").values()])
        for i, layer in enumerate(layers):
            tensors[f"layer.{i}"] = np.stack([m[word] for m in daam(recording, layers=layer, per="step").values()])
        if labels is not None:
            tensors["labels"] = labels
        metadata = {"words": [[w.text, list(w.tokens)] for w in recording.words], "layers": layers}
        metadata["timesteps"] = recording.trace.timesteps
        path.parent.mkdir(parents=True, exist_ok=True)
        linear_daam(recording).save(beside(path))
        tensors = {key: torch.from_numpy(np.array(value)) for key, value in tensors.items()}
        storage.write(path, "Example", tensors, metadata)

    def _read(self, track, name, number) -> Example:
        path = self._path(track, name, number)
        file = storage.File(path, "Example")
        labels = file.read("labels").numpy() if "labels" in file.names else None
        truth = None if labels is None else main_object(labels == street.CLASSES.index(name))
        if track == "generated" and self.masks:
            labels, truth = None, self._mask(path.stem)
        return Example(name, track, number, truth, labels, path, self.encoder)

    def _mask(self, stem):
        path = self.masks / f"{stem}.png"
        if not path.exists():
            return None
        with Image.open(path) as mask:
            if mask.width != mask.height:
                raise ValueError(f"{path} is {mask.width} x {mask.height}: the images are {self.size} x {self.size}")
            return np.asarray(mask.convert("L").resize((self.size, self.size), Image.Resampling.NEAREST)) > 127

    def _kept(self, kind: str, known: dict, make: Callable[[Path], object]) -> Path:
        """The file made from what is `known`; made now if it is missing."""
        path = self.folder / kind / f"{_digest(known)}.safetensors"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            make(path)
        return path

    def _whitening(self, unlabeled):
        ids = tuple(e.id for e in unlabeled)
        if ids not in self._whitenings:
            self._whitenings[ids] = Whitening.of(e.linear for e in unlabeled)
        return self._whitenings[ids]


@cache
def _sizes(number: int) -> dict[str, float]:
    """Share of a rendered scene that the main object of each class covers."""
    scene = street.render(number, SIDE)
    return {name: float(main_object(scene.mask(name)).mean()) for name in WORDS}


def _hash(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def _digest(known: dict) -> str:
    return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _weights(parts: dict) -> str:
    """Of all weights of those parts that have some."""
    found = hashlib.sha256()
    for name, part in sorted(parts.items()):
        if isinstance(part, torch.nn.Module):
            for key, value in sorted(part.state_dict().items()):
                found.update(f"{name}.{key}".encode())
                found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def _code(package: Path = Path(attnlab.__file__).parent) -> str:
    """Hash the modules that what is kept depends on: attnlab's, in all folders, but those in `AFTER`; two of these."""
    found = hashlib.sha256()
    own = [Path(__file__), Path(__file__).with_name("examples.py")]
    for path in [*sorted(package.rglob("*.py")), *own]:
        if path in own or path.relative_to(package).parts[0] not in AFTER:
            found.update(path.read_bytes())
    return found.hexdigest()[:16]
