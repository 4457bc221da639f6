"""Check what a generation is asked for, before it starts."""

import copy
from collections.abc import Sequence

from .adapters import adapter_of
from .adapters.families import denoiser_of
from .layers import as_list
from .texts import TextEncoder
from .words import Query, find

__all__ = ["LARGEST", "check_generation", "own_size"]

LARGEST = 4  # times the side of the images that a model was trained on: attention takes the fourth power in memory


def check_generation(
    pipe,
    prompt: str,
    words: Sequence[Query] = (),
    *,
    steps: int = 20,
    guidance: float = 4.0,
    seed: int = 0,
    size: int = 0,
) -> None:
    """Check a prompt, its words and the numbers of a generation: in a moment, before minutes of work.

    Parameters
    ----------
    pipe : DiffusionPipeline
        As for `record`.
    prompt : str
        What is to be drawn.
    words : sequence
        Words of the prompt whose maps are wanted, as maps are asked for.
    steps, guidance, seed : int, float, int
        Denoising steps, guidance scale, seed of the noise.
    size : int
        Side of the image in pixels; 0 is the model's own.

    Raises
    ------
    ValueError
        With everything that is wrong, and what is right instead.
    TypeError
        For a pipeline that cannot be recorded.
    """
    own = own_size(pipe)
    problems = [*_wrong_words(pipe, prompt, words), *_wrong_steps(pipe.scheduler, steps)]
    if not (type(guidance) in (int, float) and 0 <= guidance <= 1000):
        problems.append(f"guidance is {guidance!r}: a number from 0 to 1000; 1 turns guidance off")
    if not (_is_whole(seed, 0) and seed < 2**63):
        problems.append(f"seed is {seed!r}: a whole number from 0 to 2**63 - 1")
    least = 8 if denoiser_of(pipe) is getattr(pipe, "unet", None) else 2 * pipe.vae_scale_factor
    if not (_is_whole(size, 0) and size % least == 0 and size <= LARGEST * own):
        right = f"a multiple of {least} up to {LARGEST * own}, or 0 for the model's own, {own}"
        problems.append(f"size is {size!r}: {right}")
    if problems:
        raise ValueError("this cannot be generated:" + "".join(f"\n- {problem}" for problem in problems))


def own_size(pipe) -> int:
    """Return the side in pixels, the longer one, of the images that a pipeline's denoiser was trained on.

    Parameters
    ----------
    pipe : DiffusionPipeline
        As for `record`.
    """
    known = adapter_of(pipe).module.config.get("sample_size")  # SDXL and FLUX do not say it
    return max(as_list(known or getattr(pipe, "default_sample_size", None) or 128)) * pipe.vae_scale_factor


def _wrong_words(pipe, prompt, words):
    try:
        known = TextEncoder.of(pipe).words_of(prompt)
    except ValueError as error:
        yield f"prompt: {error}"
        return
    for word in words if isinstance(words, list | tuple) else [words]:
        try:
            find(known, word)
        except (KeyError, IndexError, TypeError) as error:
            yield f"word: {error.args[0]}"


def _wrong_steps(scheduler, steps):
    right = "a whole number from 1 on"
    try:
        if _is_whole(steps, 1):
            shifted = {"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}
            copy.deepcopy(scheduler).set_timesteps(steps, **shifted)  # some make no more than they were trained on
            return
    except Exception as error:  # each scheduler has its own
        right = f"{type(scheduler).__name__} cannot make so many ({' '.join(str(error).split())})"
    yield f"steps is {steps!r}: {right}"


def _is_whole(value, least):
    return type(value) is int and value >= least
