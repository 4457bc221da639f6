"""Many trainings in processes of one thread, the result of each kept in a file: interrupted, they go on."""

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from tqdm.auto import tqdm

Arm = tuple[object, ...]


def claim(folder: Path, study) -> dict:
    """Make a folder a study's, a dataclass; its settings. ValueError where it holds one with other settings."""
    settings, path = json.loads(json.dumps(asdict(study))), folder / "study.json"
    if path.exists() and json.loads(path.read_text()) != settings:
        raise ValueError(f"{folder} holds a study with other settings (see study.json): name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings))
    return settings


def run_arms(job: Callable[..., object], arms: Sequence[Arm], folder: str | Path, workers: int = 2) -> list:
    """`job(*arm)` of each arm, a picklable function with a JSON result, in the order of the arms.

    One thread each, so that results do not depend on the number of workers. What has a file in `folder` is not done
    again.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    missing = [arm for arm in arms if not _file(folder, arm).exists()]
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        jobs = [pool.submit(partial(_keep, job, folder), arm) for arm in missing]
        try:
            for done in tqdm(jobs, desc="segmenters"):
                done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [json.loads(_file(folder, arm).read_text()) for arm in arms]


def mean_and_interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float, float]:
    """Mean over seeds, (seed,), and its confidence interval by Student's t; NaN for that of one seed."""
    half = stats.t.ppf((1 + level) / 2, len(values) - 1) * stats.sem(values) if len(values) > 1 else np.nan
    return float(np.mean(values)), float(np.mean(values) - half), float(np.mean(values) + half)


def _keep(job, folder, arm):
    result = json.dumps(job(*arm))
    part = _file(folder, arm).with_suffix(".part")
    part.write_text(result)
    part.replace(_file(folder, arm))


def _file(folder, arm):
    return folder / f"{' '.join(f'{x:04d}' if isinstance(x, int) else x or 'nothing' for x in arm)}.json"
