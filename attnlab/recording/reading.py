"""Texts as any other denoiser reads them: its pipeline is called with a text, and stopped where the denoiser begins."""

import copy
import inspect

from ..pipelines import seed
from .adapters import DenoiserCall, TransformerAdapter
from .adapters.base import arguments_of
from .adapters.families import denoiser_of, family_of
from .clip import Text
from .encoded import EncodedTexts
from .frames import given
from .pieces import CUT, words_in
from .words import Word

__all__ = ["PipelineReader"]

_GUIDANCE = ("guidance_scale", "true_cfg_scale")  # arguments of pipelines; 0 asks for the prompt alone
_SIZES = ("height", "width", "use_resolution_binning")  # without which a pipeline may refuse its call


class PipelineReader:
    """The texts of a pipeline: any template around them, and any number of text encoders, take part."""

    def __init__(self, pipe, options: dict | None = None):
        self.pipe = pipe
        self.options = options or {}  # arguments with which it is called, of those that matter
        self.joint = _adapter(pipe).joint

    @property
    def tokenizer(self):
        """The first text encoder's tokenizer."""
        return EncodedTexts(self.pipe).tokenizers[0]

    @property
    def window(self) -> int:
        """Largest number of tokens in a text."""
        return self.tokenizer.model_max_length

    def note_call(self) -> dict:
        """Note how the pipeline was called, for a hook of its denoiser to ask: other texts are read in the same way."""
        found = {name: given(self.pipe, name) for name in (*_reading(self.pipe), *_SIZES)}
        self.options = {name: _as_json(value) for name, value in found.items() if _is_plain(value)}
        return self.options

    def read(self, text: str) -> Text:
        """Encode a text; ValueError where it has no word, or has no maps of its own beside a recorded image."""
        if self.joint:
            name = type(self.pipe).__name__
            raise ValueError(
                f"image and text attend to one another in {name}, so a text has nothing of its own without an image; "
                f"the model reads it beside one by record_again(pipe, recording, texts={text!r})"
            )
        call, row, found, ends, _ = self._read(text)
        self._check_whole(text, found)
        mask = None if call.attention_mask is None else call.attention_mask[row].bool().cpu()
        return Text(text, [], call.text[row].cpu(), found, ends, mask)

    def words_of(self, text: str) -> list[Word]:
        """List the words of a text; positions are those of its characters, as tokens are known of a call alone."""
        return words_in(text)

    def lost(self, text: str) -> list[str]:
        """List the words of a text of which all, or the end, would fall outside the window, in order."""
        return _lost(self.words_of(text), self._read(text)[2])

    def _check_whole(self, text, found) -> None:
        """Raise ValueError where not all of a text's words were read, each to its end."""
        if lost := _lost(self.words_of(text), found):
            raise ValueError(f"the model reads no word from {lost[0]!r} on: {len(lost)} of this text are lost")

    def beside(self, text: str) -> tuple[dict, int, Text]:
        """Read a text that is to be beside an image: the denoiser's arguments, the text's row among them, and it."""
        call, row, found, ends, given = self._read(text)
        self._check_whole(text, found)
        return given, row, Text(text, [], call.text[row].cpu(), found, ends)

    def _read(self, text) -> tuple[DenoiserCall, int, list[Word], bool, dict]:
        """Return a call of the denoiser that reads a text, its row, its words, whether an end token follows, and how.

        The last is what the denoiser is called with.

        The call is that of a copy of the pipeline with the same modules, which may be drawing an image meanwhile.
        """
        pipe, denoiser = copy.copy(self.pipe), denoiser_of(self.pipe)
        pipe.set_progress_bar_config(disable=True)
        vars(pipe)["scheduler"] = copy.deepcopy(pipe.scheduler)
        # the copy of a module is not compiled, so that it hears what comes
        vars(pipe).update({name: copy.copy(module) for name, module in vars(pipe).items() if module is denoiser})
        adapter, options = _adapter(pipe), _plain(pipe) | self.options
        handles = adapter.texts.listen()
        try:
            called = arguments_of(adapter.module, lambda: pipe(prompt=text, generator=seed(0), **options))
        except (TypeError, ValueError, AttributeError) as error:
            if "image" not in inspect.signature(pipe.__call__).parameters:
                raise
            raise ValueError(f"{type(pipe).__name__} reads no text without an image: {error}") from error
        finally:
            for handle in handles:
                handle.remove()
        call = adapter.read(*called)
        parts = adapter.parts(call)
        row = parts.index("conditional") * len(call.latents) // len(parts)
        found, ends = adapter.words(call, row, None, [text])
        if not found or found[0].text.lower() not in text.lower():  # but a template's
            raise ValueError(f"text={text!r}: the tokenizer finds no word in it")
        given = inspect.signature(type(adapter.module).forward).bind(adapter.module, *called[0], **called[1]).arguments
        return call, row, found, ends, given


def _lost(words, found) -> list[str]:
    cut = [word for word, read in zip(words, found, strict=False) if read.text.endswith(CUT) and read.text != word.text]
    return [word.text for word in cut + words[len(found) :]]


def _adapter(pipe) -> TransformerAdapter:
    """Return what hears a denoiser's calls, and nothing inside it, so that it may be compiled."""
    return TransformerAdapter(pipe, denoiser_of(pipe), family_of(denoiser_of(pipe))[1])


def _plain(pipe) -> dict:
    """Return arguments of a pipeline that ask for the prompt alone, at any size."""
    known = inspect.signature(pipe.__call__).parameters
    guided = {name: 0.0 for name in _GUIDANCE if name in known and known[name].default is not None}
    return guided | ({"use_resolution_binning": False} if "use_resolution_binning" in known else {})


def _reading(pipe) -> list[str]:
    """List the arguments of a pipeline that say how a text is read: what it hands on, texts and numbers left out."""
    if not hasattr(pipe, "encode_prompt"):
        return []
    known, handed = (inspect.signature(call).parameters for call in (pipe.__call__, pipe.encode_prompt))
    return [name for name in handed if name in known and "prompt" not in name]


def _as_json(value):
    """Return a value as it comes back from a file: tuples as lists."""
    return list(map(_as_json, value)) if isinstance(value, list | tuple) else value


def _is_plain(value) -> bool:
    """Whether a value can be written to a file; None, which is a default, need not be."""
    return isinstance(value, bool | int | float | str) or (
        isinstance(value, list | tuple) and all(map(_is_plain, value)) and len(value) > 0
    )
