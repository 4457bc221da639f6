"""Labeled data sets: recipes that are checked, labels by hand, files that repeat to the byte whatever happens."""

import errno
import hashlib
import os
import shutil
import signal
import threading
import time
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from export_readers import MAPS, OBJECTS, check_objects
from PIL import Image

import attnlab as al
from attnlab.dataset import (
    Dataset,
    Filters,
    Recipe,
    difference_hash,
    generate_dataset,
    label,
    making,
    shards,
    verify_dataset,
    workers,
)
from attnlab.maps.heatmaps import upscale

OPEN = Filters(area=None, flat=None, blank=None, duplicates=None)
FIRES = Recipe(
    prompts=["a {thing} with fire and smoke"],
    lists={"thing": ["burning house", "burning tree"]},
    classes={"fire": "fire", "smoke": "smoke"},
    images=5,
    steps=4,
    batch=2,
    shard=2,
    filters=OPEN,
)


def contents(folder):
    """Hash of every file, by name."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def fires(tmp_path_factory):
    return generate_dataset(FIRES, tmp_path_factory.mktemp("made") / "fires")


def test_records_are_named_by_prompt_and_seed():
    assert len(FIRES) == 10 and FIRES.shards == 3
    assert FIRES.prompt(4) == "a burning house with fire and smoke"
    assert FIRES.prompt(5) == "a burning tree with fire and smoke"
    assert [FIRES.seed_of(i) for i in (0, 9)] == [0, 9]
    assert FIRES.batches(0) == [range(0, 2), range(2, 4)] and FIRES.batches(2) == [range(8, 10)]
    every = Recipe(prompts=["{b} {a}"], lists={"a": ["x", "y"], "b": ["u", "v"]}, classes={"u": "u"}).texts
    assert every == ["u x", "u y", "v x", "v y"]


def ramp(columns=10):
    return np.tile(np.arange(columns, dtype=float), (columns, 1))


def test_overlaps_go_to_the_class_that_is_farther_above_its_own_cut():
    recipe = replace(FIRES, mask={"method": "threshold", "level": 0.5})
    image = np.random.default_rng(0).integers(0, 255, (10, 10, 3), dtype=np.uint8)
    found = label({"fire": ramp(), "smoke": 100 * np.full((10, 10), 1.0) - 5 * ramp()}, image, recipe)
    np.testing.assert_array_equal(found.masks["fire"][0], [0] * 5 + [1] * 5)  # at least 4.5
    assert found.masks["smoke"].all()  # 55 and more, of 100
    # margins: fire (x - 5) / 4; smoke (100 - 5x - 55) / 45 = 1 - x / 9
    np.testing.assert_array_equal(found.labels[0], [2] * 7 + [1] * 3)
    assert found.areas == {"fire": 0.3, "smoke": 0.7} and found.rejected is None


def test_the_band_around_a_cut_is_ignored():
    recipe = replace(FIRES, classes={"fire": "fire"}, mask={"method": "threshold", "level": 0.5}, band=0.3)
    image = np.random.default_rng(0).integers(0, 255, (10, 10, 3), dtype=np.uint8)
    found = label({"fire": ramp()}, image, recipe)
    np.testing.assert_array_equal(found.labels[0], [0] * 4 + [255] * 3 + [1] * 3)


@pytest.mark.parametrize(
    ("filters", "heat", "image", "reason"),
    [
        ({"blank": 4.0}, ramp(), np.full((10, 10, 3), 9, np.uint8), "blank image"),
        ({"flat": 0.2}, np.full((10, 10), 5.0) + 0.01 * ramp(), None, "flat map of fire"),
        ({"area": (0.05, 0.4)}, ramp(), None, "mask too large"),
        ({"area": (0.7, 0.9)}, ramp(), None, "mask too small"),
        ({}, np.zeros((10, 10)), None, "no mask of fire"),
        ({}, ramp(), None, None),
    ],
)
def test_filters_say_why(filters, heat, image, reason):
    recipe = replace(FIRES, mask={"method": "otsu"}, classes={"fire": "fire"}, filters=replace(OPEN, **filters))
    image = np.random.default_rng(0).integers(0, 255, (10, 10, 3), dtype=np.uint8) if image is None else image
    assert label({"fire": heat}, image, recipe).rejected == reason


def test_a_token_may_find_nothing():
    recipe = replace(FIRES, classes={"fire": "fire"}, map="linear", mask={"method": "zero"})
    image = np.random.default_rng(0).integers(0, 255, (10, 10, 3), dtype=np.uint8)
    found = label({"fire": -1 - ramp()}, image, recipe)
    assert found.rejected is None and not found.labels.any()
    bounded = replace(recipe, filters=replace(OPEN, area=(0.05, 0.95)))
    assert label({"fire": -1 - ramp()}, image, bounded).rejected == "mask too small"


def drawn(pipe, recipe, records=(0, 1)):
    """Images of these records, as the pipeline alone draws them."""
    prompts, seeds = [recipe.prompt(i) for i in records], [al.seed(recipe.seed_of(i)) for i in records]
    return pipe(prompts, generator=seeds, num_inference_steps=recipe.steps, guidance_scale=recipe.guidance).images


def test_pairs_are_what_the_pipeline_draws_and_its_maps_say(fires, pipe):
    assert len(fires) == 10 and fires.rejected == [] and fires.classes == ["background", "fire", "smoke"]
    with al.record(pipe) as recording:
        images = drawn(pipe, FIRES, (4, 5))
    for k, i in enumerate((4, 5)):
        image, labels, line = fires[i]
        assert np.abs(np.asarray(image, int) - np.asarray(images[k], int)).max() <= 1
        mask = al.otsu_mask(al.daam(recording[k]).upscale(64)["smoke"])
        assert al.metrics.iou(labels == 2, mask & (labels != 1)) > 0.98
        assert line["seed"] == i and line["areas"]["smoke"] == pytest.approx((labels == 2).mean(), abs=1e-4)
        assert line["sha256"]["image"] == hashlib.sha256((fires.folder / line["file_name"]).read_bytes()).hexdigest()


def test_datasets_reads_the_folder_as_it_is(fires, tmp_path):
    datasets = pytest.importorskip("datasets")
    found = datasets.load_dataset("imagefolder", data_dir=str(fires.folder), cache_dir=str(tmp_path))["train"]
    assert len(found) == 10 and found[3]["prompt"] == FIRES.prompt(3)
    np.testing.assert_array_equal(np.asarray(found[3]["mask"]), fires[3].labels)
    np.testing.assert_array_equal(np.asarray(found[3]["image"]), np.asarray(fires[3].image))


def test_the_card_shows_pairs(fires):
    assert "contact_sheet.png" in (fires.folder / "README.md").read_text()
    sheet = np.asarray(Image.open(fires.folder / "contact_sheet.png"))
    assert sheet.shape == (3 * 68, 4 * 132, 3)  # ten pairs of 64 pixels, four in a row, with 4 pixels between
    image, labels, _ = fires[5]  # the second of the second row
    left, right = sheet[68:132, 132:196], sheet[68:132, 196:260]
    np.testing.assert_array_equal(left, np.asarray(image))
    np.testing.assert_array_equal((left != right).any(-1) | (labels == 0), np.ones((64, 64)))
    np.testing.assert_array_equal(right[labels == 0], left[labels == 0])


def test_a_finished_data_set_is_left_as_it_is(fires, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in fires.folder.rglob("*")}

    def read_only(self, missing_ok=False):
        raise OSError(errno.EROFS, "Read-only file system", str(self))  # which has no such file, either

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", read_only)
        assert len(generate_dataset(FIRES, fires.folder)) == 10
    assert {path: path.stat().st_mtime_ns for path in fires.folder.rglob("*")} == before
    with pytest.raises(ValueError, match=r"holds a run with other settings .*recipe\.yaml"):
        generate_dataset(replace(FIRES, seed=1), fires.folder)
    with pytest.raises(ValueError, match="has other files: name a new or empty folder"):
        generate_dataset(FIRES, fires.folder / "images")


def at_first_progress(monkeypatch, action):
    """Do something once, when the first shard is through; bars of the pipeline itself have no name."""
    todo = [action]
    monkeypatch.setattr(
        making.tqdm, "update", lambda self, count=1: todo.pop()() if todo and getattr(self, "desc", "") else None
    )


def make(recipe, out, target=generate_dataset, **options):
    """Make a data set in a process of its own, which is forked from one that has all imports done."""
    context = get_context("forkserver")
    context.set_forkserver_preload([making.__name__])
    process = context.Process(target=target, args=(recipe, out), kwargs=options)
    process.start()
    return process


def wait_for(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_killed_at_any_moment_it_goes_on(tmp_path):
    """SIGKILL ten times, at a random moment of the work each, then to the end."""
    recipe = replace(FIRES, images=15, threads=1)
    whole = generate_dataset(recipe, tmp_path / "whole").folder
    out, rng, killed = tmp_path / "fires", np.random.default_rng(0), 0
    for _ in range(10):
        before, maker = set(out.glob(f"{making.SHARDS}/*.partial-*")), make(recipe, out)
        wait_for(lambda: not maker.is_alive() or set(out.glob(f"{making.SHARDS}/*.partial-*")) - before)  # noqa: B023
        time.sleep(rng.uniform(0, 0.4))
        killed += maker.is_alive()
        maker.kill()
        maker.join()
    assert killed == 10 and not (out / "metadata.jsonl").exists()
    assert contents(generate_dataset(recipe, out).folder) == contents(whole)


def test_a_maker_of_two_processes_is_killed_and_goes_on(fires, tmp_path):
    out = tmp_path / "fires"
    maker = make(FIRES, out, workers=2)
    wait_for(lambda: list(out.glob(f"{making.SHARDS}/*.partial-*")))
    workers = psutil.Process(maker.pid).children(recursive=True)
    maker.kill()
    maker.join()
    psutil.wait_procs(workers, timeout=60)
    assert len(workers) >= 2 and not any(worker.is_running() for worker in workers)  # none is left with its model
    assert not (out / "metadata.jsonl").exists()
    assert contents(generate_dataset(FIRES, out).folder) == contents(fires.folder)


def test_a_worker_that_is_killed_is_replaced(fires, tmp_path, monkeypatch):
    workers = psutil.Process().children
    at_first_progress(monkeypatch, lambda: [p.kill() for p in workers() if "spawn_main" in " ".join(p.cmdline())][:1])
    assert contents(generate_dataset(FIRES, tmp_path / "fires", workers=2).folder) == contents(fires.folder)


def test_workers_that_die_at_once_say_what_to_write(tmp_path, monkeypatch):
    """As they do in a script whose call they read again."""

    def die(*_):
        raise making.BrokenProcessPool

    monkeypatch.setattr(making._Plan, "run", die)
    with pytest.raises(RuntimeError, match=r"died 4 times .*: out of memory\? .* write `if __name__ == \"__main__\":`"):
        generate_dataset(FIRES, tmp_path / "fires", workers=2)


def test_two_makers_of_one_folder(fires, tmp_path):
    """The second one is refused and does no harm, and a killed one holds nothing."""
    out = tmp_path / "fires"
    maker = make(FIRES, out)
    wait_for(lambda: list(out.glob(f"{making.SHARDS}/*.partial-*")))
    os.kill(maker.pid, signal.SIGSTOP)
    try:
        with pytest.raises(ValueError, match="fires is being made by another process: wait for it, or name another"):
            generate_dataset(FIRES, out)
        assert list(out.glob(f"{making.SHARDS}/*.partial-*"))
    finally:
        maker.kill()
        maker.join()
    assert contents(generate_dataset(FIRES, out).folder) == contents(fires.folder)


def die_at_the_recipe(recipe, out):
    """Make a data set, and be killed when half of its recipe is written."""

    def die(part, content):
        with open(part, "wb") as file:
            file.write(content[:20])
        os.kill(os.getpid(), signal.SIGKILL)

    Path.write_bytes = die
    generate_dataset(recipe, out)


def test_killed_while_its_recipe_is_written(fires, tmp_path):
    out = tmp_path / "fires"
    maker = make(FIRES, out, target=die_at_the_recipe)
    maker.join()
    assert maker.exitcode == -signal.SIGKILL
    assert {path.name.partition("-")[0] for path in out.iterdir()} == {making._LOCK, ".recipe.yaml.part"}
    shutil.copytree(fires.folder, tmp_path / "other")
    (tmp_path / "other/recipe.yaml").unlink()
    with pytest.raises(ValueError, match="has other files"):
        generate_dataset(FIRES, tmp_path / "other")
    assert contents(generate_dataset(FIRES, out).folder) == contents(fires.folder)


@pytest.fixture(scope="module")
def unfinished(fires, tmp_path_factory):
    """All shards, not put together."""
    out = tmp_path_factory.mktemp("made") / "unfinished"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(making, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            generate_dataset(FIRES, out)
    return out


def interrupting(function, calls, last):
    """Wrap a function: the call of this number is an interrupt."""

    def wrapped(*given, **named):
        if next(calls) == last:
            raise KeyboardInterrupt
        return function(*given, **named)

    return wrapped


def test_cut_off_while_it_is_put_together(fires, unfinished, tmp_path, monkeypatch):
    """Before each file that is moved, written or deleted."""
    whole = {place: getattr(*place) for place in ((Path, "replace"), (Path, "rename"), (shutil, "rmtree"))}
    for cuts in count():
        out, calls = shutil.copytree(unfinished, tmp_path / str(cuts)), count()
        with monkeypatch.context() as patch:
            for place, function in whole.items():
                patch.setattr(*place, interrupting(function, calls, cuts))
            try:
                generate_dataset(FIRES, out)
                break
            except KeyboardInterrupt:
                pass
        assert contents(generate_dataset(FIRES, out).folder) == contents(fires.folder)
    assert cuts > 25


def rewrite(path, change):
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    "damage",
    [
        lambda shard: (shard / "images/000004.png").unlink(),
        lambda shard: rewrite(shard / "images/000005.png", lambda data: data[:100]),
        lambda shard: rewrite(shard / "masks/000006.png", lambda data: data[:-30] + bytes(30)),
        lambda shard: (shard / "records.jsonl").unlink(),
        lambda shard: rewrite(shard / "records.jsonl", lambda data: data[:-100]),
        lambda shard: rewrite(shard / "records.jsonl", lambda data: data[: data.index(b"\n") + 1]),
        lambda shard: rewrite(shard / "records.jsonl", lambda data: data.replace(b"tree", b"bush")),
        lambda shard: rewrite(shard / "records.jsonl", lambda data: b"[]\n" + data),
        lambda shard: rewrite(shard / "records.jsonl", lambda data: data.replace(b"images/000004", b"../../000004")),
        lambda shard: rewrite(shard / "records.jsonl", lambda data: data + b"\xff\n"),
    ],
)
def test_a_damaged_shard_is_made_again(fires, unfinished, tmp_path, damage):
    out = shutil.copytree(unfinished, tmp_path / "fires")
    damage(out / making.SHARDS / "00001")
    whole = (out / making.SHARDS / "00000/images/000000.png").stat().st_mtime_ns
    assert contents(generate_dataset(FIRES, out).folder) == contents(fires.folder)
    assert (out / "images/000000.png").stat().st_mtime_ns == whole


def test_a_full_disk_leaves_nothing_corrupt(fires, tmp_path, monkeypatch):
    whole, calls = shards.write_record, iter(range(100))

    def full(*args):
        if next(calls) == 7:
            raise OSError(28, "No space left on device")
        return whole(*args)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_record", full)
        with pytest.raises(OSError, match="the disk is full; what is finished is kept"):
            generate_dataset(FIRES, tmp_path / "fires")
    assert len(list((tmp_path / "fires" / making.SHARDS).glob("?????"))) == 1
    with pytest.raises(FileNotFoundError, match=r"it is not finished: `attnlab dataset make .* goes on, or generate"):
        Dataset(tmp_path / "fires")
    (said,) = verify_dataset(tmp_path / "fires")
    assert said.startswith(f"it is not finished: `attnlab dataset make {tmp_path / 'fires'}` goes on")
    assert contents(generate_dataset(FIRES, tmp_path / "fires").folder) == contents(fires.folder)


def test_near_duplicates_are_rejected(tmp_path, fires):
    same = replace(FIRES, images=2, filters=replace(OPEN, duplicates=64))
    found = generate_dataset(same, tmp_path / "same")
    assert len(found) == 1 and {line["reason"] for line in found.rejected} == {"near duplicate of 000000"}
    assert sorted(p.name for p in (found.folder / "rejected").iterdir()) == [f"{i:06d}.png" for i in (1, 2, 3)]
    assert len(list((found.folder / "masks").iterdir())) == 1 and verify_dataset(found.folder) == []
    assert "- near duplicate: 3" in (found.folder / "README.md").read_text()
    image = fires[0].image
    brighter = Image.fromarray(np.uint8(np.clip(np.asarray(image) * 0.9, 0, 255)))
    assert (difference_hash(image) ^ difference_hash(brighter)).bit_count() <= 4
    assert (difference_hash(image) ^ difference_hash(image.transpose(0))).bit_count() > 10


def test_a_mask_file_for_each_class(tmp_path):
    recipe = replace(FIRES, images=1, labels=False)
    found = generate_dataset(recipe, tmp_path / "masks")
    assert set(found[0].labels) == {"fire", "smoke"} and found[0].labels["fire"].dtype == bool
    assert (found.folder / "masks/000000_smoke.png").exists() and verify_dataset(found.folder) == []


@pytest.mark.parametrize("change", [{"map": "ovam"}, {"map": "linear"}, {"propagate": 1}, {"negative": "night"}])
def test_other_maps(tmp_path, fires, change):
    classes = {"fire": "flames"} if change.get("map") else {"fire": "fire"}
    found = generate_dataset(replace(FIRES, images=1, classes=classes, **change), tmp_path / "other")
    assert len(found) == 2 and 0 < (found[0].labels == 1).mean() < 0.9


def test_the_self_attention_asked_for_propagates(tmp_path, levels):
    """Of another height than the largest, and of a model in a folder."""
    levels.save_pretrained(tmp_path / "model")
    recipe = replace(FIRES, model=str(tmp_path / "model"), images=1, propagate=1, attention=8)
    found = generate_dataset(recipe, tmp_path / "other")
    with al.record(levels, self_attention=8) as recording:
        drawn(levels, recipe)
    maps = al.propagate(al.daam(recording[1]), *recording[1].self_attention(8))
    mask = al.otsu_mask(upscale(maps["smoke"], (64, 64), "bicubic"))
    assert al.metrics.iou(found[1].labels == 2, mask & (found[1].labels != 1)) > 0.98


def test_learned_tokens_label(tmp_path):
    scenes = al.scenes.street.render_with("tree", 4)
    pipe = al.load_pipeline("tiny", device="cpu")
    recording = al.record_image(pipe, [s.image for s in scenes], [s.caption for s in scenes], generator=al.seed(0))
    token = al.fit_token(list(recording), [s.mask("tree") for s in scenes], "tree", name="my tree")
    path = al.TokenLibrary([token]).save(tmp_path / "tokens.safetensors")
    recipe = replace(
        FIRES, images=1, classes={"tree": "my tree"}, map="linear", tokens=str(path), mask={"method": "zero"}
    )
    found = generate_dataset(recipe, tmp_path / "trees")
    with al.record(pipe, keep="sum") as recording:
        drawn(pipe, recipe)
    mask = upscale(al.linear_daam(recording[1])[token], (64, 64), "bilinear") > 0
    assert mask.any() and al.metrics.iou(found[1].labels == 1, mask) > 0.98
    with pytest.raises(ValueError, match="has no token 'your tree'; it has my tree"):
        generate_dataset(replace(recipe, classes={"tree": "your tree"}), tmp_path / "other")
    path.unlink()
    assert len(Dataset(found.folder)) == 2  # what is made needs them no more
    with pytest.raises(FileNotFoundError, match=r"no file .*tokens.safetensors"):
        generate_dataset(recipe, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("form", OBJECTS)
def test_readers_of_exports_get_every_object(fires, tmp_path, form):
    check_objects(fires, OBJECTS[form](fires, tmp_path))


@pytest.mark.parametrize("form", MAPS)
def test_readers_of_exports_get_the_labels(fires, tmp_path, form):
    for name, read in MAPS[form](fires, tmp_path).items():
        np.testing.assert_array_equal(read, fires[int(name)].labels)


def test_memory_does_not_grow_with_the_steps_or_images(pipe):
    few, many = (shards._draw(replace(FIRES, steps=n), range(2))[1] for n in (2, 8))
    assert few.nbytes == many.nbytes and len(few) == 2
    with al.record(pipe, **al.dataset.labeling.streaming(FIRES)) as recording:
        pipe(FIRES.prompt(0), num_inference_steps=8, generator=al.seed(0))
    assert not recording.trace.queries and torch.is_tensor(next(iter(recording.trace.streamed[None].values())))


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_batch_is_written_while_the_next_one_is_drawn(tmp_path, monkeypatch, device):
    """By a thread beside a GPU, and what is drawn waits for it; a CPU writes each as it comes."""
    draw, write, order, drawn = shards._draw, shards._write, [], threading.Semaphore(0)

    def drawing(recipe, batch, **call):
        assert torch.get_num_threads() == recipe.threads == 2
        order.append("draw")
        result = draw(recipe, batch, **call)
        drawn.release()
        return result

    def writing(*given):
        assert torch.get_num_threads() == 1 and drawn.acquire(timeout=60)  # this batch's own
        if device == "cuda" and order.count("write") < batches - 1:
            assert drawn.acquire(timeout=60)  # the next one is drawn before this one is written
            drawn.release()
        order.append("write")
        return write(*given)

    recipe = replace(FIRES, shard=3, threads=2)
    batches = len(recipe.batches(0))
    (tmp_path / making.SHARDS).mkdir()
    monkeypatch.setattr(shards, "_draw", drawing)
    monkeypatch.setattr(shards, "_write", writing)
    monkeypatch.setattr(shards, "_device", lambda recipe: device)
    shards.make_shard(recipe, tmp_path, 0)
    shards.forget_models()
    beside = ["draw", *["draw", "write"] * (batches - 1), "write"]
    assert batches == 3 and order == (["draw", "write"] * batches if device == "cpu" else beside)


@pytest.mark.parametrize("gpus, given", [(["4", "7"], ["4", "7", "4"]), ([], ["unset"] * 3)])
def test_workers_have_gpus_of_their_own(monkeypatch, gpus, given):
    monkeypatch.setattr(workers, "Thread", lambda **options: SimpleNamespace(start=lambda: None))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(gpus) or "unset")
    begun = SimpleNamespace(value=0, get_lock=nullcontext)
    assert not gpus or workers.visible_gpus() == gpus
    found = []
    for _ in given:
        workers.begin_worker(begun, gpus)
        found.append(os.environ["CUDA_VISIBLE_DEVICES"])
    assert found == given


@pytest.fixture
def dask(monkeypatch):
    """dask(processes): a client of two workers with two threads each."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    distributed = pytest.importorskip("distributed")
    with ExitStack() as stack:

        def start(processes):
            options = {"n_workers": 2, "threads_per_worker": 2, "dashboard_address": None, "processes": processes}
            cluster = stack.enter_context(distributed.LocalCluster(**options))
            return stack.enter_context(distributed.Client(cluster))

        yield start


def test_dask_workers_of_two_threads_are_killed_and_go_on(fires, tmp_path, monkeypatch, dask):
    client = dask(processes=True)

    def end():
        os.kill(next(iter(client.cluster.workers.values())).pid, signal.SIGKILL)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        at_first_progress(patch, end)
        with pytest.raises(KeyboardInterrupt):
            generate_dataset(FIRES, tmp_path / "fires", client=client)
    assert contents(generate_dataset(FIRES, tmp_path / "fires", client=client).folder) == contents(fires.folder)


def test_threads_of_one_process_share_its_model(fires, tmp_path, dask):
    found = generate_dataset(FIRES, tmp_path / "fires", client=dask(processes=False))
    assert contents(found.folder) == contents(fires.folder)
