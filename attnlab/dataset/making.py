"""Make the data set of a recipe, shard by shard, in one process or several; an interrupted run goes on.

This is about which shards are made, by whom, and what becomes of them; `shards` has how one is drawn.
"""

import errno
import math
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from queue import SimpleQueue

from filelock import FileLock, Timeout
from tqdm import tqdm

from ..storage import replacing, write_text
from .card import card, contact_sheet
from .keeping import Selection, count_reasons
from .photos import changed_photos
from .recipe import Recipe
from .records import SHARDS, SUMS_FILE, Dataset, as_lines, read_lines, record_files, record_folders, sha256, wrong_line
from .shards import ENOUGH_FILE, check_words, forget_models, make_shard, shard_folder, try_recipe
from .workers import begin_worker, patient_threads, visible_gpus

__all__ = ["generate_dataset"]

_LOCK = ".lock"  # of the maker at work, however it ends; the file is gone from a finished data set
_MAX_DEATHS = 3  # times that workers may die with no shard finished between


def generate_dataset(recipe: Recipe, out: str | Path, *, workers: int = 1, client=None) -> Dataset:
    """Make a recipe's data set in a folder; go on where an earlier run was interrupted or killed.

    A record depends on the recipe and its index alone. Shards are written under another name and renamed when whole.
    Where a recipe says how many records are to be `kept`, the data set is the shortest run of records, from the first
    on, that has them.

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
        Those of a `dask_cuda.LocalCUDACluster` have a GPU each. Dask's own profiles of their last 1,000 seconds take up
        to 0.2 GB in each, or none where its configuration has distributed.worker.profile.enabled: false.

    Raises
    ------
    ValueError
        If this recipe cannot be made, before anything is: a word or token is missing or cut off, no layer has the
        height of `attention`, ...; or the folder holds other data, or is being made by another process.
    FileNotFoundError, ConnectionError
        If there is no such model or token file.
    OSError, RuntimeError
        If the disk is full (what is finished is kept), or workers died again and again.

    Warns
    -----
    UserWarning
        If fewer records are kept than the recipe wants, after all that it allows; it says why others were rejected.
    """
    out = Path(out)
    if type(workers) is not int or workers < 1:
        raise ValueError(f"workers={workers!r}: 1 makes everything in this process")
    try:
        if _is_new(out, recipe):
            check_words(recipe)
            client.submit(try_recipe, recipe, pure=False).result() if client else try_recipe(recipe)
        if not _is_finished(out):
            with _claimed(out, recipe):
                if not _is_finished(out):
                    _make(recipe, out, workers, client)
    finally:
        forget_models()
    if (out / _LOCK).exists():  # a finished data set may be where nobody can write
        (out / _LOCK).unlink(missing_ok=True)
    dataset = Dataset(out)
    if said := _too_few(dataset):
        warnings.warn(said, stacklevel=2)
    return dataset


def _too_few(dataset):
    """Say of what a data set has too few records, and why others were rejected; None where it has enough."""
    selection = Selection(dataset.recipe)
    for line in dataset.records:
        selection.count(line)
    if not selection.lacking:
        return None
    few = ", ".join(f"{n} of {selection.wanted[name]} {name}" for name, n in selection.lacking.items())
    reasons = count_reasons(line["reason"] for line in dataset.rejected)
    why = ", ".join(f"{reason} {count}" for reason, count in reasons.items()) or "none"
    made, hint = len(dataset) + len(dataset.rejected), "change prompts or filters, or allow more images"
    return f"{dataset.folder} lacks {few}, after all {made} images; rejected: {why}; {hint}"


