"""Make the data set of a recipe, shard by shard, in one process or several; an interrupted run goes on."""

import errno
import inspect
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from threading import RLock
from uuid import uuid4

import numpy as np
import torch
from filelock import FileLock, Timeout
from PIL import Image
from tqdm import tqdm

from ..pipelines import load_parts, load_pipeline, seed
from ..recording.recorder import record
from ..storage import replacing, write_text
from ..tokens import TokenLibrary
from .card import card, contact_sheet
from .instances import needs_attention, number_instances
from .labeling import heats, label, streaming
from .looking import label_photo, look
from .photos import changed_photos, check_photos, read_photo
from .recipe import Recipe
from .records import (
    SUMS_FILE,
    Dataset,
    as_lines,
    read_lines,
    record_files,
    record_folders,
    sha256,
    write_record,
    wrong_line,
)
from .similarity import Similarity
from .workers import begin_worker, patient_threads, visible_gpus

__all__ = ["SHARDS", "generate_dataset", "make_shard"]

SHARDS = ".parts"  # folder of the finished shards, until all of them are there
_LOCK = ".lock"  # of the maker at work, however it ends; the file is gone from a finished data set
_MAX_DEATHS = 3  # times that workers may die with no shard finished between
_MODEL = RLock()  # the model that this process keeps is recorded by one of its threads at a time


def generate_dataset(recipe: Recipe, out: str | Path, *, workers: int = 1, client=None) -> Dataset:
    """Make a recipe's data set in a folder; go on where an earlier run was interrupted or killed.

    A record depends on the recipe and its index alone. Shards are written under another name and renamed when whole.

    Parameters
    ----------
    recipe : Recipe
        What to make.
    out : str or Path
        A folder that is new, empty, or has this recipe's data.
    workers : int
        Processes that make shards, with one model per process; one that dies is replaced. Each has one of the GPUs, in
        turn: as many workers as GPUs use all of them.
    client : dask.distributed.Client, optional
        Makes the shards instead. Its workers must see `out`, and have OMP_WAIT_POLICY=PASSIVE where they share cores.
        Those of a `dask_cuda.LocalCUDACluster` have a GPU each.

    Raises
    ------
    ValueError
        If this recipe cannot be made, before anything is: a word or token is missing or cut off, no layer has the
        height of `attention`, ...; or the folder holds other data, or is being made by another process.
    FileNotFoundError, ConnectionError
        If there is no such model or token file.
    OSError, RuntimeError
        If the disk is full (what is finished is kept), or workers died again and again.
    """
    out = Path(out)
    if type(workers) is not int or workers < 1:
        raise ValueError(f"workers={workers!r}: 1 makes everything in this process")
    try:
        if _is_new(out, recipe):
            _check_words(recipe)
            client.submit(_try, recipe, pure=False).result() if client else _try(recipe)
        if not _is_finished(out):
            with _claimed(out, recipe):
                if not _is_finished(out):
                    _make(recipe, out, workers, client)
    finally:
        _forget()
    if (out / _LOCK).exists():  # a finished data set may be where nobody can write
        (out / _LOCK).unlink(missing_ok=True)
    return Dataset(out)


def _make(recipe, out, workers, client):
    """Make the shards that are missing or damaged, and put all of them together."""
    missing = [number for number in range(recipe.shards) if not _is_whole(out, recipe, number)]
    for number in missing:
        shutil.rmtree(_shard(out, number), ignore_errors=True)
    done = len(recipe) - sum(len(batch) for n in missing for batch in recipe.batches(n))
    with tqdm(total=len(recipe), initial=done, desc=out.name, unit="image") as progress:
        try:
            if client is not None:
                _with_client(client, recipe, out, missing, progress)
            elif workers > 1:
                _forget()  # the workers have their own
                _with_processes(workers, recipe, out, missing, progress)
            else:
                for number in missing:
                    make_shard(recipe, out, number, progress.update)
            _finish(out, recipe)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            hint = f"the disk is full; what is finished is kept, free some space and run again: {out}"
            raise OSError(error.errno, hint) from error


