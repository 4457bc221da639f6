"""Draw, label and write one shard of a data set, by the model that this process keeps."""

import inspect
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from threading import RLock
from uuid import uuid4

import numpy as np
import torch
from PIL import Image

from ..pipelines import load_parts, load_pipeline, seed
from ..recording.recorder import record
from ..storage import write_text
from ..tokens import TokenLibrary
from .instances import needs_attention, number_instances
from .labeling import heats, label, streaming
from .looking import label_photo, look
from .photos import check_photos, read_photo
from .recipe import Recipe
from .records import SHARDS, as_lines, record_folders, write_record
from .similarity import Similarity

__all__ = ["ENOUGH_FILE", "check_words", "forget_models", "make_shard", "shard_folder", "try_recipe"]

ENOUGH_FILE = "enough"  # file among the shards that tells workers that no more are wanted
_MODEL = RLock()  # the model that this process keeps is recorded by one of its threads at a time


def make_shard(recipe: Recipe, out: Path, number: int, advance: Callable[[int], object] = lambda count: None) -> int:
    """Write one shard into out/.parts/; return how many records it has: none where there is enough without it."""
    final, enough = shard_folder(out, number), Path(out, SHARDS, ENOUGH_FILE)
    work, lines = final.with_name(f"{final.name}.partial-{uuid4().hex}"), []
    work.mkdir()  # not the folder above: it is gone once the data set is finished, and stays so
    for folder in record_folders(recipe):
        (work / folder).mkdir()
    with _MODEL, _threads(recipe.threads), _writer(recipe) as submit:
        written = None
        for batch in recipe.batches(number):
            if enough.exists():
                break
            drawn = _draw(recipe, batch)
            lines += written.result() if written else []
            written = submit(_write, work, recipe, batch, *drawn)  # no more batches are held than two
            advance(len(batch))
        lines += written.result() if written else []
    if enough.exists():
        shutil.rmtree(work)
        return 0
    write_text(work / "records.jsonl", as_lines(lines))
    try:
        work.rename(final)
    except OSError:
        if not final.exists():
            raise
        shutil.rmtree(work)  # another worker was given it as well, and was faster
    return len(lines)


@contextmanager
def _threads(count):
    """Let torch compute with so many threads in this block: rounding depends on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _writer(recipe):
    """Yield what runs a function: a thread, while a GPU draws the next batch; beside a CPU, the caller itself.

    On a CPU a thread would take cores from those that draw, each of which then waits for the slowest, by spinning.
    """
    if _device(recipe) == "cpu":
        yield _run_here
    else:
        with ThreadPoolExecutor(1) as thread:
            yield partial(thread.submit, _run_alone)


def _device(recipe):
    return _loaded(recipe.model, recipe.dtype, recipe.scheduler, recipe.tokens)[0].device.type


def _run_here(function, *given):
    future = Future()
    future.set_result(_run_alone(function, *given))
    return future


def _run_alone(function, *given):
    """Run a function by one thread of torch: what it rounds does not depend on where it runs."""
    with _threads(1):
        return function(*given)


@torch.no_grad()
def _draw(recipe, batch, **call):
    """Generate a batch: return its images, their recording, and how alike each is to its prompt."""
    pipe, tokens = _loaded(recipe.model, recipe.dtype, recipe.scheduler, recipe.tokens)
    if recipe.photos:
        return _look(recipe, batch, pipe, tokens)
    call |= {"num_inference_steps": recipe.steps, "guidance_scale": recipe.guidance}
    if recipe.size:
        call["height"], call["width"] = recipe.size
    if recipe.negative:
        call["negative_prompt"] = [recipe.negative] * len(batch)
    prompts = [recipe.prompt(i) for i in batch]
    with record(pipe, **streaming(recipe)) as recording:
        made = pipe(prompts, generator=[seed(recipe.seed_of(i)) for i in batch], **call)
    return made.images, recording, _compare(recipe, made.images, prompts)


def _look(recipe, batch, pipe, tokens):
    """Look at the photos of a batch: return them, the maps of each look, and how alike each is to the prompt."""
    photos = [read_photo(recipe.photos, index) for index in batch]
    looks = [look(pipe, photo, recipe, index, tokens) for index, photo in zip(batch, photos, strict=True)]
    images = [Image.fromarray(photo) for photo in photos]
    return images, looks, _compare(recipe, images, [recipe.prompt(index) for index in batch])


def _compare(recipe, images, prompts):
    clip = recipe.filters.clip
    return _similarity(clip)(images, prompts) if clip else [None] * len(prompts)


def _write(work, recipe, batch, *drawn):
    """Label and write a batch; return the records' lines."""
    found = zip(batch, *drawn, strict=True)
    return [write_record(work, recipe, i, image, _label(recipe, image, *more)) for i, image, *more in found]


