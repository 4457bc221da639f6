"""Scenes repeat from their seed, say only what can be seen, and label every pixel."""

import numpy as np
import pytest

from attnlab.scenes import street, world
from attnlab.scenes.canvas import Canvas, Thing, downsample
from attnlab.scenes.captions import CLASS_OF, NEARBY, VISIBLE_AREA, count_visible, write_caption
from attnlab.scenes.world import Fire, Road, World

SEEDS = range(street.HELD_OUT, street.HELD_OUT + 150)


@pytest.fixture(scope="module")
def scenes():
    return [street.render(seed) for seed in SEEDS]


def test_the_example_of_the_docstring():
    scene = street.render(2092)
    assert scene.caption == "a street, a burning house, dirt and smoke" and scene.mask("smoke").any()


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
            assert (scene.labels == street.CLASSES.index(name)).mean() >= VISIBLE_AREA, scene.caption
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


def say(world, seen, times=80):
    """What is said of the same scene in many ways."""
    return [write_caption(np.random.default_rng(i), world, seen)[0] for i in range(times)]


def a_world(**given):
    return World(**({"time": "day", "ground": "grass", "theme": "city", "horizon": 0.5} | given))


def test_numbers_and_colors_are_true():
    world = a_world(paint={("car", 0): "red", ("car", 1): "blue"})
    one, two = say(world, {"car": (0,)}), say(world, {"car": (0, 1)})
    assert any("a red car" in c for c in one) and not any("cars" in c or "blue" in c for c in one)
    assert any("two cars" in c for c in two) and all("cars" in c and "red" not in c for c in two)


def test_relations_are_true():
    """The car stands in front of the tree and far left of the person."""
    feet = {("car", 0): (0.2, 0.9), ("tree", 0): (0.3, 0.6), ("person", 0): (0.8, 0.9)}
    near = " ".join(say(a_world(feet=feet), {"car": (0,), "tree": (0,)}, 200))
    far = " ".join(say(a_world(feet=feet), {"car": (0,), "person": (0,)}, 200))
    assert "a car in front of a tree" in near and "a tree behind a car" in near
    assert not any(wrong in near for wrong in ("car behind", "tree in front", "left of", "right of"))
    assert "a car left of a person" in far and "a person right of a car" in far
    assert not any(wrong in far for wrong in ("car right", "person left", "behind", "in front", *NEARBY))


def test_the_color_of_smoke_is_true_of_all_smoke():
    dark = Fire(0.5, 0.8, 0.3, 0.2, 0, ("tree", 0), True, (60, 60, 60), 0.0)
    bright = dark._replace(smoke_color=(180, 180, 180))
    seen = {"fire": (0, 1), "smoke": (0, 1)}
    for fires, color in (([dark, dark], "black"), ([bright], "white"), ([dark, bright], "thick")):
        said = " ".join(say(a_world(fires=fires), seen, 200))
        assert {c for c in ("black", "white") if f"{c} smoke" in said} == {color} - {"thick"}


def test_what_belongs_to_something_else_is_not_named_alone():
    """A rider's bicycle and a traffic light's pole are named with them or not at all."""
    seen = {"rider": (0,), "bicycle": (100,), "traffic light": (0,), "pole": (100,)}
    said = " ".join(say(a_world(), seen, 200))
    assert "a rider on a bicycle" in said and "a traffic light on a pole" in said
    assert said.count("bicycle") + said.count("bike") == sum(said.count(f"on a {b}") for b in ("bicycle", "bike"))


def test_prompts_of_the_thesis_and_of_disasters_belong_to_the_language():
    flames = Fire(0.5, 0.8, 0.3, 0.2, 0, ("tree", 0), True, (60, 60, 60), 0.0)
    forest = a_world(theme="forest", fires=[flames])
    assert "forest fire with smoke" in say(forest, {"tree": (0, 1, 2, 3), "fire": (0,), "smoke": (0,)}, 400)
    flood = a_world(shore=0.6, kind={("building", 0): "house"})
    assert any("flooded neighbourhood" in c for c in say(flood, {"building": (0,), "water": (0,)}, 200))
    for noun in ("car", "person", "traffic light", "rider"):
        assert f"a {noun} in an urban environment" in say(a_world(), {noun: (0,)}, 400)


