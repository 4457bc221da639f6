"""Measure how data sets of many records are made and read: the same bytes whoever is killed, time, and memory.

Pairs of `tiny` are made by one process, by two of which one is killed, and by two workers of a Dask cluster, with two
threads each, of which one is killed. All files of all folders are compared. Then a data set of many records, whose
files are links to a few small ones, is read, searched for near duplicates, split and exported, each in a process of its
own. And images are drawn plainly and as a data set in turn, by one process that has the model already.

    python -m experiments.studies.dataset_scale                            # on 2 idle cores: some 20 minutes
    python -m experiments.studies.dataset_scale --pairs 100 --records 1000

Folders are kept in --work: the same call goes on after an interruption, and measures again what was cut off.
"""

import argparse
import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING

import numpy as np
import psutil
import torch
from PIL import Image
from scipy.stats import linregress
from tqdm import tqdm

from attnlab.dataset import Dataset, Filters, Recipe, export_coco, export_yolo, generate_dataset, split_dataset
from attnlab.dataset.keeping import Selection
from attnlab.dataset.labeling import Labeling
from attnlab.dataset.records import SHARDS, as_lines, write_record
from attnlab.dataset.shards import make_shard
from attnlab.pipelines import load_pipeline, seed
from attnlab.storage import write_text

if TYPE_CHECKING:
    import distributed

__all__ = [
    "RUNS",
    "STAGES",
    "begin_cluster",
    "fit_memory",
    "hash_files",
    "main",
    "make_index",
    "measure_making",
    "measure_rate",
]
__all__ += ["measure_stage", "recipe_of"]

RUNS = ("processes", "dask", "one")  # two processes, one killed; two workers of a cluster, one killed; one, left alone
_KILLED_AT = 0.25  # of the shards
_FORMS = 50  # records whose files are different
_RESULTS = Path(__file__).parents[1] / "results" / "dataset_scale.json"
_PAIRS = Recipe(
    prompts=["a burning {thing} with fire and smoke {when}", "water and a {thing} {when}"],
    lists={
        "thing": ["house", "tree", "car", "building", "tower"],
        "when": ["at night", "at dusk", "in winter", "on a sunny day"],
    },
    classes={"fire": "fire", "smoke": "smoke", "water": "water"},
    steps=2,
    threads=1,
    filters=Filters(area=None, flat=None, blank=None, duplicates=None),
)


def _make(how, recipe, folder):
    """Make a data set in one of the ways, from one process."""
    if how == "dask":
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        with begin_cluster() as client:
            generate_dataset(recipe, folder, client=client)
    else:
        generate_dataset(recipe, folder, workers={"processes": 2, "one": 1}[how])


