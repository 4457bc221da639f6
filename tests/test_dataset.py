"""Labeled data sets: recipes that are checked, labels by hand, files that repeat to the byte whatever happens."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

import attnlab as al
from attnlab.dataset import (
    Dataset,
    Filters,
    Recipe,
    difference_hash,
    export_coco,
    generate_dataset,
    label,
    making,
    verify_dataset,
)

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


def test_everything_that_is_wrong_is_said_at_once():
    with pytest.raises(ValueError) as error:
        Recipe(
            prompts=["a {place} at {time}"],
            lists={"place": [], "color": ["red"]},
            classes={"../fire": "fire", "smoke": ""},
            images=0,
            map="attention",
            mask={"method": "dbscan", "epsilon": 2},
            size=(60, 64),
            band=1.5,
            filters={"area": [0.9, 0.1]},
            scheduler="Euler",
            tokens="none.safetensors",
        )
    said = str(error.value)
    for part in (
        "{time}",
        "'place' is []",
        "'color' is in no prompt",
        "'../fire'",
        "'smoke' is labeled by ''",
        "images is 0",
    ):
        assert part in said
    for part in (
        "'attention'",
        "no epsilon; it has eps",
        "size is (60, 64)",
        "band is 1.5",
        "area",
        "'Euler'",
        "tokens",
    ):
        assert part in said
    assert said.count("\n- ") == 13


def test_recipes_are_yaml(tmp_path):
    path = FIRES.save(tmp_path / "fires.yaml")
    assert Recipe.load(path) == FIRES or Recipe.load(path).digest == FIRES.digest
    assert replace(FIRES, steps=5).digest != FIRES.digest
    text = path.read_text()
    for change, message in [
        (text.replace("images: 5", "image: 5"), "did you mean images?"),
        (text.replace("format: 1", "format: 2"), "has format 2, this attnlab reads 1: install a later one"),
        (text.replace("images: 5", "images: many"), "images is 'many'"),
        ("prompts: [a fire", "is not YAML"),
        ("- a fire", "is no recipe"),
        ("classes: {fire: fire}", "lacks prompts"),
        ("prompts: !!python/object/apply:os.getcwd []", "is not YAML"),
    ]:
        path.write_text(change)
        with pytest.raises(ValueError, match=r"fires\.yaml") as error:
            Recipe.load(path)
        assert message in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"no recipe .*missing\.yaml"):
        Recipe.load(tmp_path / "missing.yaml")


def test_words_are_looked_for_before_anything_is_made(tmp_path):
    wrong = replace(FIRES, classes={"fire": "fire", "water": "water"})
    with pytest.raises(ValueError, match="class 'water': no prompt has the word 'water'"):
        generate_dataset(wrong, tmp_path / "wrong")
    twice = replace(FIRES, prompts=("a {thing} with fire and fire and smoke",))
    with pytest.raises(ValueError, match="'fire' is 2 times in 'a burning house"):
        generate_dataset(twice, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


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


def test_pairs_are_what_the_pipeline_draws_and_its_maps_say(fires, pipe):
    assert len(fires) == 10 and fires.rejected == [] and fires.classes == ["background", "fire", "smoke"]
    with al.record(pipe) as recording:
        drawn = pipe([FIRES.prompt(i) for i in (4, 5)], generator=[al.seed(4), al.seed(5)],
                     num_inference_steps=4, guidance_scale=4.0).images  # fmt: skip
    for k, i in enumerate((4, 5)):
        image, labels, line = fires[i]
        assert np.abs(np.asarray(image, int) - np.asarray(drawn[k], int)).max() <= 1
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


def test_a_finished_data_set_is_left_as_it_is(fires):
    before = {path: path.stat().st_mtime_ns for path in fires.folder.rglob("*")}
    assert len(generate_dataset(FIRES, fires.folder)) == 10
    assert {path: path.stat().st_mtime_ns for path in fires.folder.rglob("*")} == before
    with pytest.raises(ValueError, match=r"holds a run with other settings .*recipe\.yaml"):
        generate_dataset(replace(FIRES, seed=1), fires.folder)
    with pytest.raises(ValueError, match="has other files: name a new or empty folder"):
        generate_dataset(FIRES, fires.folder / "images")


def at_first_progress(monkeypatch, action):
    """Do something once, when the first shard is through."""
    todo = [action]
    monkeypatch.setattr(making.tqdm, "update", lambda self, count: todo.pop()() if todo else None)


@pytest.mark.parametrize("kill", [False, True])
def test_processes_change_no_byte(fires, tmp_path, monkeypatch, kill):
    if kill:
        workers = psutil.Process().children
        at_first_progress(
            monkeypatch, lambda: [p.kill() for p in workers() if "spawn_main" in " ".join(p.cmdline())][:1]
        )
    assert contents(generate_dataset(FIRES, tmp_path / "fires", workers=2).folder) == contents(fires.folder)


def test_killed_at_any_moment_it_goes_on(tmp_path):
    """SIGKILL ten times, at a random moment of the work each, then to the end."""
    recipe = replace(FIRES, images=25)
    whole = generate_dataset(recipe, tmp_path / "whole").folder
    path, out = recipe.save(tmp_path / "recipe.yaml"), tmp_path / "fires"
    line = f"from attnlab.dataset import *; generate_dataset(Recipe.load({str(path)!r}), {str(out)!r})"
    rng, killed = np.random.default_rng(0), 0
    for _ in range(10):
        job = subprocess.Popen([sys.executable, "-c", line], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while job.poll() is None and not list(out.glob(f"{making.SHARDS}/*.partial-{job.pid}")):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))
        killed += job.poll() is None
        job.send_signal(signal.SIGKILL)
        job.wait()
    assert killed == 10 and not (out / "metadata.jsonl").exists()
    assert contents(generate_dataset(recipe, out).folder) == contents(whole)


@pytest.mark.parametrize("step", ["rename", "write_text", "write_lines", "replace"])
def test_cut_off_while_it_is_put_together(fires, tmp_path, monkeypatch, step):
    out = tmp_path / "fires"
    with monkeypatch.context() as patch:
        whole = making._finish

        def cut(out, recipe):
            calls = iter(range(1000))

            def once(function):
                def wrapped(*args, **named):
                    if next(calls) == 1:
                        raise KeyboardInterrupt
                    return function(*args, **named)

                return wrapped

            with monkeypatch.context() as inner:
                if step in ("rename", "replace"):
                    inner.setattr(f"pathlib.Path.{step}", once(getattr(__import__("pathlib").Path, step)))
                else:
                    inner.setattr(making, step, once(getattr(making, step)))
                whole(out, recipe)
                raise KeyboardInterrupt

        patch.setattr(making, "_finish", cut)
        with pytest.raises(KeyboardInterrupt):
            generate_dataset(FIRES, out)
    assert contents(generate_dataset(FIRES, out).folder) == contents(fires.folder)


def test_a_full_disk_leaves_nothing_corrupt(fires, tmp_path, monkeypatch):
    whole, calls = making.write_record, iter(range(100))

    def full(*args):
        if next(calls) == 7:
            raise OSError(28, "No space left on device")
        return whole(*args)

    with monkeypatch.context() as patch:
        patch.setattr(making, "write_record", full)
        with pytest.raises(OSError, match="the disk is full; what is finished is kept"):
            generate_dataset(FIRES, tmp_path / "fires")
    assert len(list((tmp_path / "fires" / making.SHARDS).glob("?????"))) == 1
    with pytest.raises(FileNotFoundError, match="it is not finished: generate_dataset goes on"):
        Dataset(tmp_path / "fires")
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
    found = generate_dataset(replace(FIRES, images=1, attention=8, classes=classes, **change), tmp_path / "other")
    assert len(found) == 2 and 0 < (found[0].labels == 1).mean() < 0.9


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
    assert (found[1].labels == 1).mean() > 0.02
    with pytest.raises(ValueError, match="has no token 'your tree'; it has my tree"):
        generate_dataset(replace(recipe, classes={"tree": "your tree"}), tmp_path / "other")


def test_verify_names_what_is_wrong(tmp_path):
    recipe = replace(FIRES, images=4)
    folder = generate_dataset(recipe, tmp_path / "fires").folder
    assert verify_dataset(folder) == []
    (folder / "images/000000.png").unlink()
    cut = folder / "images/000001.png"
    cut.write_bytes(cut.read_bytes()[:200])
    edited = Image.open(folder / "masks/000002.png")
    edited.putpixel((3, 3), 2 if edited.getpixel((3, 3)) != 2 else 1)
    edited.save(folder / "masks/000002.png")
    Image.open(folder / "masks/000003.png").resize((32, 32)).save(folder / "masks/000003.png")
    other = Image.open(folder / "masks/000004.png")
    other.putpixel((0, 0), 77)
    other.save(folder / "masks/000004.png")
    (folder / "images/stray.png").write_bytes(b"")
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    moved = json.loads(lines[5]) | {"file_name": "../outside.png"}
    lines[5] = json.dumps(moved)
    (folder / "metadata.jsonl").write_text("\n".join(lines[:7]) + "\n")
    problems = "\n".join(verify_dataset(folder))
    for said in (
        "images/000000.png is missing",
        "images/000001.png is cut short or no image",
        "masks/000002.png was altered",
        "masks/000003.png is 32 x 32, its image 64 x 64",
        "masks/000004.png has numbers of no class",
        "../outside.png lies outside the data set",
        "images/stray.png is in no line of metadata.jsonl",
        "name 7 records, the recipe 8",
    ):
        assert said in problems


def test_coco_reads_the_export(fires, tmp_path):
    coco = COCO(export_coco(fires, tmp_path / "coco.json"))
    assert len(coco.imgs) == 10 and [c["name"] for c in coco.cats.values()] == ["fire", "smoke"]
    whole = np.zeros((64, 64), np.uint8)
    for annotation in coco.loadAnns(coco.getAnnIds(imgIds=4)):
        mask = coco.annToMask(annotation)
        assert annotation["area"] == mask.sum()
        whole[mask > 0] = annotation["category_id"]
    np.testing.assert_array_equal(whole, fires[3].labels)


def test_memory_does_not_grow_with_the_steps_or_images(pipe):
    few, many = (len(list(making._make_batch(replace(FIRES, steps=n), range(2)))) for n in (2, 8))
    assert few == many == 2
    with al.record(pipe, **al.dataset.labeling.streaming(FIRES)) as recording:
        pipe(FIRES.prompt(0), num_inference_steps=8, generator=al.seed(0))
    assert not recording.trace.queries and torch.is_tensor(next(iter(recording.trace.streamed[None].values())))


@pytest.mark.parametrize("kill", [False, True])
def test_dask_workers_change_no_byte(fires, tmp_path, kill, monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        if kill:
            victim = next(iter(cluster.workers.values())).pid
            at_first_progress(monkeypatch, lambda: os.kill(victim, signal.SIGKILL))
        found = generate_dataset(FIRES, tmp_path / "fires", client=client)
    assert contents(found.folder) == contents(fires.folder)
