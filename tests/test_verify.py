"""Data sets that were damaged, altered or made to mislead: everything is listed, nothing outside the folder is read."""

import json
import os
import shutil
import subprocess
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from attnlab.dataset import (
    Dataset,
    Filters,
    Labeling,
    Recipe,
    export_coco,
    generate_dataset,
    making,
    records,
    shards,
    verify_dataset,
)

OLD = Path(__file__).parent / "data/commit_879ad02"
RECIPE = Recipe(
    prompts=["a {thing} with fire and smoke"],
    lists={"thing": ["burning house", "burning tree"]},
    classes={"fire": "fire", "smoke": "smoke"},
    images=4,
    steps=2,
    filters=Filters(area=None, flat=None, blank=None, duplicates=None),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return generate_dataset(RECIPE, tmp_path_factory.mktemp("made") / "fires")


@pytest.fixture(scope="module")
def rejecting(made, tmp_path_factory):
    """With a mask for each class; accepted are the first record and what is as far from it as the farthest one."""
    first, *others = (int(pair.metadata["hash"], 16) for pair in made)
    farthest = max((first ^ other).bit_count() for other in others)
    recipe = replace(RECIPE, labels=False, filters=replace(RECIPE.filters, duplicates=farthest - 1))
    return generate_dataset(recipe, tmp_path_factory.mktemp("made") / "rejecting")


def edit(folder, name, number, /, **change):
    """Change a line of a file."""
    path = folder / name
    lines = path.read_text("utf-8").split("\n")
    lines[number] = json.dumps(json.loads(lines[number]) | change)
    path.write_text("\n".join(lines), "utf-8")


def test_verify_names_what_is_wrong(made, tmp_path):
    folder = shutil.copytree(made.folder, tmp_path / "fires")
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


def test_a_whole_one_has_no_problem(made, rejecting):
    assert verify_dataset(made.folder) == verify_dataset(rejecting.folder) == []
    assert 1 < len(rejecting) < 8 == len(rejecting) + len(rejecting.rejected)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt": "a cat"}, "record 1: prompt is 'a cat', by recipe.yaml 'a burning house with fire and smoke'"),
        ({"seed": 7}, "record 1: seed is 7, by recipe.yaml 1"),
        ({"words": {"fire": "sun"}}, "record 1: words is {'fire': 'sun'}, by recipe.yaml {'fire': 'fire'"),
        ({"recipe": "0" * 16}, "records were made by recipe 0000000000000000, recipe.yaml is "),
        ({"areas": {"fire": 0.999, "smoke": 0.001}}, "images/000001.png: the area of fire is 0.999, by its mask 0."),
        ({"areas": {"fire": "all"}}, "images/000001.png: the area of fire is 'all', by its mask"),
        ({"areas": {}}, "images/000001.png: the area of "),
        ({"hash": "0" * 16}, "images/000001.png: hash is '0000000000000000', which is not its image's"),
        ({"scores": {"fire": 0.9, "smoke": 0.9}}, "metadata.jsonl was altered"),
        ({"similarity": 0.9}, "metadata.jsonl was altered"),
        ({"sha256": {}}, "images/000001.png was altered"),
        ({"index": 2}, "images/000001.png stands for images/000002.png"),
        ({"index": 99}, "a line has index 99: the recipe makes 8 records"),
        ({"index": -1}, "a line has index -1"),
        ({"index": "1"}, "metadata.jsonl, line 2: it is no record with index, prompt, seed"),
        ({"file_name": "images/000003.png"}, "images/000003.png stands for images/000001.png"),
        ({"file_name": "/etc/hostname"}, "/etc/hostname lies outside the data set"),
        ({"file_name": "images/\0"}, "is no name of a file"),
        ({"file_name": "x" * 5000}, "is no name of a file"),
        ({"file_name": "images"}, "images is missing"),
    ],
)
@pytest.mark.parametrize("kind", ["made", "rejecting"])
def test_an_altered_line_is_listed(kind, request, tmp_path, change, said):
    folder = shutil.copytree(request.getfixturevalue(kind).folder, tmp_path / "set")
    if kind == "rejecting":  # its lines have other numbers
        edit(folder, "metadata.jsonl", 0, **change)
        assert verify_dataset(folder)
    else:
        edit(folder, "metadata.jsonl", 1, **change)
        assert any(said in problem for problem in verify_dataset(folder))


def cut(path):
    """Take the last line from a file."""
    path.write_text("".join(path.read_text().splitlines(True)[:-1]))


