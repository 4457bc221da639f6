"""Scenes know their single things, and masks are cut into them."""

import re

import numpy as np
import pytest
from scipy.ndimage import label

from attnlab.scenes import aerial, street
from attnlab.scenes.canvas import Canvas, Thing, downsample, number_things

SEEDS = range(street.HELD_OUT + 50, street.HELD_OUT + 250)
NOUNS = {"cars": "car", "people": "person", "trees": "tree", "riders": "rider", "bicycles": "bicycle", "poles": "pole"}
NOUNS |= {"houses": "building", "traffic lights": "traffic light"}


@pytest.fixture(scope="module")
def streets():
    return [street.render(seed) for seed in SEEDS]


def test_things_are_numbered_in_the_order_of_painting():
    """A car with its wheel is one thing though a pole cuts it; a hidden thing has no number."""
    canvas = Canvas(32)
    canvas.rectangle((0, 0, 1, 1), (0, 0, 0), Thing("ground"))
    canvas.rectangle((0.2, 0.2, 0.3, 0.3), (1, 1, 1), Thing("car", 7))
    canvas.rectangle((0.1, 0.1, 0.6, 0.6), (9, 9, 9), Thing("car", 0))
    canvas.rectangle((0.2, 0.5, 0.3, 0.7), (5, 5, 5), Thing("car", 0, "wheel"))
    canvas.rectangle((0.4, 0.0, 0.5, 1.0), (7, 7, 7), Thing("pole", 0))
    canvas.rectangle((0.8, 0.8, 0.9, 0.9), (9, 9, 9), Thing("car", 1))
    _, ids = downsample(*canvas.arrays())
    numbers = number_things(ids, canvas.things, lambda thing: thing.name in ("car", "pole"))
    assert numbers.dtype == np.uint8 and set(np.unique(numbers)) == {0, 1, 2, 3}
    assert numbers[6, 6] == numbers[8, 18] == numbers[20, 8] == 1  # left and right of the pole, and the wheel
    assert numbers[6, 14] == 2 and numbers[27, 27] == 3 and numbers[30, 2] == 0


@pytest.mark.parametrize("world", [street, aerial])
def test_every_instance_is_a_thing_of_one_class(world):
    for seed in range(world.HELD_OUT, world.HELD_OUT + 60):
        scene = world.render(seed)
        numbers = scene.instances
        assert numbers.shape == scene.labels.shape and numbers.dtype == np.uint8
        assert set(np.unique(numbers)) - {0} == set(range(1, numbers.max() + 1))
        counted = np.isin(scene.labels, [world.CLASSES.index(name) for name in world.THINGS])
        assert not (numbers[~counted] > 0).any()
        for number in range(1, numbers.max() + 1):
            assert len(np.unique(scene.labels[numbers == number])) == 1


def test_captions_count_the_same_things(streets):
    """A caption that says two cars shows two cars; slivers are not counted there."""
    counted = 0
    for scene in streets:
        for word, noun in re.findall(rf"(two|three) (?:[a-z]+ )?({'|'.join(NOUNS)})", scene.caption):
            areas = np.bincount(scene.instances[scene.mask(NOUNS[noun])], minlength=1)[1:]
            assert np.sum(areas >= 0.004 * scene.labels.size) == {"two": 2, "three": 3}[word], scene.caption
            counted += 1
    assert counted > 20


def test_far_blocks_and_smoke_are_no_things(streets):
    far = [scene.mask("building") & (scene.instances == 0) for scene in streets]
    assert sum(map(np.any, far)) > 20
    assert all((scene.instances[scene.mask("smoke")] == 0).all() for scene in streets)
    lowest = [np.nonzero(mask.any(1))[0].max() for mask in far if mask.any()]
    assert max(lowest) <= 0.53 * 64  # a skyline ends at the horizon, a house stands below it


def test_touching_trees_are_told_apart(streets):
    """A forest's trees are one connected region, and several things."""
    several = []
    for scene in (s for s in streets if "forest" in s.caption):
        regions, count = label(scene.mask("tree"), np.ones((3, 3)))
        several.append(max(len(np.unique(scene.instances[regions == n])) for n in range(1, count + 1)))
    assert len(several) > 3 and max(several) >= 3


def test_a_vehicle_from_above_has_the_size_of_one():
    """It is 0.07 long and 0.036 wide, each up to 15% more or less; some are cut by the border of the image."""
    areas = []
    for seed in range(aerial.HELD_OUT, aerial.HELD_OUT + 60):
        scene = aerial.render(seed)
        numbers = scene.instances[scene.mask("vehicle")]
        areas += [(numbers == number).sum() / 64**2 for number in np.unique(numbers)]
    assert len(areas) > 50 and max(areas) < 1.6 * 0.07 * 0.036 * 1.15**2  # the samples on its border belong to it
    assert np.median(areas) == pytest.approx(0.07 * 0.036, rel=0.25)


@pytest.mark.parametrize("world", [street, aerial])
def test_same_things_at_every_size(world):
    small, large = (world.render(world.HELD_OUT + 9, size) for size in (64, 128))
    agree = np.any([large.instances[i::2, j::2] == small.instances for i in (0, 1) for j in (0, 1)], axis=0)
    assert small.instances.max() > 1 and agree.mean() > 0.97