def make_shard(recipe: Recipe, out: Path, number: int, advance: Callable[[int], object] = lambda count: None) -> int:
    """Write one shard into out/.parts/; return how many records it has."""
    final = _shard(out, number)
    work, lines = final.with_name(f"{final.name}.partial-{uuid4().hex}"), []
    for folder in record_folders(recipe):
        (work / folder).mkdir(parents=True)
    # while the model draws the next batch, a thread labels and writes the one before: no more are held than two
    with _MODEL, _threads(recipe.threads), ThreadPoolExecutor(1) as thread:
        written = None
        for batch in recipe.batches(number):
            drawn = _draw(recipe, batch)
            lines += written.result() if written else []
            written = thread.submit(_write, work, recipe, batch, *drawn)
            advance(len(batch))
        lines += written.result()
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


def _forget():
    """Let go of the models, and of their place on a GPU."""
    _loaded.cache_clear()
    _similarity.cache_clear()
    torch.cuda.empty_cache()


def _check_words(recipe):
    recipe.check(load_parts(recipe.model, ["tokenizer"])["tokenizer"])
    if recipe.tokens:
        library = TokenLibrary.load(recipe.tokens)
        missing = [repr(word) for word in recipe.classes.values() if word not in library]
        if missing and recipe.mask["method"] == "zero":
            raise ValueError(f"{recipe.tokens} has no token {', '.join(missing)}; it has {', '.join(library)}")
    if recipe.photos:
        check_photos(recipe.photos)


def _try(recipe):
    """Label the first image after one step of its generation: what would fail then fails before anything is made."""
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


def _is_new(out, recipe):
    """Whether a folder is new; ValueError where it is not this recipe's."""
    path = out / "recipe.yaml"
    if path.exists():
        if Recipe.load(path).digest != recipe.digest:
            changed = "; ".join(changed_photos(Recipe.load(path).photos, recipe.photos))
            hint = f" ({changed})" if changed else ""
            raise ValueError(f"{out} holds a run with other settings (see {path}){hint}: name another folder")
        return False
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: name a new or empty folder")
    left = (_LOCK, ".recipe.yaml.part-")  # by a maker that was killed as it began
    if out.exists() and not all(path.name.startswith(left) for path in out.iterdir()):
        raise ValueError(f"{out} has other files: name a new or empty folder")
    return True


def _is_finished(out):
    return (out / "metadata.jsonl").exists() and not any(out.glob(f"{SHARDS}*"))


@contextmanager
def _claimed(out: Path, recipe: Recipe) -> Iterator[None]:
    """Hold a folder for this recipe, without what killed makers left; ValueError where another maker holds it."""
    lock = FileLock(out / _LOCK, timeout=0)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise ValueError(f"{out} is being made by another process: wait for it, or name another folder") from None
    except OSError as error:
        raise OSError(error.errno, f"cannot write to {out} ({error.strerror}): name another folder") from error
    try:
        if _is_new(out, recipe):
            recipe.save(out / "recipe.yaml")
        for stale in [*out.glob(f"{SHARDS}/*.partial-*"), *out.glob(f"{SHARDS}-old"), *out.glob(".*.part-*")]:
            shutil.rmtree(stale, ignore_errors=True)  # a dead maker's Dask task may still write there
        yield
    finally:
        lock.release()


def _is_whole(out, recipe, number):
    """Whether a shard has all its records, and each file as it was written: there, or already in its last place."""
    shard, indices = _shard(out, number), [index for batch in recipe.batches(number) for index in batch]
    try:
        lines = read_lines(shard / "records.jsonl", {"index": int, "sha256": dict})
        if [line["index"] for line in lines] != indices or any(wrong_line(recipe, line) for line in lines):
            return False
        for line in lines:
            for file in record_files(recipe, line["index"]):
                places = [shard / file.name, out / file.name, out / "rejected" / Path(file.name).name]
                path = next(place for place in places if place.exists())
                if line[file.column] != file.name or sha256(path.read_bytes()) != line["sha256"][file.key]:
                    return False
    except (OSError, ValueError, KeyError, StopIteration):
        return False
    return True


def _with_client(client, recipe, out, missing, progress):
    jobs = [client.submit(make_shard, recipe, out.resolve(), number, pure=False) for number in missing]
    try:
        for job in jobs:
            progress.update(job.result())
    finally:
        client.cancel(jobs)


