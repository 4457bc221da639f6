"""Splits, and near duplicates: planted copies are found, other scenes are not, and nothing crosses."""

import io
import itertools
import json
import re
from functools import lru_cache

import numpy as np
import pytest
from PIL import Image

from attnlab.dataset import Dataset, Recipe, find_leaks, split_dataset
from attnlab.dataset.labeling import Labeling
from attnlab.dataset.leaks import find_images
from attnlab.dataset.records import as_lines, write_record
from attnlab.dataset.thumbnails import TURNS, near_pairs, thumbnail
from attnlab.scenes import street
from experiments.studies import near_duplicates

CLASSES = ("fire", "smoke", "water")
FIRST = street.HELD_OUT + 910_000
render = lru_cache(None)(street.render)


def picture(seed, size=64):
    return Image.fromarray(render(FIRST + seed, size).image)


def turned(image, name):
    """What `TURNS` calls so, by Pillow."""
    flip, _, turn = name.partition(" ")
    image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image
    return image.rotate(int(turn or 0), expand=True)


def encoded(image, **options):
    file = io.BytesIO()
    image.save(file, **options)
    return Image.open(file).convert("RGB")


def made(folder, seeds, prompts=("a house",), images=None, turns=None):
    """Write a data set of rendered scenes, labeled exactly; image i may be turned."""
    recipe = Recipe(prompts=prompts, classes={name: name for name in CLASSES}, map="ovam", images=len(seeds))
    lines = []
    for folder_name in ("images", "masks"):
        (folder / folder_name).mkdir(parents=True)
    for i, seed in enumerate(seeds):
        scene = render(FIRST + seed)
        masks = {name: scene.mask(name) for name in CLASSES}
        labels = sum(number * masks[name] for number, name in enumerate(CLASSES, 1)).astype(np.uint8)
        areas = {name: float(mask.mean()) for name, mask in masks.items()}
        image = turned(picture(seed), (turns or {}).get(i, ""))
        lines.append(write_record(folder, recipe, i, image, Labeling(labels, masks, areas, areas, None, None)))
        lines[-1]["prompt"] = prompts[i % len(prompts)]
    (folder / "metadata.jsonl").write_text(as_lines(lines))
    (folder / "rejected.jsonl").write_text("")
    recipe.save(folder / "recipe.yaml")
    return Dataset(folder)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """80 scenes; the last 16 show the first 16 again, in all turns."""
    turns = {64 + k: TURNS[k % 8] for k in range(16)}
    return made(tmp_path_factory.mktemp("made") / "scenes", [*range(64), *range(16)], turns=turns)


@pytest.mark.parametrize("name", TURNS)
@pytest.mark.parametrize("size", [(64, 64), (100, 75), (37, 51)])
def test_a_turned_image_has_the_turned_thumbnail(name, size):
    image = picture(0).resize(size)
    pairs = [*near_pairs(thumbnail(turned(image, name))[None], thumbnail(image)[None])]
    assert [TURNS[int(p.turn[0])] for p in pairs] == [name] and pairs[0].distance[0] <= 1


def test_near_pairs_are_those_of_the_plain_loop():
    random = np.random.default_rng(0)
    base = random.integers(0, 256, (60, 8, 8, 3))
    noise = random.normal(0, 9, base.shape) * random.random((60, 1, 1, 1))
    base[:5] = base[:5] // 2
    noise[:5] = 4  # as far apart in what all turns have in common as in the thumbnails themselves
    second = np.stack([np.rot90(x[:, :: random.choice([-1, 1])], random.integers(4)) for x in base + noise])
    second = second.round().clip(0, 255).astype(np.uint8)
    first = np.concatenate([base, np.full((3, 8, 8, 3), 7)]).astype(np.uint8)
    expected = {
        (i, j)
        for i, x in enumerate(first.astype(float))
        for j, y in enumerate(second.astype(float))
        if min(np.sqrt(((x - np.rot90(z, k)) ** 2).mean()) for z in (y, y[:, ::-1]) for k in range(4)) <= 5
    }
    found = [
        (i, j) for p in near_pairs(first, second, 5) for i, j in zip(p.first.tolist(), p.second.tolist(), strict=True)
    ]
    assert 20 < len(expected) < 60 and sorted(found) == sorted(expected)
    own = [
        (i, j) for p in near_pairs(first, within=5) for i, j in zip(p.first.tolist(), p.second.tolist(), strict=True)
    ]
    assert sorted(own) == [(60, 61), (60, 62), (61, 62)]


COPIES = {
    "plain.png": lambda image: image,
    "flipped.png": lambda image: turned(image, "flipped 90"),
    "half.png": lambda image: image.resize((64, 64)),
    "large.webp": lambda image: image.resize((400, 400)),
    "low.jpg": lambda image: encoded(turned(image, " 270"), format="JPEG", quality=50),
    "cropped.png": lambda image: image.crop((2, 2, 126, 126)),
    "deep/in/A.TIFF": lambda image: image,
    "palette.gif": lambda image: image.quantize(256),
    "alpha.png": lambda image: image.convert("RGBA"),
}


