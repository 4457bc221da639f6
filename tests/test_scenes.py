"""Scenes repeat from their seed, say only what can be seen, and label every pixel."""

import numpy as np
import pytest

from attnlab.scenes import street
from attnlab.scenes.canvas import Canvas, Thing, reduce
from attnlab.scenes.captions import AREA, CLASS_OF, count_visible, describe
from attnlab.scenes.objects import World

SEEDS = range(street.HELD_OUT, street.HELD_OUT + 150)


@pytest.fixture(scope="module")
def scenes():
    return [street.render(seed) for seed in SEEDS]


def test_the_example_of_the_docstring():
    scene = street.render(579)
    assert scene.caption == "a burning house with smoke and a street" and scene.mask("smoke").any()


@pytest.mark.parametrize("size", [64, 128])
def test_pure_function_of_the_seed(size):
    first = street.render(11, size)
    street.render(12, size)
    again = street.render(11, size)
    assert first.image.shape == (size, size, 3) and first.image.dtype == np.uint8
    assert first.labels.shape == first.parts.shape == (size, size)
    for a, b in zip((first.image, first.labels, first.parts), (again.image, again.labels, again.parts), strict=True):
        assert (a == b).all()
    assert first.caption == again.caption and first.words == again.words
    assert (street.render(12, size).image != first.image).any()


def test_same_world_at_every_size():
    small, large = street.render(3, 64), street.render(3, 128)
    agree = (large.labels[::2, ::2] == small.labels) | (large.labels[1::2, 1::2] == small.labels)
    assert agree.mean() > 0.95


def test_captions_name_only_what_is_visible(scenes):
    for scene in scenes:
        for word, name in scene.words.items():
            assert (scene.labels == street.CLASSES.index(name)).mean() >= AREA, scene.caption
            assert word in scene.caption.replace(",", "").split()


def test_every_class_word_of_a_caption_is_in_words(scenes):
    for scene in scenes:
        found = {w for w in scene.caption.replace(",", "").split() if w in CLASS_OF}
        assert found == set(scene.words)


def test_visible_is_counted_by_area():
    """Of three cars one is a sliver: two count. A class of two specks is not visible at all."""
    things = [Thing("sky"), *(Thing("car", i) for i in range(3)), Thing("car", 0, "wheel"), Thing("fire", 0)]
    ids = np.zeros((100, 100), np.uint8)
    ids[10:20, 10:20], ids[30:40, 10:14], ids[50:52, 10:15], ids[20:22, 10:20] = 1, 2, 3, 4
    ids[90, 90:98] = 5
    assert count_visible(ids, things) == {"sky": (0,), "car": (0, 1)}


def test_numbers_and_colors_are_true():
    world = World(time="day", ground="grass", theme="town", horizon=0.5)
    world.paint |= {("car", 0): "red", ("car", 1): "blue"}
    rngs = [np.random.default_rng(i) for i in range(80)]
    captions = {n: [describe(rng, world, {"car": tuple(range(n))}, [])[0] for rng in rngs] for n in (1, 2)}
    assert any("a red car" in c for c in captions[1]) and not any("cars" in c or "blue" in c for c in captions[1])
    assert any("two cars" in c for c in captions[2]) and all("cars" in c and "red" not in c for c in captions[2])


def test_the_whole_language_is_spoken(scenes):
    said = {name for scene in scenes for name in scene.words.values()}
    assert said == set(street.CLASSES)
    shown = np.bincount(np.concatenate([s.labels.ravel() for s in scenes]), minlength=len(street.CLASSES))
    assert (shown > 0).all() and shown.sum() == len(scenes) * 64**2
    parts = {street.PARTS[p] for s in scenes for p in np.unique(s.parts)}
    assert parts == set(street.PARTS)


def test_masks(scenes):
    scene = next(s for s in scenes if "houses" in s.words)
    assert (scene.mask("houses") == scene.mask("house")).all()
    assert (scene.mask("roof") <= scene.mask("house")).all()
    with pytest.raises(KeyError, match=r"'boat' is no word of the caption, class or part; known: .*house"):
        scene.mask("boat")


def test_render_with():
    scenes = street.render_with("smoke", 3, first=50)
    assert len(scenes) == 3 and all("smoke" in s.words for s in scenes)
    with pytest.raises(ValueError, match="no caption says 'boat'"):
        street.render_with("boat", 1)


def test_wrong_input():
    with pytest.raises(ValueError, match="seed=-1"):
        street.render(-1)
    with pytest.raises(ValueError, match="size=16"):
        street.render(1, 16)


def test_label_is_what_covers_the_pixels_center():
    """A rectangle over the left of a 4 x 4 image: a pixel is labeled where its center is inside."""
    canvas = Canvas(4)
    canvas.rectangle((0, 0, 1, 1), (0, 0, 0), Thing("sky"))
    canvas.rectangle((0, 0, 0.4, 1), (255, 255, 255), Thing("house"))  # centers lie at 0.125, 0.375, 0.625, 0.875
    image, ids = reduce(*canvas.arrays())
    assert (ids == [1, 1, 0, 0]).all()
    assert image[0, 0, 0] == 255 and image[0, 3, 0] == 0
