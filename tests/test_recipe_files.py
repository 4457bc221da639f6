"""The recipes that come with attnlab: found by name, with words that their prompts say once."""

import json
import re
import shutil
from dataclasses import replace

import pytest

from attnlab.dataset import Recipe, find_recipe, known_recipes
from attnlab.dataset.card import card
from attnlab.pipelines import bundled, load_parts
from attnlab.scenes import street

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