class _Plan:
    """The shards that are missing or damaged, and whether those that are finished have all that is wanted."""

    def __init__(self, recipe: Recipe, out: Path):
        self.recipe, self.out = recipe, out
        (out / SHARDS).mkdir(exist_ok=True)
        (out / SHARDS / ENOUGH_FILE).unlink(missing_ok=True)  # of a maker that was killed
        self.missing = {number for number in range(recipe.shards) if not _is_whole(out, recipe, number)}
        for number in self.missing:
            shutil.rmtree(shard_folder(out, number), ignore_errors=True)
        self._selection, self._read, self._begun = Selection(recipe), 0, 0  # shards read, images begun
        wanted = sum(self._selection.wanted.values())
        done = len(recipe) - sum(map(self.count_images, self.missing))
        self.progress = tqdm(total=wanted or len(recipe), initial=0 if wanted else done, desc=out.name, unit="image")

    def count_images(self, number: int) -> int:
        return sum(map(len, self.recipe.batches(number)))

    def has_enough(self) -> bool:
        """Whether there is all that is wanted, in the shards up to the first that is missing."""
        selection, before = self._selection, sum(self._selection.counts.values())
        if not selection.wanted:
            return False
        while self._read < self.recipe.shards and self._read not in self.missing and not selection.is_enough:
            for line in read_lines(shard_folder(self.out, self._read) / "records.jsonl"):
                selection.judge(line)
                if selection.is_enough:
                    break
            self._read += 1
        self.progress.update(sum(selection.counts.values()) - before)
        if selection.is_enough:
            (self.out / SHARDS / ENOUGH_FILE).touch()
        return selection.is_enough

    def advance(self, count: int) -> None:
        """Show that images were made: as progress, or beside that of the records to keep."""
        if not self._selection.wanted:
            self.progress.update(count)
        else:
            self._begun += count
            self.progress.set_postfix(made=self._begun)

    def finish(self, number: int) -> None:
        """Note that a shard is there."""
        self.missing.discard(number)

    def run(self, submit: Callable[..., Future], most: Callable[[], float], jobs: dict[Future, int]) -> None:
        """Submit shards, so many at a time, and wait for them, until there is enough; `jobs` has those at work."""
        waiting, done = sorted(self.missing, reverse=True), SimpleQueue()
        while True:
            while waiting and len(jobs) < most() and not self.has_enough():
                number = waiting.pop()
                job = submit(make_shard, self.recipe, self.out.resolve(), number)
                jobs[job] = number
                job.add_done_callback(done.put)
            if not jobs:
                return
            job = done.get()
            self.advance(job.result())
            self.finish(jobs.pop(job))


def _make(recipe, out, workers, client):
    """Make the shards that are missing or damaged, as far as they are wanted, and put all of them together."""
    plan = _Plan(recipe, out)
    with plan.progress:
        try:
            if client is not None:
                _with_client(client, plan)
            elif workers > 1:
                forget_models()  # the workers have their own
                _with_processes(workers, plan)
            else:
                for number in sorted(plan.missing):
                    if plan.has_enough():
                        break
                    make_shard(recipe, out, number, plan.advance)
                    plan.finish(number)
            plan.has_enough()  # shows the last of them
            _finish(out, recipe)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            hint = f"the disk is full; what is finished is kept, free some space and run again: {out}"
            raise OSError(error.errno, hint) from error


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
    shard, indices = shard_folder(out, number), [index for batch in recipe.batches(number) for index in batch]
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


def _with_client(client, plan):
    def most():
        """All shards; where not all may be wanted, one more than there are threads, so that a cluster can grow."""
        return math.inf if plan.recipe.kept is None else sum(client.nthreads().values()) + 1

    jobs: dict[Future, int] = {}
    try:
        plan.run(partial(client.submit, pure=False), most, jobs)
    finally:
        client.cancel(list(jobs))


def _with_processes(workers, plan):
    deaths = 0
    while plan.missing and not plan.has_enough():
        before = len(plan.missing)
        spawn = get_context("spawn")
        begin = begin_worker, (spawn.Value("i"), visible_gpus())
        with patient_threads(), ProcessPoolExecutor(workers, spawn, *begin) as pool:
            try:  # the one more that waits for a process may be made though it is not wanted
                plan.run(pool.submit, lambda: workers + (plan.recipe.kept is None), {})
            except BrokenProcessPool:
                for number in [n for n in plan.missing if shard_folder(plan.out, n).exists()]:
                    plan.advance(plan.count_images(number))
                    plan.finish(number)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        deaths = deaths + 1 if len(plan.missing) == before else 0
        if deaths > _MAX_DEATHS:
            hint = 'out of memory? try fewer; called in a script? write `if __name__ == "__main__":` above the call'
            raise RuntimeError(f"workers died {deaths} times without finishing a shard: {hint}")


def _finish(out, recipe):
    """Sort the shards' records into accepted and rejected ones, write what describes them, and drop the shards.

    Every step can be done twice, so it may be cut off anywhere.
    """
    chosen = _choose(out, recipe)
    lines = [line for _, line in chosen]
    for folder in (*record_folders(recipe), "rejected"):
        (out / folder).mkdir(exist_ok=True)
    for shard, line in chosen:
        _move(shard, out, record_files(recipe, line["index"]), line["rejected"])
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


def _choose(out, recipe):
    """Return each shard's records, with its folder, up to the last one that is wanted, and why they are rejected."""
    selection, found = Selection(recipe), []
    for number in range(recipe.shards):
        shard = shard_folder(out, number)
        for line in read_lines(shard / "records.jsonl"):
            found.append((shard, line | {"rejected": selection.judge(line)}))
            if selection.is_enough:
                return found
    return found


def _as_rejected(line):
    kept = {key: line[key] for key in ("index", "prompt", "seed", "areas", "scores", "negative") if key in line}
    return {"file": _rejected_name(line["index"]), "reason": line["rejected"], **kept}


def _rejected_name(index):
    return f"rejected/{index:06d}.png"
