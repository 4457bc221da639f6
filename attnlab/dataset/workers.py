"""Processes that make shards: a GPU for each, threads that leave cores to the others, an end with their maker's."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import parent_process
from multiprocessing.sharedctypes import Synchronized
from threading import Thread

import torch

__all__ = ["begin_worker", "patient_threads", "visible_gpus"]


def visible_gpus() -> list[str]:
    """Return what CUDA_VISIBLE_DEVICES may name, of the GPUs that this process sees."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]


def begin_worker(begun: Synchronized, gpus: list[str]) -> None:
    """Give this process a GPU of its own, in turn where there are fewer; let it end with the one that began it.

    Parameters
    ----------
    begun : synchronized int
        Number of processes begun before this one, which all of them share.
    gpus : list of str
        As `visible_gpus` gives them.
    """
    if gpus:
        with begun.get_lock():
            os.environ["CUDA_VISIBLE_DEVICES"] = gpus[begun.value % len(gpus)]
            begun.value += 1

    def wait():
        parent_process().join()
        os._exit(1)

    Thread(target=wait, daemon=True).start()


@contextmanager
def patient_threads() -> Iterator[None]:
    """Let processes begun in this block have threads that sleep while they wait: others would fight for cores."""
    before = os.environ.get("OMP_WAIT_POLICY")
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    try:
        yield
    finally:
        os.environ.pop("OMP_WAIT_POLICY")
        os.environ.update({} if before is None else {"OMP_WAIT_POLICY": before})