def test_copies_are_found_in_any_layout(tmp_path):
    """Masks are not images; a file is not its own copy; one that is no image is named."""
    for k, (name, copy) in enumerate(COPIES.items()):
        for folder, image in (("a", picture(k, 128)), ("b", copy(picture(k, 128)))):
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    for folder in ("a", "b"):
        (tmp_path / folder / "masks").mkdir()
        Image.new("L", (64, 64)).save(tmp_path / folder / "masks/0.png")
        (tmp_path / folder / "instances").mkdir()
        Image.new("I;16", (64, 64)).save(tmp_path / folder / "instances/0.png")
    picture(50).save(tmp_path / "b/other.png")
    (tmp_path / "b/broken.png").write_bytes(b"no image")
    with pytest.warns(UserWarning, match=r"1 of 11 images cannot be read, .*\n.*broken\.png"):
        leaks = find_leaks(tmp_path / "a", tmp_path / "b")
    found = {leak.second.relative_to(tmp_path / "b").as_posix(): leak for leak in leaks}
    assert found.keys() == COPIES.keys()
    assert all(leak.first.relative_to(tmp_path / "a").as_posix() == name for name, leak in found.items())
    assert {name for name, leak in found.items() if leak.same} == {
        "plain.png",
        "deep/in/A.TIFF",
        "alpha.png",
        "palette.gif",
    }
    assert (found["flipped.png"].turn, found["low.jpg"].turn, found["half.png"].turn) == ("flipped 90", " 90", "")
    assert all(leak.distance <= 6 for leak in leaks) and found["flipped.png"].distance == 0
    assert find_leaks(tmp_path / "a") == [] == find_leaks(tmp_path / "a", tmp_path / "a")


