"""Measure on a GPU what recording costs there, and that it changes nothing; nothing is downloaded.

    python -m experiments.gpu_check            # some minutes on one GPU; prints, and writes results/gpu.json
    python -m experiments.gpu_check --small    # the same steps on the CPU with narrow models, to try this program

For models of the exact geometry of Stable Diffusion 1.5 and XL and of FLUX's blocks, with random weights: time, peak
memory and bytes of every way of recording, in turn with plain generation; whether latents are equal to the last bit;
how often the program waits for the GPU in the middle of a generation, and how many operations it starts a step, beyond
what plain generation does; and how far maps that are computed on the GPU are from those of the CPU.
"""

import argparse
import json
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

import attnlab as al
from attnlab.pipelines import best_device, has_bfloat16
from attnlab.storage import versions, write_text

from .studies.random_weights import flux, stable_diffusion_2_base, stable_diffusion_15, stable_diffusion_xl

__all__ = ["Operations", "check", "main"]

TEXT = "a burning house with fire and smoke"
_RESULTS = Path(__file__).parent / "results" / "gpu.json"


def _modes(pipe, device, height):
    """Return every way of recording: what `record` is given; height is that of self-attention's maps."""
    if hasattr(pipe, "transformer"):
        return {
            "plain": None,
            "first step": {"keep": "maps", "steps": 0},  # what it costs to listen
            "maps": {"keep": "maps"},
            "maps of all attention": {"keep": "maps", "share": "joint"},
            "maps and calls": {},
        }
    return {
        "plain": None,
        "queries": {"keep": "queries"},
        "queries on the device": {"keep": "queries", "device": device},
        "sum": {"keep": "sum"},
        "maps": {"keep": "maps"},
        "contributions": {"keep": "contributions"},
        "maps of a text": {"texts": TEXT},
        "self-attention": {"keep": "sum", "self_attention": height},
    }


class _Turn(NamedTuple):
    """One generation: its seconds and bytes, and what came of it."""

    seconds: float
    peak: int  # bytes on the device, beyond what was there before
    stalls: int  # waits for the device from the second step on
    latents: torch.Tensor
    recording: al.Recording | None


class _Stalls:
    """Count how often a program waits for a GPU, from the end of a generation's first step to that of its last."""

    def __init__(self, on: bool, steps: int):
        self.on, self.last, self.count = on, steps - 1, 0

    def __call__(self, pipe, step, timestep, kwargs):
        if self.on and step in (0, self.last):
            torch.cuda.set_sync_debug_mode("warn" if step == 0 and self.last else "default")
        return kwargs

    @contextmanager
    def counted(self) -> Iterator[None]:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                yield
            finally:
                if self.on:
                    torch.cuda.set_sync_debug_mode("default")
        self.count = sum("synchronizing" in str(one.message) for one in said)


