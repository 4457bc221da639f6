"""Texts as the denoiser of a transformer reads them: the pipeline itself is called with a text, and stopped there."""

import copy
import inspect
from functools import cached_property, lru_cache

import torch

from ..pipelines import load_pipeline, seed
from .adapters import DenoiserCall, Stopped, adapter_of
from .frames import given
from .layers import exact
from .texts import Text, TextEncoder
from .words import Word, split

__all__ = ["PipelineTexts"]

_GUIDANCE = ("guidance_scale", "true_cfg_scale")  # arguments of pipelines; 0 asks for the prompt alone
_OPTIONS = (  # arguments that change how a text is read, and those without which a pipeline may refuse its call
    "max_sequence_length", "clean_caption", "complex_human_instruction", "height", "width", "use_resolution_binning"
)  # fmt: skip


@lru_cache(maxsize=1)
def _pipeline_of(model: str):
    return load_pipeline(model, device="cpu")


class PipelineTexts(TextEncoder):
    """The texts of a pipeline with a transformer: any chat template and any number of text encoders take part."""

    def __init__(self, load, model: str | None = None, start: list | None = None):
        super().__init__(load, model, start)
        self.options: dict[str, object] = {}  # arguments with which the pipeline was called, of those that matter

    @classmethod
    def named(cls, model, start: list | None = None) -> "PipelineTexts":
        """Name a model as `load_pipeline` takes it; nothing is loaded yet."""
        return cls(lambda: _pipeline_of(str(model)), str(model), start)

    @cached_property
    def _adapter(self):
        return adapter_of(self._load())

    @property
    def tokenizer(self):
        """The first tokenizer."""
        return self._adapter.texts.tokenizer

    def note_call(self) -> None:
        """Note how the pipeline was called, for a hook of its denoiser to ask: other texts are read in the same way."""
        found = {name: given(self._adapter.pipe, name) for name in _OPTIONS}
        self.options = {name: value for name, value in found.items() if value is not None}

    @exact()
    def __call__(self, text: str) -> Text:
        """Encode a text; ValueError where it has no word, or has no maps of its own beside a recorded image."""
        if self._adapter.joint:
            name = type(self._adapter.pipe).__name__
            raise ValueError(
                f"image and text attend to one another in {name}, so an image that was recorded has maps of its own "
                f"prompt alone: generate one with {text!r} as its prompt"
            )
        call, row, words, ends = self._read(text)
        embedding = call.text[row].cpu()
        self.check_start(embedding)
        mask = None if call.attention_mask is None else call.attention_mask[row].bool().cpu()
        return Text(text, [], embedding, words, ends, mask)

    @exact()
    def words_of(self, text: str) -> list[Word]:
        """List the words of a text with their token positions in it; ValueError where it has none."""
        return self._read(text)[2]

    def lost(self, text: str) -> list[str]:
        """List the words of a text that would fall outside the window, in order."""
        every = split(self.tokenizer, self.tokenizer(text).input_ids)
        return [word.text for word in every[len(self.words_of(text)) :]]

    def _read(self, text) -> tuple[DenoiserCall, int, list[Word], bool]:
        """Return a call of the denoiser that reads a text, its row, its words, and whether an end token follows."""
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"text={text!r}: give at least one word")
        adapter = self._adapter
        call, parts = self._call(text)
        row = parts.index("conditional") * len(call.latents) // len(parts)
        words, ends = adapter.words(call, row, self, [text])
        adapter.texts.forget()
        if not words:
            raise ValueError(f"text={text!r}: the tokenizer finds no word in it")
        return call, row, words, ends

    def _call(self, text) -> tuple[DenoiserCall, tuple[str, ...]]:
        """Call the pipeline up to its denoiser; nothing of the pipeline is left changed."""
        adapter, pipe, stopped = self._adapter, self._adapter.pipe, []

        def stop(module, args, kwargs):
            stopped.append((args, kwargs))
            raise Stopped

        unguided = dict.fromkeys(set(_GUIDANCE) & set(inspect.signature(pipe.__call__).parameters), 0.0)
        before = dict(vars(pipe))
        handles = [adapter.module.register_forward_pre_hook(stop, prepend=True, with_kwargs=True)]
        handles += adapter.texts.listen()
        try:
            # another generation may be under way, whose timesteps are the scheduler's
            vars(pipe).update(scheduler=copy.deepcopy(pipe.scheduler), _progress_bar_config={"disable": True})
            with torch.no_grad():
                pipe(prompt=text, generator=seed(0), **unguided, **self.options)
        except Stopped:
            call = adapter.read(*stopped[0])
            return call, adapter.parts(call)
        finally:
            for handle in handles:
                handle.remove()
            vars(pipe).clear()
            vars(pipe).update(before)
        raise RuntimeError(f"{type(pipe).__name__} did not call its denoiser")
