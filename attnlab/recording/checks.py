"""Check what a generation is asked for, before it starts, and put it into a pipeline's own arguments."""

import copy
import inspect
from collections.abc import Sequence

from .adapters import adapter_of
from .adapters.families import denoiser_of
from .layers import as_list
from .pinned import PinnedImage
from .texts import TextEncoder
from .words import Query, find

__all__ = ["LARGEST", "check_generation", "generation_arguments", "latent_side", "own_size", "side_multiple"]

LARGEST = 4  # times the side of the images that a model was trained on: attention takes the fourth power in memory


def check_generation(
    pipe,
    prompt: str,
    words: Sequence[Query] = (),
    *,
    texts: Sequence[str] = (),
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
    texts : sequence of str
        Other texts whose maps are wanted of the image, as by `ovam`.
    steps, guidance, seed : int, float, int
        Denoising steps, guidance scale, seed of the noise.
    size : int
        Side of the image in pixels; 0 is the model's own.

    Raises
    ------
    ValueError
        With everything that is wrong, and what is right instead.
    TypeError
        For a pipeline that cannot be recorded, or reads no other texts beside an image.
    """
    own, least = own_size(pipe), side_multiple(pipe)
    fits = _is_whole(size, 0) and size % least == 0 and size <= LARGEST * own
    problems = [*_wrong_texts(pipe, prompt, words, texts), *_wrong_steps(pipe.scheduler, steps)]
    if not (type(guidance) in (int, float) and 0 <= guidance <= 1000):
        problems.append(f"guidance is {guidance!r}: a number from 0 to 1000; 1 turns guidance off")
    if not (_is_whole(seed, 0) and seed < 2**63):
        problems.append(f"seed is {seed!r}: a whole number from 0 to 2**63 - 1")
    if not fits:
        right = f"a multiple of {least} up to {LARGEST * own}, or 0 for the model's own, {own}"
        problems.append(f"size is {size!r}: {right}")
    if problems:
        raise ValueError("this cannot be generated:" + "".join(f"\n- {problem}" for problem in problems))


def generation_arguments(
    pipe, prompt: str, *, negative: str = "", steps: int = 20, guidance: float = 4.0, size: int = 0
) -> dict[str, object]:
    """Return what a pipeline is called with for a generation, in its own words: `pipe(**arguments, generator=...)`.

    Parameters
    ----------
    pipe : DiffusionPipeline
        As for `record`.
    prompt, negative : str
        What is to be drawn, and what not.
    steps, guidance, size : int, float, int
        As in `check_generation`.

    Raises
    ------
    ValueError
        For a negative prompt where the pipeline takes none.
    """
    known = inspect.signature(pipe.__call__).parameters
    found = {"prompt": prompt, "num_inference_steps": steps}
    if "guidance_scale" in known and known["guidance_scale"].default is not None:
        found["guidance_scale"] = guidance
    elif "true_cfg_scale" in known:  # Qwen-Image, which guides where there is a negative prompt, be it a space
        found["true_cfg_scale"], negative = guidance, negative or " " * (guidance > 1)
    if negative and "negative_prompt" not in known:
        raise ValueError(f"{type(pipe).__name__} takes no negative prompt, so {negative!r} cannot be told to it")
    if negative:
        found["negative_prompt"] = negative
    if size:
        found |= {"height": size, "width": size}
    if size and "use_resolution_binning" in known:  # which draws another size, and makes that of it
        found["use_resolution_binning"] = False
    if "clean_caption" in known:  # which changes words, where packages for it are installed
        found["clean_caption"] = False
    return found | _without_intermediate(pipe.__call__, steps)


def own_size(pipe) -> int:
    """Return the side in pixels, the longer one, of the images that a pipeline draws unless told otherwise.

    Parameters
    ----------
    pipe : DiffusionPipeline
        As for `record`.
    """
    known = adapter_of(pipe).module.config.get("sample_size")  # SDXL and FLUX do not say it
    height = inspect.signature(pipe.__call__).parameters.get("height")
    if height is not None and isinstance(height.default, int):  # Sana, Kandinsky: whatever its configuration says
        return height.default
    return max(as_list(known or getattr(pipe, "default_sample_size", None) or 128)) * latent_side(pipe)


def _without_intermediate(takes, steps) -> dict:
    """Leave out the step between two, which Sana Sprint and its scheduler have in two steps alone."""
    known = "intermediate_timesteps" in inspect.signature(takes).parameters
    return {"intermediate_timesteps": None} if known and steps != 2 else {}


def latent_side(pipe) -> int:
    """Return the side in pixels of what becomes one latent; 1 where pixels are denoised themselves.

    Parameters
    ----------
    pipe : DiffusionPipeline
        As for `record`.
    """
    names = ("vae_scale_factor", "vae_scale_factor_spatial")
    return next((getattr(pipe, name) for name in names if hasattr(pipe, name)), 1)


def side_multiple(pipe) -> int:
    """Return what the sides of an image are multiples of, in pixels.

    Parameters
    ----------
    pipe : DiffusionPipeline
        As for `record`.
    """
    if getattr(pipe, "movq", None) is not None:  # Kandinsky 3 rounds up to it
        return 64
    return 8 if denoiser_of(pipe) is getattr(pipe, "unet", None) else 2 * latent_side(pipe)


def _wrong_texts(pipe, prompt, words, texts):
    encoder = TextEncoder.of(pipe)
    try:
        known = encoder.words_of(prompt)
    except ValueError as error:
        yield f"prompt: {error}"
        return
    for word in words if isinstance(words, list | tuple) else [words]:
        try:
            find(known, word)
        except (KeyError, IndexError, TypeError) as error:
            yield f"word: {error.args[0]}"
    read, adapter = encoder, adapter_of(pipe)
    if adapter.joint and texts:
        PinnedImage(adapter)  # TypeError where no other text fits an image
        read = encoder.reader.beside
    for text in texts:
        try:
            read(text)
        except ValueError as error:
            yield f"text: {error}"


def _wrong_steps(scheduler, steps):
    right = "a whole number from 1 on"
    try:
        if _is_whole(steps, 1):
            shifted = {"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}
            shifted |= _without_intermediate(scheduler.set_timesteps, steps)
            copy.deepcopy(scheduler).set_timesteps(steps, **shifted)  # some make no more than they were trained on
            return
    except Exception as error:  # each scheduler has its own
        right = f"{type(scheduler).__name__} cannot make so many ({' '.join(str(error).split())})"
    yield f"steps is {steps!r}: {right}"


def _is_whole(value, least):
    return type(value) is int and value >= least
