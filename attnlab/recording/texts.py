"""Text to embeddings, at any time, as the denoiser of a pipeline reads them."""

from collections.abc import Callable, Collection
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from ..pipelines import load_parts, load_pipeline
from .adapters.families import FAMILIES, denoiser_of, family_of
from .clip import TEXT_PARTS, ClipReader, Text
from .layers import exact
from .reading import PipelineReader
from .trace import Trace
from .words import Word

__all__ = ["TextEncoder", "start_of"]

_START = 8  # numbers of the start token's state by which files know a text encoder


def start_of(trace: Trace) -> list[float] | None:
    """Return the first numbers of the start token's state: the same in every text, and others for other weights.

    None for a denoiser whose texts begin with a word, as T5's do.
    """
    return None if trace.generation.denoiser in FAMILIES else _start(trace.text)


def _start(embedding):
    return embedding[0, :_START].tolist()


@lru_cache(maxsize=2)
def _clip_of(model: str) -> ClipReader:
    return ClipReader(load_parts(model, TEXT_PARTS))


@lru_cache(maxsize=1)
def _pipeline_of(model: str) -> DiffusionPipeline:
    return load_pipeline(model, device="cpu")


class TextEncoder:
    """The tokenizers and text encoders of a pipeline, and whatever else stands between a text and the denoiser.

    Made of a pipeline it refers to the pipeline's own modules: a LoRA or an embedding loaded later takes part from then
    on. Made of a model's name it loads what it needs, that alone, when it is first asked.
    """

    def __init__(
        self, load: Callable[[], ClipReader | PipelineReader], model: str | None = None, start: list | None = None
    ):
        self._load = load
        self.model = model  # its name, where that is known
        self.start = start  # what `start_of` has to be; None: anything

    def __deepcopy__(self, memo=None) -> "TextEncoder":
        return self  # its modules are the pipeline's

    __copy__ = __deepcopy__

    def __reduce__(self):
        """Pickle the model's name, as the file of a recording does."""
        if self.model is None:
            raise ValueError("a text encoder is pickled by its model's name, which is not known: set encoder.model")
        options = getattr(self.reader, "options", None)
        denoiser = None if options is None else family_of(denoiser_of(self.reader.pipe))[0]
        return TextEncoder.named, (self.model, self.start, denoiser, options)

    @cached_property
    def reader(self) -> ClipReader | PipelineReader:
        """What reads texts, in the way of its kind of model."""
        return self._load()

    @classmethod
    def of(cls, pipe) -> "TextEncoder | None":
        """Take a diffusers pipeline's own; None where it has no text encoder and reads embeddings alone."""
        name, denoiser = getattr(pipe, "name_or_path", None) or None, denoiser_of(pipe)
        parts = {part: module for part, module in pipe.components.items() if part.startswith("text_encoder")}
        if all(module is None for module in parts.values()):
            return None
        if denoiser is not None and family_of(denoiser)[1] is not None:
            return cls(lambda: PipelineReader(pipe), name)
        return cls(lambda: ClipReader({part: pipe.components.get(part) for part in TEXT_PARTS}), name)

    @classmethod
    def named(
        cls, model: str | Path, start: list | None = None, denoiser: str | None = None, options: dict | None = None
    ) -> "TextEncoder":
        """Name a model as `load_pipeline` takes it; nothing is loaded yet.

        With `start`, by `start_of`, texts are refused where the model was trained anew since. `denoiser` is its kind,
        Stable Diffusion's unless given; `options` are arguments with which its pipeline is to be called.
        """
        if denoiser in FAMILIES:
            return cls(lambda: PipelineReader(_pipeline_of(str(model)), options), str(model), start)
        return cls(lambda: _clip_of(str(model)), str(model), start)

    @classmethod
    def fitting(
        cls, encoder: "TextEncoder | None", models: Collection[str], path, start, denoiser=None, options=None
    ) -> "TextEncoder | None":
        """Choose the text encoder for a file made with some models: the given one, or the model's own from `start`.

        None where the model is not known; ValueError where the given one is of another model.
        """
        if encoder is None:
            return cls.named(*models, start, denoiser, options) if len(models) == 1 else None
        if encoder.model and set(models) - {encoder.model}:
            made = ", ".join(models)
            raise ValueError(
                f"{path} was recorded from {made}: {encoder.model}'s texts do not fit it. If both are one model "
                f"by two names, set encoder.model = {made!r}"
            )
        return encoder

    @property
    def tokenizer(self):
        """The first tokenizer, whose tokens words are told by."""
        return self.reader.tokenizer

    @property
    def window(self) -> int:
        """Largest number of tokens in a text, start and end included."""
        return self.reader.window

    @exact()
    def __call__(self, text: str) -> Text:
        """Encode a text; ValueError where it has no word or more tokens than the window holds, or another `start`."""
        found = self.reader.read(_checked(text))
        if self.start is not None and not _alike(_start(found.embedding), self.start):
            raise ValueError(
                f"{self.model} reads texts otherwise than when this was recorded: it was trained anew, or had a LoRA. "
                "Load the file with the text encoder of that time, load(path, TextEncoder.of(pipe)), or record again"
            )
        return found

    def embed(self, word: str) -> torch.Tensor:
        """Embed a word or phrase by itself, in [start, word, end, padding]: float32 (text width,).

        The mean over its tokens. Raises the errors of a text.
        """
        text = self(word)
        return text.embedding[[p for w in text.words for p in w.tokens]].float().mean(0)

    @exact()
    def words_of(self, text: str) -> list[Word]:
        """List the words of a text, also where it has no embedding of its own."""
        return self.reader.words_of(_checked(text))

    @exact()
    def lost(self, text: str) -> list[str]:
        """List the words of a text that would fall outside the window, in order."""
        return self.reader.lost(text)


def _checked(text) -> str:
    """Return a text; ValueError where it is none."""
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"text={text!r}: give at least one word")
    return text


def _alike(start, other) -> bool:
    """Whether two starts are of one text encoder, in whatever precision it computed."""
    first, second = torch.tensor(start), torch.tensor(other)
    return len(first) == len(second) and bool((first - second).norm() <= 0.05 * second.norm())
