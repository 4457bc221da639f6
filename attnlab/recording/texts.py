"""Text to embeddings, at any time, as the denoiser of a pipeline reads them."""

import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from diffusers.loaders import TextualInversionLoaderMixin

from ..pipelines import load_parts
from . import words
from .adapters.families import FAMILIES, denoiser_of, family_of
from .layers import exact

__all__ = ["Text", "TextEncoder", "start_of"]

_PARTS = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
_NAMED = 5  # words beyond the window that an error names
_START = 8  # numbers of the start token's state by which files know a text encoder


@dataclass(frozen=True)
class Text:
    """An encoded text, padded to the encoder's window."""

    text: str  # as it was given
    ids: list[int]  # of its tokens, start, end and padding included
    embedding: torch.Tensor  # (token, text width), as the denoiser reads it
    words: list[words.Word]  # each with its token positions
    ends: bool = True  # whether an end token stands behind the last word
    attention_mask: torch.Tensor | None = None  # bool (token,), which of them take part in a padded text

    @property
    def length(self) -> int:
        """Number of tokens up to the first end token, which is included."""
        return max(p for word in self.words for p in word.tokens) + 1 + self.ends


def start_of(embedding: torch.Tensor) -> list[float]:
    """Return the first numbers of the start token's state: the same in every text, and others for other weights."""
    return embedding[0, :_START].tolist()


@lru_cache(maxsize=2)
def _parts_of(model: str) -> dict[str, object]:
    return load_parts(model, _PARTS)