@contextmanager
def begin_cluster() -> Iterator["distributed.Client"]:
    """Begin two workers of Dask, with two threads each; yield their client."""
    import dask
    from distributed import Client, LocalCluster

    with (
        dask.config.set({"distributed.worker.profile.enabled": False}),  # its samples would be all that grows
        LocalCluster(n_workers=2, threads_per_worker=2, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        yield client


def recipe_of(pairs: int) -> Recipe:
    """Return the recipe of so many pairs, in steps of its 40 prompts."""
    return replace(_PAIRS, images=max(1, -(-pairs // len(_PAIRS.texts))))


def measure_making(how: str, recipe: Recipe, folder: Path) -> dict:
    """Make a data set in one of `RUNS`; return all files' common hash, who was killed, and memory as records came."""
    maker = get_context("spawn").Process(target=_make, args=(how, recipe, folder))
    begun, trace, killed = time.time(), [], None
    maker.start()
    while maker.is_alive():
        maker.join(0.5)
        shards = len(list(folder.glob(f"{SHARDS}/?????")))
        if killed is None and how != "one" and shards >= _KILLED_AT * recipe.shards and _kill_worker(maker.pid):
            killed = shards
        if shards:
            trace.append((shards * recipe.batch * recipe.shard, _memory(maker.pid)))
    if maker.exitcode:
        raise RuntimeError(f"the maker ended with {maker.exitcode}: run this again, it goes on")
    made = {"seconds": round(time.time() - begun, 1), "killed after shards": killed, **hash_files(folder)}
    return made | {"memory": fit_memory(trace[len(trace) // 2 :]), "trace MB": _thinned(trace)}


def _kill_worker(pid):
    """Kill the largest process that a maker began to work for it; return whether there was one."""
    sizes = {
        one: _ask(one, "memory_info")
        for one in _family(pid)[1:]
        if "spawn_main" in " ".join(_ask(one, "cmdline") or [])
    }
    workers = [one for one, size in sizes.items() if size]
    if workers:
        max(workers, key=lambda one: sizes[one].rss).kill()
    return bool(workers)


def _family(pid):
    """List a process and all that it began."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _ask(process, what):
    """Ask a process that may be gone."""
    try:
        return getattr(process, what)()
    except psutil.Error:
        return None


def _memory(pid):
    return sum(info.rss for one in _family(pid) if (info := _ask(one, "memory_info"))) / 1e6


def fit_memory(trace: list[tuple[int, float]]) -> dict:
    """Fit a line to memory (MB) over thousands of records; samples depend on one another, so its interval is narrow."""
    if len({made for made, _ in trace}) < 3:
        return {"samples": len(trace)}
    line = linregress([made / 1000 for made, _ in trace], [mb for _, mb in trace])
    ends = [round(line.slope + k * 1.96 * line.stderr, 2) for k in (-1, 1)]
    return {"samples": len(trace), "MB per 1000 records": round(line.slope, 2), "95% interval": ends}


def _thinned(trace):
    kept = np.unique(np.linspace(0, len(trace) - 1, min(len(trace), 100)).astype(int)) if trace else []
    return [[trace[i][0], round(trace[i][1])] for i in kept]


def measure_rate(recipe: Recipe, rounds: int, folder: Path) -> dict:
    """Draw the first shard of a recipe plainly and as a data set, in turn: seconds of each, and the rate of the second.

    The rate is that of images a second, over plain drawing: median of the rounds, least and most.
    """
    pipe, threads = load_pipeline(recipe.model), torch.get_num_threads()
    pipe.set_progress_bar_config(disable=True)

    def plain():
        for batch in recipe.batches(0):
            noise = [seed(recipe.seed_of(i)) for i in batch]
            pipe(
                [recipe.prompt(i) for i in batch],
                generator=noise,
                num_inference_steps=recipe.steps,
                guidance_scale=recipe.guidance,
            )

    def whole():
        rmtree(folder, ignore_errors=True)
        (folder / SHARDS).mkdir(parents=True)
        make_shard(recipe, folder, 0)

    ways, spent = {"plain": plain, "data set": whole}, {"plain": [], "data set": []}
    torch.set_num_threads(recipe.threads)
    for turn in tqdm(range(rounds + 1), "rate", unit="round"):
        for name in sorted(ways, reverse=turn % 2 == 0):
            begun = time.perf_counter()
            ways[name]()
            spent[name] += [time.perf_counter() - begun] if turn else []  # the first round loads and warms up
    torch.set_num_threads(threads)
    rates = np.divide(spent["plain"], spent["data set"])
    seconds = {name: round(float(np.median(values)), 3) for name, values in spent.items()}
    images = sum(map(len, recipe.batches(0)))
    return {"images": images, "rounds": rounds, "seconds": seconds} | {
        "rate": [round(float(found), 4) for found in (np.median(rates), rates.min(), rates.max())]
    }


def hash_files(folder: Path) -> dict:
    """Return how many files a folder has, and one hash of the names and contents of all."""
    whole, names = hashlib.sha256(), sorted(path for path in folder.rglob("*") if path.is_file())
    for path in names:
        whole.update(
            f"{path.relative_to(folder).as_posix()} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode()
        )
    return {"files": len(names), "sha256 of all": whole.hexdigest()}


def make_index(folder: Path, count: int, seed: int = 0) -> None:
    """Write a data set of many records: lines of their own, and files that are links to those of a few records."""
    recipe = replace(recipe_of(count), filters=Filters(area=None, duplicates=2))
    rng, lines, first = np.random.default_rng(seed), [], {}
    for name in ("images", "masks", "rejected"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index in tqdm(range(len(recipe)), "index", unit="record"):
        form = index % _FORMS if index >= _FORMS else None
        if form is None:
            pixels, labels = rng.integers(0, 256, (64, 64, 3), np.uint8), np.zeros((64, 64), np.uint8)
            for number in (1, 2, 3):
                row, column = rng.integers(0, 40, 2)
                labels[row : row + 20, column : column + 20] = number
            areas = {name: float((labels == i).mean()) for i, name in enumerate(recipe.classes, 1)}
            made = write_record(
                folder, recipe, index, Image.fromarray(pixels), Labeling(labels, {}, areas, areas, None, None)
            )
            first[index] = {key: value for key, value in made.items() if key != "rejected"}
        else:
            for name in ("images", "masks"):
                target = folder / name / f"{index:06d}.png"
                if not target.exists():
                    os.link(folder / name / f"{form:06d}.png", target)
        own = {"file_name": f"images/{index:06d}.png", "index": index, "mask_file_name": f"masks/{index:06d}.png"}
        own |= {
            "prompt": recipe.prompt(index),
            "seed": recipe.seed_of(index),
            "hash": f"{int(rng.integers(2**63)):016x}",
        }
        lines.append(first[index if form is None else form] | own)
    recipe.save(folder / "recipe.yaml")
    write_text(folder / "rejected.jsonl", "")
    write_text(folder / "metadata.jsonl", as_lines(lines))


def _find_duplicates(dataset, work):
    selection = Selection(dataset.recipe)
    return sum(selection.judge(line | {"rejected": None}) is not None for line in dataset.records)


def _split(dataset, work):
    return {name: len(part) for name, part in split_dataset(dataset, within=None).items()}


STAGES: dict[str, Callable] = {
    "read": lambda dataset, work: len(dataset),
    "near duplicates": _find_duplicates,
    "split": _split,
    "COCO": lambda dataset, work: export_coco(dataset, work / "coco.json").stat().st_size,
    "COCO polygons": lambda dataset, work: export_coco(dataset, work / "polygons.json", polygons=True).stat().st_size,
    "YOLO": lambda dataset, work: len(list(export_yolo(dataset, work / "yolo").glob("labels/*/*"))),
}
"""What is done with a data set that was read, in a folder to write to."""


def _run(name, folder, work, answers):
    warnings.simplefilter("ignore", UserWarning)
    before, begun, wall = _peak(), time.process_time(), time.time()
    found = STAGES[name](Dataset(folder), work)
    spent = {"CPU seconds": round(time.process_time() - begun, 1), "seconds": round(time.time() - wall, 1)}
    answers.put({"found": found, **spent, "peak MB": round(_peak()), "MB of imports": round(before)})


def _peak():
    """Return the most memory that this process had, in MB; `getrusage` would begin with that of its maker."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1e3


def measure_stage(name: str, folder: Path, work: Path) -> dict:
    """Do one of `STAGES` in a process of its own, reading included: time, and its peak of memory beside imports'."""
    context = get_context("spawn")
    answers = context.Queue()
    worker = context.Process(target=_run, args=(name, folder, work, answers))
    worker.start()
    found = answers.get()
    worker.join()
    return found


def main(argv: list[str] | None = None) -> None:
    """Measure, print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pairs", type=int, default=2000, help="pairs of each run (2000; steps of 40)")
    parser.add_argument("--runs", nargs="*", choices=RUNS, default=RUNS, help=f"({' '.join(RUNS)})")
    parser.add_argument("--records", type=int, default=100_000, help="records of the index; 0: none (100000)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of plain drawing and data set; 0: none (9)")
    parser.add_argument("--work", type=Path, default=Path("runs/dataset_scale"), help="folder of what is made")
    parser.add_argument("--out", type=Path, default=_RESULTS, help="the file of results")
    args = parser.parse_args(argv)
    recipe = recipe_of(args.pairs)
    result: dict = {"recipe": asdict(recipe), "pairs": len(recipe), "runs": {}, "records": args.records, "stages": {}}
    for how in args.runs:
        path = args.work / f"{how}-{len(recipe)}.json"
        if not path.exists():
            write_text(path, json.dumps(measure_making(how, recipe, args.work / f"{how}-{len(recipe)}")))
        result["runs"][how] = json.loads(path.read_text("utf-8"))
        print(how, {key: value for key, value in result["runs"][how].items() if key != "trace MB"}, flush=True)
    result["same bytes"] = len({run["sha256 of all"] for run in result["runs"].values()}) <= 1
    print("same bytes:", result["same bytes"])
    index = args.work / f"index-{args.records}"
    if args.records and not (index / "metadata.jsonl").exists():
        make_index(index, args.records)
    for name in STAGES if args.records else ():
        result["stages"][name] = measure_stage(name, index, args.work)
        print(name, result["stages"][name], flush=True)
    if args.rounds:
        drawn = replace(recipe_of(40), steps=20, threads=torch.get_num_threads(), shard=4)
        result["rate"] = measure_rate(drawn, args.rounds, args.work / "rate")
        print("rate", result["rate"])
    write_text(args.out, json.dumps(result, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
