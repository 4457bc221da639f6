"""Make the data set of a recipe, shard by shard, in one process or several; an interrupted run goes on."""

import errno
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..pipelines import load_parts, load_pipeline, seed
from ..recording.recorder import record
from ..storage import replacing, write_text
from ..tokens import TokenLibrary
from .card import card, contact_sheet
from .labeling import heats, label, streaming
from .recipe import Recipe
from .records import Dataset, read_lines, write_lines, write_record
from .similarity import Similarity

__all__ = ["SHARDS", "generate_dataset", "make_shard"]

SHARDS = ".parts"  # folder of the finished shards, until all of them are there
_MAX_DEATHS = 3  # times that workers may die with no shard finished between


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
        Processes that make shards, with one model per process; one that dies is replaced.
    client : dask.distributed.Client, optional
        Makes the shards instead. Its workers must see `out`, and have OMP_WAIT_POLICY=PASSIVE where they share cores.

    Raises
    ------
    ValueError
        If a word or token is missing, or the folder holds other data.
    FileNotFoundError, ConnectionError
        If there is no such model or token file.
    OSError, RuntimeError
        If the disk is full (what is finished is kept), or workers died again and again.
    """
    out = Path(out)
    if workers < 1:
        raise ValueError(f"workers={workers}: 1 makes everything in this process")
    _check_words(recipe)
    _claim(out, recipe)
    if not (out / "metadata.jsonl").exists() or (out / SHARDS).exists():
        missing = [n for n in range(recipe.shards) if not _shard(out, n).exists()]
        done = len(recipe) - sum(len(batch) for n in missing for batch in recipe.batches(n))
        with tqdm(total=len(recipe), initial=done, desc=out.name, unit="image") as progress:
            try:
                if client is not None:
                    for job in [client.submit(make_shard, recipe, out.resolve(), n, pure=False) for n in missing]:
                        progress.update(job.result())
                elif workers > 1:
                    _with_processes(workers, recipe, out, missing, progress)
                else:
                    for number in missing:
                        make_shard(recipe, out, number, progress.update)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                hint = f"the disk is full; what is finished is kept, free some space and run again: {out}"
                raise OSError(error.errno, hint) from error
            finally:
                _loaded.cache_clear()
                _similarity.cache_clear()
        _finish(out, recipe)
    return Dataset(out)


def make_shard(recipe: Recipe, out: Path, number: int, advance: Callable[[int], object] = lambda count: None) -> int:
    """Write one shard into out/.parts/; return how many records it has."""
    final = _shard(out, number)
    work = final.with_name(f"{final.name}.partial-{os.getpid()}")
    shutil.rmtree(work, ignore_errors=True)
    for folder in ("images", "masks"):
        (work / folder).mkdir(parents=True)
    lines = []
    threads = torch.get_num_threads()
    torch.set_num_threads(recipe.threads)  # rounding depends on it
    try:
        for batch in recipe.batches(number):
            for index, image, labeling in _make_batch(recipe, batch):
                lines.append(write_record(work, recipe, index, image, labeling))
            advance(len(batch))
    finally:
        torch.set_num_threads(threads)
    write_lines(work / "records.jsonl", lines)
    if final.exists():  # another worker was given it as well
        shutil.rmtree(work)
    else:
        work.rename(final)
    return len(lines)


@lru_cache(maxsize=1)
def _loaded(model: str, scheduler: str | None, tokens: str | None):
    """Load pipeline and tokens; they are kept from shard to shard."""
    pipe = load_pipeline(model)
    pipe.set_progress_bar_config(disable=True)
    if scheduler:
        import diffusers  # late: by its name

        pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    return pipe, TokenLibrary.load(tokens) if tokens else None


_similarity = lru_cache(maxsize=1)(Similarity)


def _check_words(recipe):
    recipe.check(load_parts(recipe.model, ["tokenizer"])["tokenizer"])
    if recipe.filters.clip:
        _similarity(recipe.filters.clip)
    if recipe.tokens:
        library = TokenLibrary.load(recipe.tokens)
        missing = [repr(word) for word in recipe.classes.values() if word not in library]
        if missing and recipe.mask["method"] == "zero":
            raise ValueError(f"{recipe.tokens} has no token {', '.join(missing)}; it has {', '.join(library)}")


def _claim(out, recipe):
    """Make the folder this recipe's, or raise ValueError where it is something else's."""
    path = out / "recipe.yaml"
    if not path.exists():
        if out.exists() and any(out.iterdir()):
            raise ValueError(f"{out} has other files: name a new or empty folder")
        out.mkdir(parents=True, exist_ok=True)
        recipe.save(path)
    elif Recipe.load(path).digest != recipe.digest:
        raise ValueError(f"{out} holds a run with other settings (see {path}): name another folder")
    for stale in [*out.glob(f"{SHARDS}/*.partial-*"), *out.glob(f"{SHARDS}-old"), *out.glob(".*.part-*")]:
        shutil.rmtree(stale)


def _with_processes(workers, recipe, out, missing, progress):
    missing, deaths = set(missing), 0
    while missing:
        before = len(missing)
        with _patient_threads(), ProcessPoolExecutor(workers, get_context("spawn")) as pool:
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


@contextmanager
def _patient_threads():
    """Let processes begun in this block have threads that sleep while they wait: others would fight for cores."""
    before = os.environ.get("OMP_WAIT_POLICY")
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    try:
        yield
    finally:
        os.environ.pop("OMP_WAIT_POLICY")
        os.environ.update({} if before is None else {"OMP_WAIT_POLICY": before})


@torch.no_grad()
def _make_batch(recipe, batch):
    """Generate and label a batch: yield (index, image, labeling) of each record."""
    pipe, tokens = _loaded(recipe.model, recipe.scheduler, recipe.tokens)
    call = {"num_inference_steps": recipe.steps, "guidance_scale": recipe.guidance}
    if recipe.size:
        call["height"], call["width"] = recipe.size
    if recipe.negative:
        call["negative_prompt"] = [recipe.negative] * len(batch)
    prompts = [recipe.prompt(i) for i in batch]
    with record(pipe, **streaming(recipe)) as recording:
        made = pipe(prompts, generator=[seed(recipe.seed_of(i)) for i in batch], **call)
    clip = recipe.filters.clip
    cosines = _similarity(clip)(made.images, prompts) if clip else [None] * len(batch)
    for index, image, one, value in zip(batch, made.images, recording, cosines, strict=True):
        pixels = np.asarray(image.convert("RGB"))
        yield index, image, label(heats(one, recipe, pixels.shape[:2], tokens), pixels, recipe, value)


def _finish(out, recipe):
    """Sort the shards' records into accepted and rejected ones, write what describes them, and drop the shards.

    Every step can be done twice, so it may be cut off anywhere.
    """
    lines = [line for n in range(recipe.shards) for line in read_lines(_shard(out, n) / "records.jsonl")]
    _reject_duplicates(lines, recipe.filters.duplicates)
    for folder in ("images", "masks", "rejected"):
        (out / folder).mkdir(exist_ok=True)
    for path in (out / SHARDS).glob("?????/*/*.png"):
        line = lines[int(path.name[:6])]
        if not line["rejected"]:
            path.replace(out / path.parent.name / path.name)
        elif path.parent.name == "images":
            path.replace(out / "rejected" / path.name)
    accepted = [{k: v for k, v in line.items() if k != "rejected"} for line in lines if not line["rejected"]]
    write_lines(out / "rejected.jsonl", [_as_rejected(line) for line in lines if line["rejected"]])
    if accepted:
        with replacing(out / "contact_sheet.png") as part:
            contact_sheet(out, accepted).save(part)
    write_text(out / "README.md", card(recipe, lines))
    write_lines(out / "metadata.jsonl", accepted)
    (out / SHARDS).rename(out / f"{SHARDS}-old")
    shutil.rmtree(out / f"{SHARDS}-old")


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
    return {"file": f"rejected/{line['index']:06d}.png", "reason": line["rejected"], **kept}


def _shard(out, number):
    return Path(out, SHARDS, f"{number:05d}")
