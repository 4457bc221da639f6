"""Run many trainings in processes of one thread and keep each result in a file, so that interrupted ones go on."""

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import stats
from tqdm import tqdm

from attnlab.storage import replacing

__all__ = ["Job", "mean_and_interval", "run_jobs"]

Job = tuple[object, ...]  # arguments of one training: texts and whole numbers


def run_jobs(function: Callable[..., object], jobs: Sequence[Job], folder: str | Path, workers: int = 2) -> list:
    """Return `function(*job)` of each job in order, read from `folder` where it was computed before.

    The function must be picklable, its results JSON. Each process has one thread, so that results do not depend on the
    number of workers: one worker is this process. Workers end when this process is killed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    missing = [job for job in jobs if not _file(folder, job).exists()]
    if workers == 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for job in tqdm(missing, desc=folder.name):
                _keep(function, folder, job)
        finally:
            torch.set_num_threads(threads)
        return [json.loads(_file(folder, job).read_text()) for job in jobs]
    with ProcessPoolExecutor(workers, get_context("spawn"), _begin_worker) as pool:
        submitted = [pool.submit(partial(_keep, function, folder), job) for job in missing]
        try:
            for done in tqdm(submitted, desc=folder.name):
                done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [json.loads(_file(folder, job).read_text()) for job in jobs]


def _begin_worker():
    """Give a worker one thread, and end it with its parent: else it would go on beside the one that is started next."""
    torch.set_num_threads(1)
    parent = parent_process()
    Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _keep(function, folder, job):
    result = json.dumps(function(*job))
    with replacing(_file(folder, job)) as part:
        part.write_text(result)


def _file(folder, job):
    return folder / f"{' '.join(f'{x:04d}' if isinstance(x, int) else x or 'nothing' for x in job)}.json"


def mean_and_interval(values: ArrayLike) -> tuple[float, float, float]:
    """Return the mean of a few independent values (one per random seed), and its 95% interval by Student's t.

    One value has no interval: its ends are NaN.

    Examples
    --------
    >>> [round(value, 2) for value in mean_and_interval([1, 2, 3])]
    [2.0, -0.48, 4.48]
    """
    values = np.asarray(values, dtype=float)
    mean = float(np.mean(values))
    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)) if len(values) > 1 else np.nan
    return mean, mean - half, mean + half