def test_duplicates_inside_are_listed_once_each_without_the_first(tmp_path):
    for k in range(5):
        turned(picture(k // 3), TURNS[k]).save(tmp_path / f"{k}.png")
    assert [(one.first.name, one.second.name) for one in find_leaks(tmp_path)] == [
        ("0.png", "1.png"), ("0.png", "2.png"), ("3.png", "4.png"),
    ]  # fmt: skip


def test_linked_folders_are_looked_into(tmp_path):
    """A link to a folder hides no leak; one that leads back is not followed for ever."""
    for name in ("far", "near"):
        (tmp_path / name).mkdir()
        picture(3).save(tmp_path / name / "a.png")
    (tmp_path / "near/link").symlink_to(tmp_path / "far", target_is_directory=True)
    (tmp_path / "near/back").symlink_to(tmp_path / "near", target_is_directory=True)
    names = [path.relative_to(tmp_path / "near").as_posix() for path in find_images(tmp_path / "near")]
    assert names == ["a.png", "link/a.png"]
    (leak,) = find_leaks(tmp_path / "near")
    assert leak.same and leak.second == tmp_path / "near/link/a.png"


def test_the_best_of_several_copies_is_named_and_hidden_files_are_not(tmp_path, monkeypatch):
    """Equal pixels go before equal thumbnails, however a path is written; a file is no copy of itself."""
    for name in ("a", "b", "a/.cache"):
        (tmp_path / name).mkdir()
    picture(3).save(tmp_path / "a/.cache/hidden.png")
    picture(3).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "a/1.png")
    picture(3).save(tmp_path / "a/2.png")
    picture(3).save(tmp_path / "b/1.png")
    (leak,) = find_leaks(tmp_path / "a", tmp_path / "b")
    assert leak.first == tmp_path / "a/2.png" and leak.same and leak.turn == ""
    monkeypatch.chdir(tmp_path)
    assert find_leaks("b", tmp_path / "b") == []


def test_folders_without_images_are_refused(tmp_path):
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/0.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no images in .*: name the folder"):
        find_leaks(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder"):
        find_leaks(tmp_path / "nosuch")
    with pytest.raises(FileNotFoundError, match="not a file"):
        find_leaks(tmp_path / "labels/0.png")
    with pytest.raises(ValueError, match="within=-1"):
        find_leaks(tmp_path, within=-1)
    (tmp_path / "0.png").write_bytes(b"")
    with pytest.raises(ValueError, match="1 of 1 images cannot be read"):
        find_leaks(tmp_path)


def test_no_copy_crosses_and_classes_are_shared(scenes, tmp_path):
    splits = split_dataset(scenes, seed=3)
    assert sorted(itertools.chain(*splits.values())) == list(range(80)) and list(splits) == ["train", "val", "test"]
    assert [len(own) for own in splits.values()] == [64, 8, 8]
    where = {i: name for name, own in splits.items() for i in own}
    assert all(where[k] == where[64 + k] for k in range(16))
    has = np.array([[record["areas"][name] > 0 for name in CLASSES] for record in scenes.records])
    has = np.column_stack([has, ~has.any(1)])
    for own in splits.values():  # as near to its part as whole images allow, and groups of two
        assert np.abs(has[own].sum(0) - has.sum(0) * len(own) / 80).max() <= 2
    for name, own in splits.items():  # the check that knows nothing of the split finds nothing
        (tmp_path / name).mkdir()
        for i in own:
            scenes[i].image.save(tmp_path / name / f"{i}.png")
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        assert find_leaks(tmp_path / a, tmp_path / b) == []


def test_a_seed_repeats_and_another_differs(scenes):
    assert split_dataset(scenes, seed=3) == split_dataset(scenes, seed=3) != split_dataset(scenes, seed=4)


def test_a_split_without_images_takes_equal_hashes_as_copies(scenes):
    """Copies as they are have equal difference hashes, turned ones have not."""
    splits = split_dataset(scenes, within=None)
    where = {i: name for name, own in splits.items() for i in own}
    assert all(where[k] == where[64 + k] for k in range(0, 16, 8))
    assert any(where[k] != where[64 + k] for k in range(16))


def test_prompts_that_say_the_same_stay_together(tmp_path):
    says = ["A house", "the  House.", "a tree", "Tree", "two cars", "water", "smoke", "fire", "a road", "night"]
    dataset = made(tmp_path / "said", range(100), says)
    splits = split_dataset(dataset, {"train": 0.6, "rest": 0.4}, by="prompt")
    of = {name: {dataset.records[i]["prompt"] for i in own} for name, own in splits.items()}
    plain = {name: {re.sub(r"^(a|the) |\W", "", text.lower()) for text in texts} for name, texts in of.items()}
    assert not plain["train"] & plain["rest"] and len(plain["train"] | plain["rest"]) == 8
    assert [len(own) for own in splits.values()] == [60, 40]
    dataset.mark("images/000000.png")
    assert 0 not in itertools.chain(*split_dataset(dataset).values())


def test_images_of_one_seed_stay_together_and_wide_letters_are_letters(tmp_path):
    dataset = made(tmp_path / "set", range(12), ["a fire", "\uff46\uff49\uff52\uff45", "water"])  # fire, twice as wide
    for record in dataset.records:
        record["seed"] //= 2
    of = {i: name for name, own in split_dataset(dataset, {"a": 0.5, "b": 0.5}).items() for i in own}
    seeds = {record["seed"] for record in dataset.records}
    assert len(seeds) < 12 and len({(record["seed"], of[i]) for i, record in enumerate(dataset.records)}) == len(seeds)
    with pytest.raises(ValueError, match="in all 2, and there are 3 splits"):
        split_dataset(Dataset(dataset.folder), by="prompt")


def test_what_cannot_be_split_says_what_to_do(tmp_path):
    same = made(tmp_path / "same", [0] * 8)
    with pytest.raises(
        ValueError, match=r"8 images are in groups .* largest of 8 images, in all 1, .* 3 splits: make more"
    ):
        split_dataset(same)
    with pytest.raises(ValueError, match=r"^2 images, without those marked as bad, do not fill 3 splits: make more"):
        split_dataset(made(tmp_path / "few", [0, 1]))
    with pytest.warns(UserWarning) as told:
        split_dataset(made(tmp_path / "five", range(5)), {"train": 0.8, "val": 0.1, "test": 0.1})
    told = [str(one.message) for one in told if "and not" in str(one.message)]
    assert told == ["train, val, test have 0.60, 0.20, 0.20 and not 0.80, 0.10, 0.10 of the images: they are 5 alone, "
                    "make more"]  # fmt: skip
    most = made(tmp_path / "most", [0] * 9 + [1, 2])
    with pytest.warns(UserWarning) as told:
        assert sorted(map(len, split_dataset(most).values())) == [1, 1, 9]
    assert any("no image of" in str(one.message) for one in told)
    large = made(tmp_path / "large", [0] * 20 + [*range(1, 21)])
    with pytest.warns(UserWarning, match=r"have 0\.35, .* and not 0\.40, .* largest of 20 images, joined by near"):
        split_dataset(large, {"train": 0.4, "val": 0.2, "test": 0.4})
    for wrong, says in (
        ({"train": 0.9}, "0.9 is 0.9, and must be 1"),
        ({}, "maps names"),
        ({"a": 2, "b": -1}, "above 0"),
    ):
        with pytest.raises(ValueError, match=says):
            split_dataset(most, wrong)
    with pytest.raises(ValueError, match="choose seed or prompt"):
        split_dataset(most, by="image")
    (most.folder / "images/000003.png").write_bytes(b"cut")
    with pytest.warns(UserWarning, match="000003"), pytest.raises(ValueError, match="verify_dataset names them"):
        split_dataset(most)


def test_the_study_of_near_duplicates_counts_copies_and_others(tmp_path):
    near_duplicates.main(["--scenes", "12", "--images", "0", "--out", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())["rendered scenes"]
    assert found["different"]["thumbnails"]["pairs"] == [0, 66]
    assert found["copies"].keys() == near_duplicates.COPIES.keys()
    assert found["copies"]["flipped"]["thumbnails"][:2] == [12, 12]
    blank = [Image.new("RGB", (64, 64), color) for color in ("red", "red", "blue")]
    assert near_duplicates.measure_others(blank)["thumbnails"] == {
        "pairs": [1, 3],
        "images": [2, 3, 0.666667, 0.094299, 0.991596],
    }
