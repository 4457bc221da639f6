"""Texts as any other denoiser reads them: its pipeline is called with a text, and stopped where the denoiser begins."""

import copy
import inspect

import torch

from ..pipelines import seed
from .adapters import DenoiserCall, EnoughSeen, TransformerAdapter
from .clip import Text
from .frames import given
from .words import Word, merge, split

__all__ = ["PipelineReader"]

# arguments of pipelines: without guidance they read the prompt alone, and any size will do
_PLAIN = {"guidance_scale": 0.0, "true_cfg_scale": 0.0, "use_resolution_binning": False}
_OPTIONS = (  # arguments that change how a text is read, and those without which a pipeline may refuse its call
    "max_sequence_length", "clean_caption", "complex_human_instruction", "height", "width", "use_resolution_binning"
)  # fmt: skip


class PipelineReader:
    """The texts of a pipeline: any template around them, and any number of text encoders, take part."""

    def __init__(self, adapter: TransformerAdapter):
        self.adapter = adapter
        self.options: dict[str, object] = {}  # arguments with which the pipeline was called, of those that matter

    @property
    def tokenizer(self):
        """The first tokenizer."""
        return self.adapter.texts.tokenizers[0]

    @property
    def window(self) -> int:
        """Largest number of tokens in a text."""
        return self.tokenizer.model_max_length

    def note_call(self) -> None:
        """Note how the pipeline was called, for a hook of its denoiser to ask: other texts are read in the same way."""
        found = {name: given(self.adapter.pipe, name) for name in _OPTIONS}
        self.options = {name: value for name, value in found.items() if value is not None}

    def read(self, text: str) -> Text:
        """Encode a text; ValueError where it has no word, or has no maps of its own beside a recorded image."""
        if self.adapter.joint:
            name = type(self.adapter.pipe).__name__
            raise ValueError(
                f"image and text attend to one another in {name}, so an image that was recorded has maps of its own "
                f"prompt alone: generate one with {text!r} as its prompt"
            )
        call, row, found, ends = self._read(text)
        mask = None if call.attention_mask is None else call.attention_mask[row].bool().cpu()
        return Text(text, [], call.text[row].cpu(), found, ends, mask)

    def words_of(self, text: str) -> list[Word]:
        """List the words of a text by its tokens alone, whose positions are not those in the denoiser's text."""
        tokenizers = {id(tokenizer): tokenizer for tokenizer in self.adapter.texts.tokenizers}
        found = merge([split(tokenizer, tokenizer(text).input_ids) for tokenizer in tokenizers.values()])
        if not found:
            raise ValueError(f"text={text!r}: the tokenizer finds no word in it")
        return found

    def lost(self, text: str) -> list[str]:
        """List the words of a text that would fall outside the window, in order."""
        return [word.text for word in self.words_of(text)[len(self._read(text)[2]) :]]

    def _read(self, text) -> tuple[DenoiserCall, int, list[Word], bool]:
        """Return a call of the denoiser that reads a text, its row, its words, and whether an end token follows."""
        call, parts = self._call(text)
        row = parts.index("conditional") * len(call.latents) // len(parts)
        found, ends = self.adapter.words(call, row, None, [text])
        self.adapter.texts.forget()
        if not found:
            raise ValueError(f"text={text!r}: the tokenizer finds no word in it")
        return call, row, found, ends

    def _call(self, text) -> tuple[DenoiserCall, tuple[str, ...]]:
        """Call the pipeline up to its denoiser; nothing of the pipeline is left changed."""
        adapter, pipe, stopped = self.adapter, self.adapter.pipe, []

        def stop(module, args, kwargs):
            stopped.append((args, kwargs))
            raise EnoughSeen

        known = set(inspect.signature(pipe.__call__).parameters)
        options = {name: value for name, value in _PLAIN.items() if name in known} | self.options
        before = dict(vars(pipe))
        handles = [adapter.module.register_forward_pre_hook(stop, prepend=True, with_kwargs=True)]
        handles += adapter.texts.listen()
        try:
            # another generation may be under way, whose timesteps are the scheduler's
            vars(pipe).update(scheduler=copy.deepcopy(pipe.scheduler), _progress_bar_config={"disable": True})
            with torch.no_grad():
                pipe(prompt=text, generator=seed(0), **options)
        except EnoughSeen:
            call = adapter.read(*stopped[0])
            return call, adapter.parts(call)
        finally:
            for handle in handles:
                handle.remove()
            vars(pipe).clear()
            vars(pipe).update(before)
        raise RuntimeError(f"{type(pipe).__name__} did not call its denoiser")