class Operations(TorchDispatchMode):
    """Count the operations that a program starts, all but views: where the GPU is quicker, they are what takes time."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        aliases = [given.alias_info for given in function._schema.returns]
        self.count += not any(alias is not None and not alias.is_write for alias in aliases)
        return function(*args, **(kwargs or {}))


def _operations(pipe, device, kept, size):
    """Return how many operations a step starts: those of a third one, for the first has more."""
    counts = []
    for steps in (2, 3):
        with Operations() as found:
            _turn(pipe, device, kept, steps, size)
        counts.append(found.count)
    return counts[1] - counts[0]


def _turn(pipe, device, kept, steps, size, count=False) -> _Turn:
    """Generate once, as a user would; with `count` stalls are counted, which takes time of its own."""
    on_gpu = device.type == "cuda"
    call = {"num_inference_steps": steps, "guidance_scale": 7.5, "height": size, "width": size, "output_type": "latent"}
    stalls = _Stalls(on_gpu and count, steps)
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    clock = time.perf_counter if on_gpu else time.process_time  # other work on the CPU is not this program's
    before, start = torch.cuda.memory_allocated() if on_gpu else 0, clock()
    recorded = nullcontext() if kept is None else al.record(pipe, **kept)
    with stalls.counted() if count else nullcontext(), recorded as recording:
        latents = pipe(TEXT, generator=al.seed(0), callback_on_step_end=stalls, **call).images
    if on_gpu:
        torch.cuda.synchronize()
    seconds = clock() - start
    peak = torch.cuda.max_memory_allocated() - before if on_gpu else 0
    return _Turn(seconds, peak, stalls.count, latents, recording)


def check(pipe, device: torch.device, steps: int, rounds: int, size: int, height: int) -> dict:
    """Measure every way of recording a pipeline, in turn with plain generation.

    Returns {"steps": ..., "seconds a step": ..., "bit exact": ..., "modes": {mode: {"time ratio": [median, least,
    most], "peak bytes": ..., "kept bytes": ..., "stalls beyond plain": ..., "operations a step beyond plain": ...}},
    "maps": {...}}.
    """
    pipe.set_progress_bar_config(disable=True)
    modes = _modes(pipe, device, height)
    turns = {mode: [] for mode in modes}
    expected = _turn(pipe, device, None, steps, size).latents  # warms up, too
    plain = _turn(pipe, device, None, steps, size, count=True).stalls
    stalls = {mode: _turn(pipe, device, kept, steps, size, count=True).stalls - plain for mode, kept in modes.items()}
    started = {mode: _operations(pipe, device, kept, size) for mode, kept in modes.items()}
    exact, kept = True, {}
    for r in tqdm(range(rounds), desc="rounds"):
        for mode in np.roll(list(modes), r):
            turn = _turn(pipe, device, modes[mode], steps, size)
            exact = exact and torch.equal(turn.latents, expected)
            turns[mode].append((turn.seconds, turn.peak))
            kept[mode] = turn.recording.nbytes if turn.recording else 0
            del turn
    seconds = {mode: np.array(turns[mode])[:, 0] for mode in modes}
    rows = {}
    for mode in modes:
        ratios = seconds[mode] / seconds["plain"]
        rows[mode] = {
            "time ratio": [round(float(value), 4) for value in (np.median(ratios), ratios.min(), ratios.max())],
            "peak bytes": int(max(peak for _, peak in turns[mode])),
            "kept bytes": kept[mode],
            "stalls beyond plain": stalls[mode],
            "operations a step beyond plain": started[mode] - started["plain"],
        }
    found = {"steps": steps, "rounds": rounds, "size": size, "bit exact": bool(exact)}
    found["seconds a step"] = float(np.median(seconds["plain"]) / steps)
    maps = _maps(pipe, device, size) if "queries" in modes else {}
    found |= {"stalls of plain": plain, "operations a step of plain": started["plain"]}
    return found | {"modes": rows, "maps": maps}


def _maps(pipe, device, size):
    """Return the largest difference of maps that are computed on the device, relative to the CPU's maximum."""
    there, here = (
        _turn(pipe, device, {"keep": "queries", "device": where}, 2, size).recording for where in (device, "cpu")
    )
    found = {
        "daam": lambda one: al.daam(one).values,
        "ovam": lambda one: al.ovam(one, "a tree and a car").values,
        "contributions": lambda one: al.contributions(one).values,
        "linear_daam": lambda one: al.linear_daam(one)["smoke"],
    }
    differences = {}
    for name, compute in found.items():
        values, expected = compute(there), compute(here)
        differences[name] = float(abs(values - expected).max() / abs(expected).max())
    return differences


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="narrow models and small images: a minute on a CPU")
    parser.add_argument("--steps", type=int, default=10, help="of a generation")
    parser.add_argument("--rounds", type=int, default=7, help="turns of every way of recording")
    parser.add_argument("--out", type=Path, default=_RESULTS, help="file of the results")
    given = parser.parse_args(arguments)
    device = torch.device(best_device())
    if device.type == "cpu" and not given.small:
        parser.error("torch sees no GPU here (attnlab check says why); --small tries this program on the CPU")
    if given.small:
        sizes, height, options = {stable_diffusion_2_base: 64, stable_diffusion_xl: 128, flux: 256}, 4, {"narrow": 8}
    else:
        sizes, height = {stable_diffusion_15: 512, stable_diffusion_xl: 1024, flux: 1024}, 32
        options = {"dtype": torch.bfloat16 if has_bfloat16(device) else torch.float16}
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    found = {"card": card, "cuda": torch.version.cuda, "versions": versions(), "models": {}}
    for make, size in sizes.items():
        pipe = make(**options).to(device)
        found["models"][make.__name__] = check(pipe, device, given.steps, given.rounds, size, height)
        write_text(given.out, json.dumps(found, indent=1) + "\n")  # after each, so that an interrupted run keeps some
        _show(make.__name__, found["models"][make.__name__])
        del pipe
    print(given.out)


def _show(name, found):
    print(f"{name}: {1000 * found['seconds a step']:.1f} ms a step, latents bit-exact in all: {found['bit exact']}")
    print(f"plain generation waits for the device {found['stalls of plain']} times after its first step")
    print(f"and starts {found['operations a step of plain']} operations a step")
    print(f"{'':22} time/plain (least to most)   peak       kept       stalls, operations beyond plain")
    for mode, row in found["modes"].items():
        median, least, most = row["time ratio"]
        sizes = f"{row['peak bytes'] / 1e6:8.1f} MB {row['kept bytes'] / 1e6:8.1f} MB"
        counts = f"{row['stalls beyond plain']:6} {row['operations a step beyond plain']:6}"
        print(f"{mode:22} {median:.3f} ({least:.3f} to {most:.3f}) {sizes} {counts}")
    print("maps on the device against the CPU's:", *(f"{k} {v:.1e}" for k, v in found["maps"].items()))


if __name__ == "__main__":
    main()
