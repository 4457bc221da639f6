"""Keep what a denoiser was called with, and call it so once more: for questions that were not asked while it drew."""

from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from accelerate.utils import send_to_device

from .adapters.families import denoiser_of, family_of
from .layers import Layers, as_list
from .pinned import PinnedImage, joined_texts, named_arguments, with_text
from .recorder import Recorder
from .recording import Recording

__all__ = ["record_again"]


@torch.no_grad()
def record_again(
    pipe,
    recording: Recording,
    *,
    text: str | None = None,
    steps: int | Collection[int] | None = None,
    layers: Layers = None,
    share: str | None = None,
    keep: str | None = None,
    texts: str | Sequence[str] = (),
    self_attention: int | Collection[int] = (),
    outputs: bool = False,
    agreement: int | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> Recording:
    """Record steps of a generation once more, by the calls of the denoiser that were kept.

    It takes as long as so many steps, and gives the same to the last bit (of calls from a file: but for rounding, where
    their memory had another order). So a joint model's recording, which has sums over steps of the prompt's maps, also
    tells of single steps, of `share="joint"`, and of other layers.

    Parameters
    ----------
    pipe : DiffusionPipeline
        The one that was recorded, with the same weights.
    recording : Recording
        Of one image, with calls: of a joint model as it is recorded by default, or of ``record(pipe, keep="calls")``.
    text : str, optional
        In joint attention, a text that the model reads in the prompt's place, beside the image as it was: `daam` then
        gives maps of its words. The summary of a prompt that some models read apart (FLUX) stays the prompt's. It takes
        twice the time.
    steps : int or several, optional
        Recorded steps, by their number in the generation; all unless given.
    layers, share
        As for `record`; the recording's own unless given.
    keep, texts, self_attention, outputs, agreement, dtype, device
        As for `record`. In joint attention each of `texts` takes as long again; `ovam` gives their maps.

    Returns
    -------
    Recording
        Of the image, at these steps.

    Raises
    ------
    ValueError
        If no calls were kept, a step was not recorded, the pipeline is of another kind, a text is not read whole, one
        is given for cross-attention, where `ovam` has any, or both `text` and `texts` or `outputs` are.
    TypeError
        If a text is given for a denoiser whose image answers to it by another way than attention (Lumina-Next).
    """
    trace = recording.trace
    if not trace.calls:
        raise ValueError('the calls of the denoiser were not kept: record(pipe, keep="calls")')
    kind, dtype_now = family_of(denoiser_of(pipe))[0], str(denoiser_of(pipe).dtype)
    if (kind, dtype_now) != (trace.generation.denoiser, trace.calls[0].dtype):
        made = f"{trace.generation.denoiser} in {trace.calls[0].dtype}"
        raise ValueError(f"this was recorded from a {made}, the pipeline has a {kind} in {dtype_now}")
    if getattr(denoiser_of(pipe), "is_cache_enabled", False):
        raise ValueError("a cache leaves blocks of the denoiser out: pipe.transformer.disable_cache() first")
    chosen = trace.steps if steps is None else as_list(steps)
    unknown = [step for step in chosen if isinstance(step, bool) or step not in trace.steps]
    if unknown or not chosen:
        raise ValueError(f"steps={unknown} cannot be chosen; recorded: {trace.steps}")
    layers = list(trace.sizes) if layers is None else layers
    calls = [trace.calls[trace.steps.index(step)] for step in sorted(chosen)]
    branch = trace.generation.branch
    share = trace.generation.share if share is None else share
    kept = {"keep": keep, "share": share, "texts": texts, "self_attention": self_attention, "outputs": outputs}
    kept |= {"agreement": agreement, "dtype": dtype, "device": device}
    recorder = Recorder(pipe, layers, None, branch, None, calls[0].parts, **kept)
    adapter, recorder.known, beside = recorder.adapter, (trace.text, trace.words, trace.ends), None
    if adapter.joint and recorder.recording.encoder is not None:
        recorder.recording.encoder.reader.options = trace.generation.options  # as the prompt was read
    if text is not None:
        if texts or outputs:
            raise ValueError("text= takes the prompt's place, texts= and outputs= are beside it: give one of them")
        *beside, read = _beside(recorder, text)
        recorder.known = read.embedding, read.words, read.ends
    with recorder, nullcontext() if beside is None else PinnedImage(adapter) as pinned:
        for call in calls:
            args, kwargs = send_to_device((call.args, call.kwargs), pipe._execution_device)
            if beside is not None:
                recorder.skips = True
                pinned.keep(args, kwargs)
                images = len(named_arguments(adapter, args, kwargs)[adapter.family.text[0]])
                args, kwargs = (), with_text(adapter, args, kwargs, joined_texts([beside], images))
            adapter.module(*args, **kwargs)
    recorder.check()
    found = recorder.recording.traces[trace.row]
    changed = trace.generation.changed if text is None else None
    found.steps, found.generation = sorted(chosen), replace(trace.generation, share=share, changed=changed)
    found.timesteps = [trace.timesteps[trace.steps.index(step)] for step in found.steps]
    return Recording(recorder.recording.encoder, [found])


def _beside(recorder: Recorder, text: str) -> tuple:
    """Read a text beside an image; ValueError in cross-attention, whose recordings answer for any text."""
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"text={text!r}: give one text, of at least one word")
    if not recorder.adapter.joint:
        raise ValueError("in cross-attention a recording answers for any text: ovam(recording, text)")
    return recorder.recording.encoder.reader.beside(text)
