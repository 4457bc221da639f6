"""Whose call of a denoiser it is, and what the parts of its batch are."""

import contextlib
import inspect
import sys
from pathlib import Path

import torch

from .adapters import Adapter, DenoiserCall

__all__ = ["BatchParts", "is_calling"]

# of these are the frames between this module and what calls the denoiser
_BETWEEN = (str(Path(__file__).parent), contextlib.__file__, str(Path(torch.__file__).parent))
_HOW = "name them yourself, record(pipe, parts=('negative', 'conditional')), or ('conditional',) without guidance"


class BatchParts:
    """The rows of a batch that belong to some branches.

    A pipeline knows how it guides only while it is itself called: the denoiser may also be called by another pipeline
    that shares it, by a loop of the user's, or by a callback. Those have to name the parts.
    """

    def __init__(self, adapter: Adapter, branches: tuple[str, ...], named: tuple[str, ...] | None = None):
        if named is not None and not (isinstance(named, list | tuple) and all(branch in named for branch in branches)):
            wanted = ", ".join(branches)
            raise ValueError(
                f"parts={named!r}: name every part of a batch in order, {wanted} among them, for example "
                "('negative', 'conditional')"
            )
        self.adapter, self.branches = adapter, branches
        self.named = None if named is None else tuple(named)
        self._seen: tuple | None = None  # parts and batch size of the latest call

    def rows(self, call: DenoiserCall) -> list[tuple[str, int]]:
        """Return (branch, row of the batch) of every image; none where this call lacks one of the branches."""
        parts, batch = self.named or self._parts(call), len(call.latents)
        images, rest = divmod(batch, len(parts))
        name = type(self.adapter.pipe).__name__
        if rest:
            raise ValueError(f"a batch of {batch} does not divide into the parts {parts} of {name}: {_HOW}")
        if self._seen != (parts, batch) and self.named is None and not self._agree(call, len(parts)):
            raise ValueError(f"the parts {parts} of {name}'s batch do not hold the same images: {_HOW}")
        self._seen = parts, batch
        branches = self.branches if set(self.branches) <= set(parts) else ()
        return [(branch, parts.index(branch) * images + i) for branch in branches for i in range(images)]

    def _parts(self, call):
        pipe = self.adapter.pipe
        if not is_calling(pipe):
            raise ValueError(
                f"the denoiser was called by something else than {type(pipe).__name__} itself, which cannot say what "
                f"the parts of that batch are: record the pipeline that is called, or {_HOW}"
            )
        return self.adapter.parts(call)

    def _agree(self, call, count):
        """Whether each part holds the same noisy images, as those of guidance do."""
        channels = self.adapter.module.config.out_channels  # behind the noise come conditions, which may differ
        first, *others = call.latents[:, :channels].chunk(count)
        return all(torch.allclose(first, other, rtol=0, atol=0, equal_nan=True) for other in others)


def is_calling(pipe) -> bool:
    """Return whether a pipeline's own `__call__` is what calls its denoiser now. For a hook of the denoiser to ask.

    What calls the denoiser must be code of the pipeline's class, below a frame of its `__call__` with this pipeline as
    `self`; a callback of the user's is neither, though it runs inside the call.

    Parameters
    ----------
    pipe : DiffusionPipeline
        The pipeline.
    """
    calls = [inspect.unwrap(vars(kind)["__call__"]) for kind in type(pipe).__mro__ if "__call__" in vars(kind)]
    codes = {call.__code__ for call in calls if hasattr(call, "__code__")}
    frame = sys._getframe(1)
    while frame and frame.f_code.co_filename.startswith(_BETWEEN):
        frame = frame.f_back
    if frame is None or frame.f_code.co_filename not in {code.co_filename for code in codes}:
        return False
    while frame:
        if frame.f_code in codes and frame.f_locals.get(frame.f_code.co_varnames[0]) is pipe:
            return True
        frame = frame.f_back
    return False
