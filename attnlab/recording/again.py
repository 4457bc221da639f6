"""Keep what a denoiser was called with, and call it so once more: for questions that were not asked while it drew."""

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from accelerate.utils import send_to_device

from .layers import Layers, as_list
from .recorder import Recorder
from .recording import Recording

__all__ = ["record_again"]


@torch.no_grad()
def record_again(
    pipe,
    recording: Recording,
    *,
    steps: int | Collection[int] | None = None,
    layers: Layers = None,
    keep: str | None = None,
    share: str | None = None,
    texts: str | Sequence[str] = (),
    self_attention: int | Collection[int] = (),
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
    steps : int or several, optional
        Recorded steps, by their number in the generation; all unless given.
    layers, keep
        As for `record`.
    share : {"text", "joint"}, optional
        As for `record`; the recording's own unless given.
    texts, self_attention, dtype, device
        As for `record`.

    Returns
    -------
    Recording
        Of the image, at these steps.

    Raises
    ------
    ValueError
        If no calls were kept, or a step was not recorded.
    """
    trace = recording.trace
    if not trace.calls:
        raise ValueError('the calls of the denoiser were not kept: record(pipe, keep="calls")')
    chosen = trace.steps if steps is None else as_list(steps)
    unknown = [step for step in chosen if isinstance(step, bool) or step not in trace.steps]
    if unknown or not chosen:
        raise ValueError(f"steps={unknown} cannot be chosen; recorded: {trace.steps}")
    calls = [trace.calls[trace.steps.index(step)] for step in sorted(chosen)]
    branch = trace.generation.branch
    share = trace.generation.share if share is None else share
    kept = {"keep": keep, "share": share, "texts": texts, "self_attention": self_attention}
    recorder = Recorder(pipe, layers, None, branch, None, calls[0].parts, **kept, dtype=dtype, device=device)
    recorder.known = trace
    denoiser = recorder.adapter.module
    with recorder:
        for call in calls:
            args, kwargs = send_to_device((call.args, call.kwargs), pipe._execution_device)
            denoiser(*args, **kwargs)
    recorder.check()
    found = recorder.recording.traces[trace.row]
    found.steps, found.generation = sorted(chosen), replace(trace.generation, share=share)
    found.timesteps = [trace.timesteps[trace.steps.index(step)] for step in found.steps]
    return Recording(recorder.recording.encoder, [found])
