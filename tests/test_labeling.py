"""Labels of a data set by hand: which prompt a record has, how good its masks are, what is ignored."""

import numpy as np
import pytest

import attnlab as al
from attnlab.dataset import Recipe, label
from attnlab.dataset.keeping import Selection
from attnlab.dataset.labeling import heats
from attnlab.maps.heatmaps import upscale

HALF = {"method": "threshold", "level": 0.5}
IMAGE = np.random.default_rng(0).integers(0, 256, (2, 3, 3), dtype=np.uint8)


def recipe(**options):
    given = {"prompts": ("a burning house with smoke",), "classes": {"house": "house", "smoke": "smoke"}, "mask": HALF}
    return Recipe(**given | {"filters": {"area": None}} | options)


def test_images_of_a_prompt_follow_one_another():
    """Three of the first, then three of the second, each with a seed of its own."""
    two = recipe(prompts=("a house", "smoke and a {thing}"), lists={"thing": ("house", "tree")}, images=3, seed=10)
    assert [two.prompt(i) for i in range(9)] == ["a house"] * 3 + ["smoke and a house"] * 3 + ["smoke and a tree"] * 3
    assert [two.seed_of(i) for i in range(9)] == list(range(10, 19))


def test_a_score_is_how_far_the_inside_is_above_the_outside():
    heat = np.array([[1.0, 0.6, 0.8], [0.2, 0.1, 0.0]])  # 0.8 inside, 0.1 outside, of a range of 1
    found = label({"house": heat, "smoke": 5 * heat[::-1] + 2}, IMAGE, recipe())
    assert found.scores["house"] == pytest.approx(0.7)
    # 7, 5 and 6 are at least 3.5, half the maximum, and 3, 2.5 and 2 are not: (6 - 2.5) / 5
    assert found.scores["smoke"] == pytest.approx(0.7)
    assert found.labels.tolist() == [[1, 1, 1], [2, 2, 2]] and found.areas == {"house": 0.5, "smoke": 0.5}


def test_where_masks_overlap_the_farther_one_wins():
    """Margins are from a mask's least value, 0, to the map's maximum, 1; on equal margins the first class stays."""
    house, smoke = np.array([[1.0, 0.5, 0.9, 0.0]]), np.array([[0.6, 1.0, 0.9, 0.0]])
    found = label({"house": house, "smoke": smoke}, IMAGE[:1].repeat(2, 1)[:, :4], recipe())
    assert found.labels.tolist() == [[1, 2, 1, 0]]  # margins 1 and 0, 0 and 1, 0.8 and 0.75


def test_a_pixel_is_ignored_near_a_border_unless_it_is_deep_in_another_mask():
    house, smoke = np.array([[1.0, 0.5, 0.48, 0.0, 0.52]]), np.array([[0.0, 0.0, 0.0, 0.5, 1.0]])
    found = label({"house": house, "smoke": smoke}, IMAGE[:1].repeat(2, 1)[:, :5], recipe(band=0.1))
    assert found.labels.tolist() == [[1, 255, 255, 255, 2]]


def test_a_near_duplicate_names_the_first_of_its_kind():
    """Hashes may differ in two bits; what is rejected already is nobody's original."""
    hashes = {0: 0b0, 1: 0b0, 2: 0xFF, 3: 0b11, 4: 0xFC, 5: 0b111, 6: 0b111}
    lines = [{"index": i, "hash": f"{one:016x}", "rejected": None if i else "blank"} for i, one in hashes.items()]
    every, near = (Selection(recipe(filters={"duplicates": most})) for most in (None, 2))
    assert [every.judge(line) for line in lines] == ["blank"] + [None] * 6
    found = {line["index"]: near.judge(line) for line in lines}
    assert {index: said for index, said in found.items() if said and index} == {
        3: "near duplicate of 000001",
        4: "near duplicate of 000002",
        6: "near duplicate of 000005",
    }


@pytest.mark.parametrize(("kind", "mode"), [("daam", "bicubic"), ("linear", "bilinear"), ("ovam", "bilinear")])
def test_maps_are_enlarged_as_they_are_published(kind, mode, recording):
    words = {"daam": al.daam(recording), "linear": al.linear_daam(recording), "ovam": al.ovam(recording, "house")}
    found = heats(recording, recipe(map=kind, classes={"house": "house"}), (64, 64))["house"]
    np.testing.assert_allclose(found, upscale(words[kind]["house"], (64, 64), mode), atol=1e-6)