@torch.no_grad()
def _label(recipe, image, recording, cosine):
    """Label an image by its recording."""
    _, tokens = _loaded(recipe.model, recipe.dtype, recipe.scheduler, recipe.tokens)
    pixels = np.asarray(image.convert("RGB"))
    if recipe.photos:
        found = label_photo(recording, pixels, recipe, cosine)
    else:
        found = label(heats(recording, recipe, pixels.shape[:2], tokens), pixels, recipe, cosine)
    if recipe.instances is None:
        return found
    attention = recording.self_attention(recipe.attention) if needs_attention(recipe.instances) else None
    return found._replace(instances=number_instances(found.labels, recipe.instances, attention))


@lru_cache(maxsize=1)
def _loaded(model: str, dtype: str | None, scheduler: str | None, tokens: str | None):
    """Load pipeline and tokens; they are kept from shard to shard."""
    pipe = load_pipeline(model, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    if scheduler:
        import diffusers  # late: by its name

        pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    return pipe, TokenLibrary.load(tokens) if tokens else None


_similarity = lru_cache(maxsize=1)(Similarity)


def forget_models() -> None:
    """Let go of the models, and of their place on a GPU."""
    _loaded.cache_clear()
    _similarity.cache_clear()
    torch.cuda.empty_cache()


def check_words(recipe: Recipe) -> None:
    """Refuse a recipe by its words, tokens and photos, before its model is loaded.

    Parameters
    ----------
    recipe : Recipe
        ValueError where one of its words is missing or cut off, no token was learned of a class, or a photo is unread.
    """
    recipe.check(load_parts(recipe.model, ["tokenizer"])["tokenizer"])
    if recipe.tokens:
        library = TokenLibrary.load(recipe.tokens)
        missing = [repr(word) for word in recipe.classes.values() if word not in library]
        if missing and recipe.mask["method"] == "zero":
            raise ValueError(f"{recipe.tokens} has no token {', '.join(missing)}; it has {', '.join(library)}")
    if recipe.photos:
        check_photos(recipe.photos)


def try_recipe(recipe: Recipe) -> None:
    """Label the first image after one step of its generation: what would fail then fails before anything is made.

    Parameters
    ----------
    recipe : Recipe
        ValueError, with what failed, where its model, scheduler or layers cannot do it.
    """
    if recipe.photos:
        recipe = replace(recipe, photos=replace(recipe.photos, tiles=1, looks=1, timesteps=recipe.photos.timesteps[:1]))
    with _MODEL:
        if recipe.filters.clip:
            _similarity(recipe.filters.clip)
        pipe, _ = _loaded(recipe.model, recipe.dtype, recipe.scheduler, recipe.tokens)
        trained = pipe.scheduler.config.get("num_train_timesteps", recipe.steps)
        if recipe.steps > trained and not recipe.photos:
            raise ValueError(f"steps is {recipe.steps}: the model was trained with {trained}, and has no more")
        stop = "callback_on_step_end"  # where a pipeline has none, all its steps are done
        call = {stop: _stop} if stop in inspect.signature(pipe.__call__).parameters else {}
        try:
            images, recording, cosines = _draw(recipe, range(1), **call)
            _label(recipe, images[0], recording[0], cosines[0])
        except Exception as error:  # of any kind: the model, its scheduler and its layers are anybody's
            how = f"its first step ({recipe.steps} steps of {type(pipe.scheduler).__name__})"
            how = f"a look at {recipe.photos.names[0]}" if recipe.photos else how
            raise ValueError(f"this recipe cannot be made, {how} failed: {error}") from error


def _stop(pipe, *_):
    pipe._interrupt = True
    return {}


def shard_folder(out: Path, number: int) -> Path:
    """Return where a shard of a data set lies, until all are there."""
    return Path(out, SHARDS, f"{number:05d}")