def bomb(path, side):
    """Write a PNG of a few kilobytes that says it has many pixels."""

    def chunk(kind, data):
        return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)

    header = side.to_bytes(4) * 2 + bytes([1, 0, 0, 0, 0])
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10**6))))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda x: (x / "metadata.jsonl").unlink(), "metadata.jsonl cannot be read"),
        (lambda x: (x / "rejected.jsonl").unlink(), "rejected.jsonl cannot be read"),
        (lambda x: (x / "rejected/mine.png").write_bytes(b""), "rejected/mine.png is in no line of rejected.jsonl"),
        (lambda x: (x / "recipe.yaml").unlink(), "no recipe "),
        (lambda x: (x / "recipe.yaml").write_bytes(b"\xff"), "it is not YAML"),
        (lambda x: (x / "recipe.yaml").open("a").write("# mine\n"), "recipe.yaml was altered"),
        (lambda x: replace(RECIPE, seed=5).save(x / "recipe.yaml"), "recipe.yaml is "),
        (lambda x: (x / "metadata.jsonl").open("a").write("{"), "metadata.jsonl, line "),
        (lambda x: (x / "metadata.jsonl").open("a").write("[" * 99999), "it is no JSON"),
        (lambda x: (x / "metadata.jsonl").open("a").write("[]\n"), "it is no record with"),
        (lambda x: (x / "metadata.jsonl").open("ab").write(b"\xff\n"), "it is no JSON"),
        (lambda x: (x / "rejected.jsonl").write_text("7\n"), "rejected.jsonl, line 1: it is no record"),
        (lambda x: (x / "bad.json").write_text('{"a": 1}'), "bad.json is no list of file names"),
        (lambda x: (x / "bad.json").write_text("["), "bad.json is no JSON"),
        (lambda x: (x / "bad.json").write_text("[[]]"), "bad.json is no list of file names"),
        (lambda x: (x / "bad.json").write_text('["0.png"]'), "bad.json names '0.png', which is no image"),
        (lambda x: (x / "SHA256SUMS").write_text("nothing\n"), "is missing"),
        (lambda x: (x / "SHA256SUMS").write_text(""), "SHA256SUMS has no line of recipe.yaml: take it from a copy or"),
        (lambda x: cut(x / "SHA256SUMS"), "SHA256SUMS has no line of rejected/"),
        (lambda x: (x / "SHA256SUMS").unlink(), "SHA256SUMS is missing, as in data sets of early versions"),
        (lambda x: bomb(next((x / "images").iterdir()), 30_000), "no image: Image size (900000000 pixels) exceeds"),
        (lambda x: bomb(next((x / "masks").iterdir()), 11_000), "no image: Image size (121000000 pixels) exceeds"),
        (lambda x: next((x / "images").iterdir()).write_bytes(b"GIF89a" + bytes(99)), "cut short or no image"),
        (lambda x: next((x / "masks").iterdir()).write_bytes(b""), "cut short or no image"),
        (lambda x: next((x / "rejected").iterdir()).unlink(), "is missing"),
        (lambda x: next((x / "rejected").iterdir()).write_bytes(b"BM"), "was altered"),
        (lambda x: edit(x, "rejected.jsonl", 0, prompt="a cat"), "prompt is 'a cat'"),
        (lambda x: edit(x, "rejected.jsonl", 0, file="../x.png"), "../x.png lies outside the data set"),
        (lambda x: edit(x, "rejected.jsonl", 0, reason="blank image"), "rejected.jsonl was altered"),
    ],
)
def test_damage_is_listed_and_never_raised(rejecting, tmp_path, damage, said):
    folder = shutil.copytree(rejecting.folder, tmp_path / "set")
    damage(folder)
    assert any(said in problem for problem in verify_dataset(folder))


def test_nothing_there_is_listed_too(tmp_path):
    assert "no recipe" in verify_dataset(tmp_path / "nothing")[0]


@pytest.mark.parametrize("name", ["../secret.png", "{tmp}/secret.png", "images/link.png", "linked/secret.png"])
def test_files_outside_are_not_read(made, tmp_path, name):
    folder, secret = shutil.copytree(made.folder, tmp_path / "set"), tmp_path / "secret.png"
    shutil.copy(made.folder / "images/000001.png", secret)
    (folder / "images/link.png").symlink_to(secret)
    (folder / "linked").symlink_to(tmp_path)
    name = name.format(tmp=tmp_path)
    for column in ("file_name", "mask_file_name"):
        edit(folder, "metadata.jsonl", 1, **{column: name})
        dataset = Dataset(folder)
        for read in (lambda: dataset[1], lambda: export_coco(dataset, tmp_path / "coco.json")):  # noqa: B023
            with pytest.raises(ValueError, match="lies outside the data set"):
                read()
        assert any("lies outside the data set" in problem for problem in verify_dataset(folder))
    assert dataset[0].image.size == (64, 64) and not (tmp_path / "coco.json").exists()


def test_a_link_that_stays_inside_is_read_and_one_that_comes_later_is_seen(made, tmp_path):
    folder = shutil.copytree(made.folder, tmp_path / "set")
    (folder / "images/000000.png").rename(folder / "moved.png")
    (folder / "images/000000.png").symlink_to("../moved.png")
    (folder / "masks").rename(folder / "moved")
    (folder / "masks").symlink_to("moved")
    assert verify_dataset(folder) == [] and Dataset(folder)[1].labels.any()
    (folder / "moved").rename(tmp_path / "moved")
    (folder / "masks").unlink()
    dataset = Dataset(folder)
    with pytest.raises(FileNotFoundError, match=r"masks/000001.png is missing"):
        dataset[1]
    (folder / "masks").symlink_to(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"masks/000001.png lies outside the data set"):
        dataset[1]


