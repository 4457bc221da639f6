"""What calls a denoiser: the pipeline itself, and with what."""

import contextlib
import inspect
import sys
from pathlib import Path
from types import FrameType

import torch

__all__ = ["calling_frame", "given", "given_texts"]

_CONTENT = "attnlab"  # what stands for a text while a chat template is looked at

# of these are the frames between this module and what calls the denoiser
_BETWEEN = (str(Path(__file__).parent), contextlib.__file__, str(Path(torch.__file__).parent))


def given(pipe, name: str) -> object:
    """Return a local variable of the pipeline's own `__call__`, which calls its denoiser now; None if there is none."""
    frame = calling_frame(pipe)
    return None if frame is None else frame.f_locals.get(name)


def given_texts(pipe, branch: str) -> list[str]:
    """List the prompts, or negative prompts, that the pipeline's own `__call__` was given, without a chat template.

    Some pipelines write their template into the list that they are given.
    """
    found = given(pipe, "prompt" if branch == "conditional" else "negative_prompt")
    found = [text for text in ([found] if isinstance(found, str) else found or []) if isinstance(text, str)]
    tokenizer = getattr(pipe, "tokenizer", None)
    if not any(mark in text for mark in getattr(tokenizer, "all_special_tokens", ()) for text in found):
        return found
    asked = [{"role": "user", "content": _CONTENT}]
    before, _, behind = tokenizer.apply_chat_template(asked, tokenize=False).partition(_CONTENT)
    return [text.removeprefix(before).split(behind.strip())[0] if text.startswith(before) else text for text in found]


def calling_frame(pipe) -> FrameType | None:
    """Return the frame of the pipeline's own `__call__` where that is what calls its denoiser now.

    For a hook of the denoiser to ask. What calls the denoiser must be code of the pipeline's class, below a frame of
    its `__call__` with this pipeline as `self`; a callback of the user's is neither, though it runs inside the call.
    """
    calls = [inspect.unwrap(vars(kind)["__call__"]) for kind in type(pipe).__mro__ if "__call__" in vars(kind)]
    codes = {call.__code__ for call in calls if hasattr(call, "__code__")}
    frame = sys._getframe(1)
    while frame and frame.f_code.co_filename.startswith(_BETWEEN):
        frame = frame.f_back
    if frame is None or frame.f_code.co_filename not in {code.co_filename for code in codes}:
        return None
    while frame:
        if frame.f_code in codes and frame.f_locals.get(frame.f_code.co_varnames[0]) is pipe:
            return frame
        frame = frame.f_back
    return None