class TextEncoder:
    """The tokenizers and text encoders of a pipeline; two of them side by side in SDXL.

    Made of a pipeline it refers to the pipeline's own modules: a LoRA or an embedding loaded later takes part from then
    on. Made of a model's name it loads the modules, those alone, when it is first asked.
    """

    def __init__(self, load: Callable[[], dict[str, object]], model: str | None = None, start: list | None = None):
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
        return TextEncoder.named, (self.model, self.start)

    @cached_property
    def _parts(self):
        """Tokenizers, text encoders, and whether the last layer but one is read, as in SDXL."""
        parts = self._load()
        numbers = [n for n in ("", "_2") if parts.get(f"text_encoder{n}") is not None]
        found = ([parts[f"{kind}{n}"] for n in numbers] for kind in ("tokenizer", "text_encoder"))
        return *found, "_2" in numbers

    @classmethod
    def of(cls, pipe) -> "TextEncoder | None":
        """Take a diffusers pipeline's own; None where it has no text encoder and reads embeddings alone."""
        if (denoiser := denoiser_of(pipe)) is not None and family_of(denoiser)[1] is not None:
            from .reading import PipelineTexts  # here, as it is a text encoder itself

            return PipelineTexts(lambda: pipe, getattr(pipe, "name_or_path", None) or None)
        parts = {name: pipe.components.get(name) for name in _PARTS}
        if all(parts.get(name) is None for name in ("text_encoder", "text_encoder_2")):
            return None
        return cls(lambda: parts, getattr(pipe, "name_or_path", None) or None)

    @classmethod
    def named(cls, model: str | Path, start: list | None = None) -> "TextEncoder":
        """Name a model as `load_pipeline` takes it; nothing is loaded yet.

        With `start`, by `start_of`, texts are refused where the model was trained anew since.
        """
        return cls(lambda: _parts_of(str(model)), str(model), start)

    @classmethod
    def fitting(
        cls, encoder: "TextEncoder | None", models: Collection[str], path, start, denoiser: str | None = None
    ) -> "TextEncoder | None":
        """Choose the text encoder for a file made with some models: the given one, or the model's own from `start`.

        `denoiser` is the class of theirs. None where the model is not known; ValueError where the given one is of
        another model.
        """
        if encoder is None and len(models) == 1 and denoiser in FAMILIES:
            from .reading import PipelineTexts  # here, as it is a text encoder itself

            return PipelineTexts.named(*models, start)
        if encoder is None:
            return cls.named(*models, start) if len(models) == 1 else None
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
        return self._parts[0][0]

    @property
    def window(self) -> int:
        """Largest number of tokens in a text, start and end included."""
        return self.tokenizer.model_max_length

    @exact()
    def __call__(self, text: str) -> Text:
        """Encode a text; ValueError where it has no word or more tokens than the window holds, or another `start`."""
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"text={text!r}: give at least one word")
        tokenizers, encoders, penultimate = self._parts
        parts = [self._encode(*pair, text, penultimate) for pair in zip(tokenizers, encoders, strict=True)]
        ids = parts[0][0]
        found = words.split(self.tokenizer, ids)
        _check_vectors(self.tokenizer, found)
        if not found:
            raise ValueError(f"text={text!r}: the tokenizer finds no word in it")
        embedding = torch.cat([part for _, part in parts], -1)
        self.check_start(embedding)
        return Text(text, ids, embedding, found)

    def words_of(self, text: str) -> list[words.Word]:
        """List the words of a text with their token positions; errors are those of the text."""
        return self(text).words

    def note_call(self) -> None:
        """Note how the pipeline was called; Stable Diffusion's texts are read in one way."""

    def check_start(self, embedding: torch.Tensor) -> None:
        """Raise ValueError where a text's embedding (token, text width) does not begin with what `start` says."""
        if self.start is not None and not _alike(start_of(embedding), self.start):
            raise ValueError(
                f"{self.model} reads texts otherwise than when this was recorded: it was trained anew, or had a LoRA. "
                "Load the file with the text encoder of that time, load(path, TextEncoder.of(pipe)), or record again"
            )

    def embed(self, word: str) -> torch.Tensor:
        """Embed a word or phrase by itself, in [start, word, end, padding]: float32 (text width,).

        The mean over its tokens. Raises the errors of a text.
        """
        text = self(word)
        return text.embedding[[p for w in text.words for p in w.tokens]].float().mean(0)

    def lost(self, text: str) -> list[str]:
        """List the words of a text that would fall outside the window, in order."""
        return max((self._outside(one, _expanded(one, text)[1]) for one in self._parts[0]), key=len)

    def check_reading(self, ids: list[int], second: list[int] | None = None) -> None:
        """Warn where a model read less than a prompt, or another text beside it, by the token ids of its encoders.

        Less, where the window is full, so that more may have been cut off. Another text, where the second encoder had
        one of its own (`prompt_2`): its words stand at the same places, so that each map is of both.
        """
        found = words.split(self.tokenizer, ids)
        _check_vectors(self.tokenizer, found)
        if found and len(ids) == self.window and found[-1].tokens[-1] == self.window - 2:
            end = f"the prompt fills the model's window of {self.window} tokens: it was read up to {found[-1].text!r}"
            warnings.warn(f"{end}; any word behind that is lost, and has no map", stacklevel=2)
        other = found if second is None else words.split(self._parts[0][-1], second)
        if [word.text for word in other] != [word.text for word in found]:
            read = " ".join(word.text for word in other)
            warnings.warn(
                f"prompt_2 puts other words at the same places, {read!r}: the map of a word of the prompt is as much "
                "that of the tokens of prompt_2 there; leave prompt_2 out for maps of one text",
                stacklevel=2,
            )

    def _outside(self, tokenizer, ids):
        """Words of which a token is outside the window, whose last place the end token takes."""
        if len(ids) <= self.window:
            return []
        return [word.text for word in words.split(tokenizer, ids) if word.tokens[-1] >= self.window - 1]

    def _encode(self, tokenizer, encoder, text, penultimate):
        expanded, ids = _expanded(tokenizer, text)
        if lost := [repr(word) for word in self._outside(tokenizer, ids)]:
            named = lost if len(lost) <= _NAMED else [*lost[:_NAMED], f"{len(lost) - _NAMED} more words"]
            sizes = f"the text has {len(ids)} tokens, the window {self.window}"
            raise ValueError(f"{sizes}: {', '.join(named)} would fall outside")
        padded = tokenizer(expanded, padding="max_length", max_length=self.window, return_tensors="pt")
        if encoder.device.type != "meta":  # an offloaded encoder fetches its input itself
            padded = padded.to(encoder.device)
        masked = getattr(encoder.config, "use_attention_mask", False)
        output = encoder(
            padded.input_ids,
            attention_mask=padded.attention_mask if masked else None,
            output_hidden_states=penultimate,
        )
        embedding = output.hidden_states[-2] if penultimate else output[0]
        return padded.input_ids[0].tolist(), embedding[0].cpu()


def _alike(start, other) -> bool:
    """Whether two starts are of one text encoder, in whatever precision it computed."""
    first, second = torch.tensor(start), torch.tensor(other)
    return len(first) == len(second) and bool((first - second).norm() <= 0.05 * second.norm())


def _expanded(tokenizer, text):
    """Return a text with all vectors of its learned tokens, as a pipeline writes it, and its token ids."""
    expanded = TextualInversionLoaderMixin().maybe_convert_prompt(text, tokenizer)
    return expanded, tokenizer(expanded).input_ids


def _check_vectors(tokenizer, found):
    """Warn where a text has some vectors of a learned token only: diffusers adds those of names in small letters."""
    learned = tokenizer.get_added_vocab()
    for name in {word.text for word in found if f"{word.text}_{len(word.tokens)}" in learned} & set(learned):
        small = f"pipe.load_textual_inversion(..., token={name.lower()!r})"
        warnings.warn(f"the text has some of the vectors of {name!r} only: load it with {small}", stacklevel=3)