def test_a_pipe_is_no_image(made, tmp_path):
    folder = shutil.copytree(made.folder, tmp_path / "set")
    (folder / "images/000000.png").unlink()
    os.mkfifo(folder / "images/000000.png")
    with pytest.raises(FileNotFoundError, match=r"images/000000.png is missing"):
        Dataset(folder)[0]


def test_a_damaged_data_set_says_so_when_it_is_read(made, tmp_path):
    folder = shutil.copytree(made.folder, tmp_path / "set")
    for name, content, message in (
        ("bad.json", "7", "bad.json is no list of file names"),
        ("bad.json", "[", "bad.json is no JSON"),
        ("rejected.jsonl", "[]\n", "rejected.jsonl, line 1: it is no record with"),
        ("metadata.jsonl", '"text"\n', "metadata.jsonl, line 1: it is no record with"),
        ("metadata.jsonl", "{}\n", "metadata.jsonl, line 1: it is no record with"),
        ("metadata.jsonl", "{", "metadata.jsonl, line 1: it is no JSON"),
    ):
        (folder / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            Dataset(folder)


def test_slices_are_lists_of_pairs(made):
    assert [pair.metadata["index"] for pair in made[1:3]] == [1, 2] and made[8:] == []
    np.testing.assert_array_equal(made[-1:][0].labels, made[7].labels)


def test_a_class_may_be_called_as_the_image_is(tmp_path):
    recipe = replace(RECIPE, images=1, classes={"image": "fire", "mask": "smoke"}, labels=False)
    found = generate_dataset(recipe, tmp_path / "image")
    assert verify_dataset(found.folder) == [] and list(found[0].labels) == ["image", "mask"]
    datasets = pytest.importorskip("datasets")
    shown = datasets.load_dataset("imagefolder", data_dir=str(found.folder), cache_dir=str(tmp_path))["train"]
    np.testing.assert_array_equal(np.asarray(shown[0]["image_mask"]) > 0, found[0].labels["image"])
    np.testing.assert_array_equal(np.asarray(shown[0]["image"]), np.asarray(found[0].image))


def test_records_from_a_million_on(tmp_path):
    """Their names have a digit more, and those of their shards may have one too."""
    recipe = replace(RECIPE, images=10**6, batch=5, shard=1, classes={"1 fire": "fire", "smoke": "smoke"}, labels=False)
    number, image = recipe.shards - 1, Image.new("RGB", (8, 8))
    assert number == 399_999
    shard = shards.shard_folder(tmp_path, number)
    for folder in ("images", "masks"):
        (shard / folder).mkdir(parents=True)
        (tmp_path / folder).mkdir()
    (tmp_path / "rejected").mkdir()
    labels = Labeling(np.zeros((8, 8), np.uint8), {}, {}, {}, None, None)
    lines = [records.write_record(shard, recipe, i, image, labels) for i in recipe.batches(number)[0]]
    (shard / "records.jsonl").write_text(records.as_lines(lines))
    assert making._is_whole(tmp_path, recipe, number)
    for line, rejected in zip(lines, (True, False, False, False, False), strict=True):
        making._move(shard, tmp_path, records.record_files(recipe, line["index"]), rejected)
    assert [path.name for path in (tmp_path / "rejected").iterdir()] == ["1999995.png"]
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == [
        f"{i}.png" for i in range(1999996, 2000000)
    ]
    assert (tmp_path / "masks/1999999_1_fire.png").exists() and making._is_whole(tmp_path, recipe, number)


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="needs sha256sum")
def test_what_is_said_of_missing_sums_can_be_typed(rejecting, tmp_path):
    for k, made in enumerate((rejecting.folder, OLD / "dataset_masks")):
        folder = shutil.copytree(made, tmp_path / f"a set {k}")
        (folder / "SHA256SUMS").unlink(missing_ok=True)
        (said,) = verify_dataset(folder)
        subprocess.run(said.partition(", type ")[2], shell=True, check=True)
        assert verify_dataset(folder) == []
        edit(folder, "metadata.jsonl", 0, scores={"fire": 0.9})
        assert "metadata.jsonl was altered" in verify_dataset(folder)


def test_an_older_data_set_has_no_sums(tmp_path):
    folder = shutil.copytree(OLD / "dataset_masks", tmp_path / "old")
    (said,) = verify_dataset(folder)
    assert said.startswith("SHA256SUMS is missing")
    for area in (0.9, 0.001):
        edit(folder, "metadata.jsonl", 0, areas={"smoke": area, "burning thing": 0.1699})
        assert verify_dataset(folder) == [f"images/000000.png: the area of smoke is {area}, by its mask 0.3425", said]
