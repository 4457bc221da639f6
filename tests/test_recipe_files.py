"""The recipes that come with attnlab: found by name, with words that their prompts say once."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest

from attnlab.dataset import (
    Recipe,
    export_segformer,
    export_voc,
    find_recipe,
    generate_dataset,
    known_recipes,
    open_pairs,
    split_dataset,
)
from attnlab.dataset.card import card
from attnlab.pipelines import bundled, load_parts
from attnlab.scenes import street
from attnlab.segmentation import Segmenter, patches, train_segmenter
from experiments.studies import recipe_quality

KINDS = ("flood", "smoke", "street", "wildfire")
RECIPES = {name: Recipe.load(path) for name, path in known_recipes().items()}


def without_class(recipe):
    """Prompts in which no class is named."""
    return [text for text in recipe.texts if not any(said(word, text) for word in recipe.classes.values())]


def said(word, text):
    return len(re.findall(rf"\b{re.escape(word)}\b", text))


def test_each_kind_is_there_for_both_kinds_of_models():
    assert set(RECIPES) == {*KINDS, *(f"{kind}-tiny" for kind in KINDS)}
    for name, recipe in RECIPES.items():
        assert (recipe.model in bundled()) is name.endswith("-tiny")
        assert list(recipe.classes) == list(RECIPES[name.removesuffix("-tiny")].classes)


@pytest.mark.parametrize("name", RECIPES)
def test_words_are_said_once_and_some_prompts_have_none(name):
    recipe = RECIPES[name]
    assert recipe.map == "daam"
    for word in recipe.classes.values():
        counts = [said(word, text) for text in recipe.texts]
        assert set(counts) == {0, 1}, word  # twice, and the recipe could not be made
        assert sum(counts) >= len(recipe.texts) / 4
    assert 0.1 <= len(without_class(recipe)) / len(recipe.texts) <= 0.5
    assert len(set(recipe.texts)) == len(recipe.texts)
    assert max(len(text.split()) for text in recipe.texts) < 30  # of 77 tokens, of which a word may take several


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_kept_is_in_balance_with_what_prompts_ask_for(name):
    """With all of it wanted after about as many attempts, few images are drawn in vain."""
    recipe = RECIPES[name]
    assert set(recipe.kept) == {*recipe.classes, "background"}
    count = {c: sum(said(word, text) for text in recipe.texts) for c, word in recipe.classes.items()}
    count["background"] = len(without_class(recipe))
    attempts = [recipe.kept[c] / n * len(recipe.texts) for c, n in count.items()]
    assert 190 < min(attempts) <= max(attempts) < 1.2 * min(attempts)
    assert recipe.kept["background"] < max(recipe.kept.values())


@pytest.mark.parametrize("name", [name for name in RECIPES if name.endswith("-tiny")])
def test_the_bundled_model_knows_every_word(name):
    recipe, tokenizer = RECIPES[name], load_parts("tiny", ["tokenizer"])["tokenizer"]
    recipe.check(tokenizer)
    known = tokenizer.get_vocab()
    assert not {word for text in recipe.texts for word in re.findall("[a-z]+", text) if f"{word}</w>" not in known}
    assert set(recipe.classes) <= set(street.CLASSES)  # what the reference segmenter can check


def test_a_recipe_is_found_by_name_or_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_recipe("flood-tiny") == known_recipes()["flood-tiny"]
    mine = RECIPES["flood-tiny"].save(tmp_path / "my floods.yaml")
    assert find_recipe(str(mine)) == find_recipe(mine) == mine
    mine.rename("flood-tiny")
    assert find_recipe("flood-tiny") == known_recipes()["flood-tiny"] and find_recipe("./flood-tiny").samefile(
        tmp_path / "flood-tiny"
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_recipe("~/flood-tiny").samefile(tmp_path / "flood-tiny")
    with pytest.raises(FileNotFoundError, match=r"no recipe 'floods-tiny'.*did you mean flood-tiny") as error:
        find_recipe("floods-tiny")
    for name, path in known_recipes().items():
        listed = next(line for line in str(error.value).splitlines() if line.split()[0] == name)
        assert listed.strip().removeprefix(name).strip() == path.read_text().splitlines()[0].removeprefix("# ")
    for nothing in ("", ".", tmp_path):
        with pytest.raises(FileNotFoundError, match="no recipe"):
            find_recipe(nothing)


def first_line(recipe):
    return card(recipe, []).splitlines()[0]


def test_the_card_says_first_that_images_are_toys_whatever_the_model_is_called(tmp_path, monkeypatch):
    toy = "**Toy images of a rendered world, 64 x 64: for trying out, not for training on photographs.**"
    flood, plain = RECIPES["flood-tiny"], first_line(RECIPES["flood"])
    assert plain == "# 0 labeled images of water"
    assert first_line(flood) == first_line(replace(flood, model="tiny-plain")) == toy
    assert "128 x 96" in first_line(replace(flood, size=(128, 96)))
    monkeypatch.chdir(tmp_path)
    copied = shutil.copytree(bundled()["tiny"], "stable-diffusion", ignore=shutil.ignore_patterns("*.safetensors"))
    assert first_line(replace(flood, model=copied)) == toy
    other = shutil.copytree(copied, "tiny")
    for part, changes in (("unet", {"sample_size": 64}), ("vae", {"block_out_channels": [128, 256, 512, 512]})):
        path = tmp_path / other / part / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert first_line(replace(flood, model="./tiny")) == plain
    small = first_line(replace(flood, model="./tiny", size=(64, 64)))
    assert small == "**Toy images, 64 x 64: for trying out, not for training on photographs.**"
    assert first_line(replace(flood, model="owner/tiny")) == plain
    joint = shutil.copytree(copied, "joint")  # with a transformer for its denoiser
    (tmp_path / joint / "unet").rename(tmp_path / joint / "transformer")
    (tmp_path / joint / "transformer/config.json").write_text(
        '{"_class_name": "SD3Transformer2DModel", "sample_size": 16}'
    )
    assert first_line(replace(flood, model="./joint")) == small
    (tmp_path / joint / "transformer/config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    assert first_line(replace(flood, model="./joint")) == plain


@pytest.fixture(scope="module")
def floods(tmp_path_factory):
    """A data set of the recipe, drawn in few steps."""
    quick = {
        "prompts": ["water and {thing} {when}", "{dry} on a road {when}"],
        "steps": 2,
        "images": 1,
        "kept": None,
        "threads": 1,
    }
    flood = RECIPES["flood-tiny"]
    lists = {"thing": ["a house", "a car"], "dry": ["a tree"], "when": ["at dusk", "at night"]}
    return generate_dataset(replace(flood, **quick, lists=lists), tmp_path_factory.mktemp("floods") / "set")


def test_from_a_recipe_to_a_segmenter(floods, tmp_path):
    pairs = open_pairs(floods.folder)
    images, labels = patches(pairs, 64)
    options = {"class_weights": "balanced", "steps": 2, "batch": 2, "progress": False}
    segmenter = train_segmenter(images, labels, pairs.classes, valid=(images[:2], labels[:2]), **options)
    saved = Segmenter.from_pretrained(segmenter.save_pretrained(tmp_path / "segmenter"))
    assert saved.classes == ("background", "water") and saved.segment(images).shape == labels.shape


def test_pairs_of_a_data_set_and_of_its_exports_are_the_same(floods, tmp_path):
    splits = {"train": [0, 2, 3], "val": [1, 4]}
    folders = export_segformer(floods, tmp_path / "s", splits=splits), export_voc(floods, tmp_path / "v", splits=splits)
    for name, positions in splits.items():
        expected = [floods[i] for i in positions]
        assert any((pair.labels == 1).any() for pair in expected)
        for pairs, tolerance in (
            (open_pairs(floods, positions), 0), (open_pairs(folders[0], name), 0), (open_pairs(folders[1], name), 24)
        ):  # fmt: skip
            assert pairs.classes == ("background", "water") and len(pairs) == len(expected)
            for (image, labels), pair in zip(pairs, expected, strict=True):
                np.testing.assert_array_equal(labels, pair.labels)
                assert np.abs(image.astype(int) - np.asarray(pair.image)).max() <= tolerance  # of JPEG
    assert [len(open_pairs(folder)) for folder in folders] == [5, 5]
    assert {len(open_pairs(floods, part)) for part in split_dataset(floods, {"a": 0.5, "b": 0.5}).values()} <= {2, 3, 4}


def test_pairs_leave_out_what_is_marked_as_bad(floods, tmp_path):
    copied = shutil.copytree(floods.folder, tmp_path / "copy")
    name = floods.records[1]["file_name"]
    (copied / "bad.json").write_text(json.dumps([name]))
    pairs = open_pairs(copied)
    assert len(pairs) == len(floods) - 1 and name not in {str(a.relative_to(copied)) for a, _ in pairs.paths}
    with pytest.raises(ValueError, match="no chosen images"):
        open_pairs(copied, [1])
    with pytest.raises(ValueError, match=r"split='train': of a data set give positions, split_dataset\(dataset\)"):
        open_pairs(copied, "train")
    voc = export_voc(floods, tmp_path / "voc")
    with pytest.raises(FileNotFoundError, match="no split 'val'; there are train"):
        open_pairs(voc, "val")
    with pytest.raises(ValueError, match="give the name of a split"):
        open_pairs(voc, [0])
    with pytest.raises(FileNotFoundError, match="no finished data set, and no export"):
        open_pairs(tmp_path)
    masks = floods.recipe
    loose = shutil.copytree(floods.folder, tmp_path / "loose")
    replace(masks, labels=False).save(loose / "recipe.yaml")
    with pytest.raises(ValueError, match="make it with `labels: true`"):
        open_pairs(loose)


class Judge:
    """Says what is shown as one wants it."""

    classes = street.CLASSES

    def __init__(self, labels):
        self.labels = labels

    def segment(self, images):
        return np.where(self.labels == 1, street.CLASSES.index("water"), 0).astype(np.uint8)


def test_quality_is_what_the_judge_agrees_with(floods):
    labels = np.stack([pair.labels for pair in floods])
    asked, count = (["water" in pair.metadata["prompt"] for pair in floods], len(floods))
    right = recipe_quality.quality_of(floods, Judge(labels))
    assert right["iou"]["water"] == [1, 1, 1, sum(asked)] and right["without a class"] == 2
    rate, low, high, n = right["shown when asked"]["water"]
    assert rate == high == 1 and n == sum(asked) == 4 and low == pytest.approx(n / (n + 1.96**2), abs=1e-3)  # Wilson's
    assert right["shown unasked"]["water"][0] == 0 and right["shown unasked"]["water"][3] == count - 4
    wrong = recipe_quality.quality_of(floods, Judge(1 - labels))
    assert wrong["iou"]["water"][0] == 0 and wrong["shown unasked"]["water"][0] == 1
    half = labels.copy()
    half[np.cumsum(labels == 1, axis=1) % 2 == 0] = 0  # every other pixel of a column
    assert 0.4 < recipe_quality.quality_of(floods, Judge(half))["iou"]["water"][0] < 0.6


def test_the_settings_chosen_are_those_that_find_the_truth():
    heat, truth = np.zeros((64, 64)), np.zeros((64, 64), np.uint8)
    heat[10:40, 10:40], heat[15:35, 15:35], heat[20, 20], truth[15:35, 15:35] = 0.45, 0.55, 1, 1
    none = recipe_quality.LabeledImage(np.zeros((64, 64, 3), np.uint8), {0: {}, 1: {}}, np.zeros_like(truth))
    one = none._replace(heats={0: {"water": heat}, 1: {"water": heat.T[::-1]}}, truth=truth)
    (settings, means), *_, worst = recipe_quality.choose_settings(RECIPES["flood-tiny"], [[one, none], [one]])
    assert settings == {"propagate": 0, "mask": {"method": "threshold", "level": 0.5}} and means == [1, 1]
    assert worst[0]["propagate"] == 1 and np.mean(worst[1]) < 0.5


@pytest.mark.parametrize("name", [name for name in RECIPES if name.endswith("-tiny")])
def test_what_a_recipe_says_of_its_quality_was_measured(name):
    text = known_recipes()[name].read_text("utf-8")
    found = json.loads(recipe_quality.RECIPE_QUALITY_RESULTS.read_text("utf-8"))[name]
    assert found["made"] == 2 * len(RECIPES[name].texts)
    assert f"kept by the filters: {round(found['kept'][0] * found['made'])} of {found['made']}" in text
    for kind in RECIPES[name].classes:
        for said, key in (("IoU", "iou"), ("shown when asked", "shown when asked"), ("unasked", "shown unasked")):
            mean, low, high, count = found[key][kind]
            assert f"{said} {mean:.3f} ({low:.3f} to {high:.3f}) of {count}" in text
