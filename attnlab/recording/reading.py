"""Texts as any other denoiser reads them: its pipeline is called with a text, and stopped where the denoiser begins."""

import copy
import inspect

from ..pipelines import seed
from .adapters import DenoiserCall, adapter_of
from .adapters.base import arguments_of
from .clip import Text
from .encoded import EncodedTexts
from .frames import given
from .pieces import words_in
from .words import Word

__all__ = ["PipelineReader"]

_GUIDANCE = ("guidance_scale", "true_cfg_scale")  # arguments of pipelines; 0 asks for the prompt alone
_OPTIONS = (  # arguments that change how a text is read, and those without which a pipeline may refuse its call
    "max_sequence_length", "clean_caption", "complex_human_instruction", "height", "width", "use_resolution_binning"
)  # fmt: skip


class PipelineReader:
    """The texts of a pipeline: any template around them, and any number of text encoders, take part."""

    def __init__(self, pipe, options: dict | None = None):
        self.pipe = pipe
        self.options = options or {}  # arguments with which it is called, of those that matter
        self.joint = adapter_of(pipe).joint

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
        found = {name: given(self.pipe, name) for name in _OPTIONS}
        self.options = {name: value for name, value in found.items() if value is not None}
        return self.options

    def read(self, text: str) -> Text:
        """Encode a text; ValueError where it has no word, or has no maps of its own beside a recorded image."""
        if self.joint:
            name = type(self.pipe).__name__
            raise ValueError(
                f"image and text attend to one another in {name}, so an image that was recorded has maps of its own "
                f"prompt alone: generate one with {text!r} as its prompt"
            )
        call, row, found, ends = self._read(text)
        mask = None if call.attention_mask is None else call.attention_mask[row].bool().cpu()
        return Text(text, [], call.text[row].cpu(), found, ends, mask)

    def words_of(self, text: str) -> list[Word]:
        """List the words of a text; positions are those of its characters, as tokens are known of a call alone."""
        return words_in(text)

    def lost(self, text: str) -> list[str]:
        """List the words of a text that would fall outside the window, in order."""
        return [word.text for word in self.words_of(text)[len(self._read(text)[2]) :]]

    def _read(self, text) -> tuple[DenoiserCall, int, list[Word], bool]:
        """Return a call of the denoiser that reads a text, its row, its words, and whether an end token follows.

        The call is that of a copy of the pipeline with the same modules, which may be drawing an image meanwhile.
        """
        pipe = copy.copy(self.pipe)
        pipe.set_progress_bar_config(disable=True)
        vars(pipe)["scheduler"] = copy.deepcopy(pipe.scheduler)
        adapter, options = adapter_of(pipe), _plain(pipe) | self.options
        handles = adapter.texts.listen()
        try:
            called = arguments_of(adapter.module, lambda: pipe(prompt=text, generator=seed(0), **options))
        finally:
            for handle in handles:
                handle.remove()
        call = adapter.read(*called)
        parts = adapter.parts(call)
        row = parts.index("conditional") * len(call.latents) // len(parts)
        found, ends = adapter.words(call, row, None, [text])
        if not found:
            raise ValueError(f"text={text!r}: the tokenizer finds no word in it")
        return call, row, found, ends


def _plain(pipe) -> dict:
    """Return arguments of a pipeline that ask for the prompt alone, at any size."""
    known = inspect.signature(pipe.__call__).parameters
    guided = {name: 0.0 for name in _GUIDANCE if name in known and known[name].default is not None}
    return guided | ({"use_resolution_binning": False} if "use_resolution_binning" in known else {})