def _with_processes(workers, recipe, out, missing, progress):
    missing, deaths = set(missing), 0
    while missing:
        before = len(missing)
        spawn = get_context("spawn")
        begin = begin_worker, (spawn.Value("i"), visible_gpus())
        with patient_threads(), ProcessPoolExecutor(workers, spawn, *begin) as pool:
            jobs = {pool.submit(make_shard, recipe, out, number): number for number in sorted(missing)}
            try:
                for job in as_completed(jobs):
                    progress.update(job.result())
                    missing.discard(jobs[job])
            except BrokenProcessPool:
                finished = {n for n in missing if _shard(out, n).exists()}
                progress.update(sum(len(batch) for n in finished for batch in recipe.batches(n)))
                missing -= finished
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        deaths = deaths + 1 if len(missing) == before else 0
        if deaths > _MAX_DEATHS:
            raise RuntimeError(f"workers died {deaths} times without finishing a shard: out of memory? try fewer")


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


def _write(work, recipe, batch, *drawn):
    """Label and write a batch; return the records' lines."""
    found = zip(batch, *drawn, strict=True)
    return [write_record(work, recipe, i, image, _label(recipe, image, *more)) for i, image, *more in found]


def _finish(out, recipe):
    """Sort the shards' records into accepted and rejected ones, write what describes them, and drop the shards.

    Every step can be done twice, so it may be cut off anywhere.
    """
    shards = [read_lines(_shard(out, n) / "records.jsonl") for n in range(recipe.shards)]
    lines = [line for shard in shards for line in shard]
    _reject_duplicates(lines, recipe.filters.duplicates)
    for folder in (*record_folders(recipe), "rejected"):
        (out / folder).mkdir(exist_ok=True)
    for number, shard in enumerate(shards):
        for line in shard:
            _move(_shard(out, number), out, record_files(recipe, line["index"]), line["rejected"])
    accepted = [{k: v for k, v in line.items() if k != "rejected"} for line in lines if not line["rejected"]]
    rejected = [line for line in lines if line["rejected"]]
    if accepted:
        with replacing(out / "contact_sheet.png") as part:
            contact_sheet(out, accepted).save(part)
    write_text(out / "README.md", card(recipe, lines))
    texts = {"rejected.jsonl": as_lines(map(_as_rejected, rejected)), "metadata.jsonl": as_lines(accepted)}
    sums = {name: sha256(text.encode()) for name, text in texts.items()}
    sums |= {"recipe.yaml": sha256((out / "recipe.yaml").read_bytes())}
    sums |= {_rejected_name(line["index"]): line["sha256"]["image"] for line in rejected}
    texts = {SUMS_FILE: "".join(f"{found}  {name}\n" for name, found in sums.items()), **texts}
    for name, text in texts.items():
        write_text(out / name, text)  # metadata.jsonl, the last, makes it a data set
    (out / SHARDS).rename(out / f"{SHARDS}-old")
    shutil.rmtree(out / f"{SHARDS}-old")


def _move(shard, out, files, rejected):
    """Move a record's files to their last place, of a rejected one its image, where that is not done yet."""
    for file in files[:1] if rejected else files:
        if (shard / file.name).exists():
            (shard / file.name).replace(out / "rejected" / Path(file.name).name if rejected else out / file.name)


def _reject_duplicates(lines, most):
    """Mark every record whose hash is near that of an earlier accepted one."""
    kept: list[tuple[int, int]] = []
    for line in lines:
        own = int(line["hash"], 16)
        if line["rejected"] or most is None:
            continue
        near = next((index for index, other in kept if (own ^ other).bit_count() <= most), None)
        if near is None:
            kept.append((line["index"], own))
        else:
            line["rejected"] = f"near duplicate of {near:06d}"


def _as_rejected(line):
    kept = {key: line[key] for key in ("index", "prompt", "seed", "areas", "scores")}
    return {"file": _rejected_name(line["index"]), "reason": line["rejected"], **kept}


def _rejected_name(index):
    return f"rejected/{index:06d}.png"


def _shard(out, number):
    return Path(out, SHARDS, f"{number:05d}")