def test_the_whole_language_is_spoken(scenes):
    said = {name for scene in scenes for name in scene.words.values()}
    assert said == set(street.CLASSES) and set(street.THIN) < said
    shown = np.bincount(np.concatenate([s.labels.ravel() for s in scenes]), minlength=len(street.CLASSES))
    assert (shown > 0).all() and shown.sum() == len(scenes) * 64**2
    parts = {street.PARTS[p] for s in scenes for p in np.unique(s.parts)}
    assert parts == set(street.PARTS)


def test_masks(scenes):
    scene = next(s for s in scenes if "house" in s.words and s.mask("roof").any())
    assert (scene.mask("house") == scene.mask("building")).all()
    assert (scene.mask("roof") <= scene.mask("building")).all()
    with pytest.raises(KeyError, match=r"'boat' is no word of the caption, class or part; known: .*building"):
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
    canvas.rectangle((0, 0, 0.4, 1), (255, 255, 255), Thing("building"))  # centers lie at 0.125, 0.375, 0.625, 0.875
    image, ids = downsample(*canvas.arrays())
    assert (ids == [1, 1, 0, 0]).all()
    assert image[0, 0, 0] == 255 and image[0, 3, 0] == 0


def test_line_and_ring_paint_color_and_meaning_alike():
    """A ring leaves its inside as it was."""
    canvas = Canvas(32)
    canvas.rectangle((0, 0, 1, 1), (0, 0, 0), Thing("sky"))
    canvas.ring(0.5, 0.5, 0.4, 0.1, (255, 255, 255), Thing("bicycle"))
    canvas.line([(0, 0.5), (1, 0.5)], 0.1, (255, 255, 255), Thing("pole"))
    rgb, ids = canvas.arrays()
    assert ((rgb[..., 0] == 255) == (ids > 0)).all()
    assert ids[48, 48] == 2 and ids[30, 48] == 0 and ids[12, 48] == 1  # on the line, inside, on the ring


def test_roads_carry_what_stands_on_them():
    """A spot on a road lies between its edges, one on a sidewalk beyond them and not past the sidewalk."""
    rng = np.random.default_rng(0)
    across, ahead = Road(half=0.1, walk=0.08, y=0.75), Road(half=0.25, walk=0.16, far=0.5, near=0.5)
    for _ in range(50):
        assert abs(across.spot(rng, 0.5, "road")[1] - 0.75) <= 0.1
        assert 0.1 < abs(across.spot(rng, 0.5, "sidewalk")[1] - 0.75) < 0.18
        for place in ("road", "sidewalk"):
            x, y = ahead.spot(rng, 0.5, place)
            depth = (y - 0.5) / 0.5
            _, half = ahead.at(depth)
            assert (abs(x - 0.5) <= half) == (place == "road") and abs(x - 0.5) <= half + ahead.walk * depth + 0.01


def test_water_hides_the_feet_of_things_in_a_flood():
    canvas, rng = Canvas(64), np.random.default_rng(0)
    here = a_world(shore=0.5)
    canvas.rectangle((0, 0, 1, 1), (0, 0, 0), Thing("sky"))
    canvas.rectangle((0.3, 0.5, 0.7, 0.9), (255, 255, 255), Thing("building"))
    world.wade(canvas, rng, here, 0.5, 0.9, 0.4, 0.1)
    _, ids = downsample(*canvas.arrays())
    assert (ids[55, 20:44] == 2).all() and (ids[40, 20:44] == 1).all()
    before = ids
    world.wade(canvas, rng, here, 0.5, 0.4, 0.4, 0.1)  # stands above the shore: stays dry
    assert (downsample(*canvas.arrays())[1] == before).all()
