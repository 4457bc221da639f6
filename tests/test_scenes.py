"""Scenes repeat from their seed, say only what can be seen, and label every pixel."""

import colorsys
import re

import numpy as np
import pytest
from scipy.ndimage import find_objects, label

from attnlab.scenes import street, world
from attnlab.scenes.canvas import Canvas, Thing, downsample
from attnlab.scenes.captions import CLASS_OF, MAX_TOKENS, NEARBY, VISIBLE_AREA, count_visible, write_caption
from attnlab.scenes.world import Fire, Road, World

SEEDS = range(street.HELD_OUT, street.HELD_OUT + 400)
BLAZE = Fire(0.5, 0.8, 0.3, 0.2, 0, ("tree", 0), True, (60, 60, 60), 0.0)
HUES = {"red": (-25, 18), "yellow": (36, 65), "green": (100, 175), "blue": (200, 250)}  # degrees
PLURALS = "(two|three) (?:[a-z]+ )?(cars|people|houses|buildings|trees|riders|bicycles|poles|traffic lights)"
SINGULARS = {"people": "person", "houses": "building", "traffic lights": "traffic light"}


@pytest.fixture(scope="module")
def scenes():
    return [street.render(seed) for seed in SEEDS]


def tokens(caption):
    return caption.replace(",", " ,").split()


def regions(mask):
    """Height and width of each connected region that is large enough to be named."""
    found = find_objects(label(mask, np.ones((3, 3)))[0])
    return [mask[box].shape for box in found if mask[box].sum() >= 16]


def test_the_example_of_the_docstring():
    scene = street.render(3331)
    assert scene.caption == "a house left of a burning house with sky and black smoke" and scene.mask("smoke").any()


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


def test_a_number_of_things_is_that_of_connected_regions(scenes):
    numbers = []
    for scene in scenes:
        for number, things in re.findall(PLURALS, scene.caption):
            numbers.append(number)
            name = SINGULARS.get(things, things[:-1])
            assert len(regions(scene.mask(name))) == {"two": 2, "three": 3}[number], scene.caption
    assert numbers.count("two") > 30 and numbers.count("three") > 10


def test_colors_are_those_of_the_pixels(scenes):
    """Where a caption names one thing of a class, most of its colored pixels have the hue; gray ones have none."""
    right = {}
    for scene in scenes:
        said = street.colors_said(scene.caption)
        for name, color in said:
            if name not in ("building", "car", "person", "rider", "bicycle") or len(regions(scene.mask(name))) != 1:
                continue
            pixels = scene.image[scene.mask(name)] / 255
            hsv = np.array([colorsys.rgb_to_hsv(*rgb) for rgb in pixels])
            vivid = hsv[(hsv[:, 1] > 0.4) & (hsv[:, 2] > 0.2)]
            if color in HUES:
                low, high = HUES[color]
                hues = (vivid[:, 0] * 360 + 60) % 360 - 60
                right.setdefault(color, []).append(len(vivid) > 0 and np.mean((low < hues) & (hues < high)) > 0.5)
            else:
                right.setdefault("none", []).append(len(vivid) < 0.4 * len(hsv))
    assert set(right) == {*HUES, "none"} and all(len(found) > 10 for found in right.values())
    assert min(np.mean(found) for found in right.values()) > 0.9, {c: np.mean(found) for c, found in right.items()}


def test_things_are_large_enough_for_a_small_model(scenes):
    clear = [scene for scene in scenes if not {"fire", "smoke"} & {street.CLASSES[k] for k in np.unique(scene.labels)}]
    dry = [scene for scene in clear if not scene.mask("water").any()]
    widths = [width for scene in dry for _, width in regions(scene.mask("car"))]
    heights = [height for scene in dry for height, _ in regions(scene.mask("person"))]
    assert len(widths) > 50 and min(widths) >= 14
    assert len(heights) > 50 and min(heights) >= 14


def test_things_are_wholly_in_the_image(scenes):
    """Nothing that stands apart touches the border, where it would be cut."""
    for name in ("car", "person", "rider", "bicycle"):
        masks = [scene.mask(name) for scene in scenes]
        cut = [m[0].any() or m[-1].any() or m[:, 0].any() or m[:, -1].any() for m in masks]
        assert sum(m.any() for m in masks) > 40 and np.mean(cut) < 0.01, name


def test_a_flooded_neighbourhood_has_houses_in_water(scenes):
    flooded, standing = [scene for scene in scenes if "flooded neighbourhood" in scene.caption], []
    assert len(flooded) >= 8
    for scene in flooded:
        water, houses = scene.mask("water"), scene.mask("building")
        assert len(regions(houses)) >= 2 and water.mean() > 0.2
        below = np.roll(houses, 1, 0) & ~houses  # the pixels under houses, and under a skyline
        standing.append(np.mean(water[below]))
    assert np.median(standing) > 0.9


def test_captions_fit_the_window_and_vary(scenes):
    lengths = [len(tokens(scene.caption)) for scene in scenes]
    assert max(lengths) <= MAX_TOKENS and min(lengths) <= 2 and max(lengths) > 35
    assert 0.1 < np.mean(np.array(lengths) < 6) < 0.35
    for name in ("sky", "ground"):
        assert 0.6 < np.mean([name in scene.words.values() for scene in scenes if scene.mask(name).any()]) < 0.8
    assert any(re.fullmatch("a [a-z]+", scene.caption) for scene in scenes)


@pytest.mark.parametrize(
    ("caption", "said"),
    [
        ("a red car and a blue house, smoke", [("car", "red"), ("building", "blue")]),
        ("two people in red left of a rider in a white shirt", [("person", "red"), ("rider", "white")]),
        ("a cyclist in green on a yellow bike", [("rider", "green"), ("bicycle", "yellow")]),
        ("a burning white house with black smoke", [("building", "white"), ("smoke", "black")]),
        ("a green traffic light and an orange sky", [("traffic light", "green"), ("sky", "orange")]),
        ("a car on a road", []),
    ],
)
def test_colors_said(caption, said):
    assert street.colors_said(caption) == said


def say(world, seen, times=80, dense=True):
    """What is said of the same scene in many ways."""
    return [write_caption(np.random.default_rng(i), world, seen, dense)[0] for i in range(times)]


def a_world(**given):
    return World(**({"time": "day", "ground": "grass", "theme": "city", "horizon": 0.5} | given))


def test_the_hour_is_said_by_words_of_its_own():
    """Beside all that is seen it is always said, so nothing has to be learned from the color of the sky."""
    seen = {name: (0,) for name in ("car", "tree", "person", "building", "sky", "ground", "road", "mountain")}
    for time, ends in (("night", ("at night",)), ("dusk", ("at dusk", "in the evening"))):
        said = [
            caption for caption in say(a_world(time=time), seen, 300) if caption.count(",") + caption.count(" and ") > 3
        ]
        assert len(said) > 100 and all(caption.endswith(ends) for caption in said)
        colored = [f" {color} sky" in caption for caption in said for color in ("dark", "orange") if " sky" in caption]
        assert 0.02 < np.mean(colored) < 0.15  # of two colors, one of which is never right
    bare = [caption for caption in say(a_world(time="night"), {"car": (0,)}, 300) if caption.startswith("a car")]
    assert 0.2 < np.mean([caption.endswith("night") for caption in bare]) < 0.95


def test_numbers_and_colors_are_true():
    paint = {("car", 0): "red", ("car", 1): "blue", ("car", 2): "red"}
    one, two, alike = (say(a_world(paint=paint), {"car": cars}, 200) for cars in ((0,), (0, 1), (0, 2)))
    assert any("a red car" in c for c in one) and not any("cars" in c or "blue" in c for c in one)
    assert any("two cars" in c for c in two) and any("a red car and a blue car" in c for c in two)
    assert all("cars" in c or ("red car" in c and "blue car" in c) for c in two)
    assert any("two red cars" in c for c in alike) and not any("a red car" in c for c in alike)


@pytest.mark.parametrize("seen", [{"fire": (0,)}, {"smoke": (0,)}, {"car": (0, 1, 100)}])
def test_no_number_where_others_of_the_class_or_smoke_disturb(seen):
    said = say(a_world(fires=[BLAZE]), {"car": (0, 1)} | seen)
    assert any("cars" in c for c in said) and not any("two" in c for c in said)


def test_what_burns_keeps_its_color():
    here = a_world(paint={("car", 0): "red"}, fires=[BLAZE._replace(on=("car", 0))])
    said = " ".join(say(here, {"car": (0,), "fire": (0,), "smoke": (0,)}, 300))
    for phrase in ("a burning red car", "a red car on fire", "a burning car", "a burning red car with fire and"):
        assert phrase in said
    assert "burning" not in " ".join(say(here, {"car": (0,)}))  # flames that nobody sees


def test_clothes_and_bicycles_have_colors():
    paint = {("person", 0): "red", ("rider", 0): "blue", ("bicycle", 100): "green"}
    said = " ".join(say(a_world(paint=paint), {"person": (0,), "rider": (0,), "bicycle": (100,)}, 400))
    for phrase in (
        "a person in red",
        "a person in a red shirt",
        "a rider in blue",
        "a cyclist in blue on a green bike",
    ):
        assert phrase in said


def test_sparse_captions_say_less():
    paint, sparse, dense = {("car", 0): "red", ("tree", 0): "green"}, [], []
    names = ("car", "tree", "person", "rider", "pole", "building", "sky", "ground", "road", "mountain")
    seen = {name: (0,) for name in names}
    for kind, found in ((False, sparse), (True, dense)):
        found += say(a_world(paint=paint), seen, 200, kind)
    assert np.mean([len(tokens(c)) for c in sparse]) < 0.75 * np.mean([len(tokens(c)) for c in dense])
    assert max(c.count(" a ") + c.count(",") for c in sparse) <= 12
    usual, again = street.render_both(7)
    assert usual.caption == street.render(7, dense=False).caption and again.caption == street.render(7).caption
    assert (usual.image == again.image).all()


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
    dark = BLAZE
    bright = dark._replace(smoke_color=(180, 180, 180), instance=1)
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
    forest = a_world(theme="forest", fires=[BLAZE])
    assert "forest fire with smoke" in say(forest, {"tree": (0, 1, 2, 3), "fire": (0,), "smoke": (0,)}, 400)
    flood = a_world(shore=0.6, kind={("building", 0): "house", ("building", 1): "house"})
    assert any("flooded neighbourhood" in c for c in say(flood, {"building": (0, 1), "water": (0,)}, 200))
    assert not any("neighbourhood" in c for c in say(flood, {"building": (0,), "water": (0,)}, 200))
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


def test_near_views():
    """A window of the scene at twice the size; what is named fills enough of it; half of them have no sky."""
    skies, named = [], set()
    for s in range(street.HELD_OUT, street.HELD_OUT + 40):
        near, whole = street.render(s, 32, near=True), street.render(s, 64)
        windows = np.lib.stride_tricks.sliding_window_view(whole.image, (32, 32, 3))[:, :, 0]
        [at] = np.argwhere((windows == near.image).all((2, 3, 4)))[:1]
        window = np.s_[at[0] : at[0] + 32, at[1] : at[1] + 32]
        assert (near.labels == whole.labels[window]).all() and near.caption.startswith("near view of ")
        assert (near.caption, near.words) == (street.render(s, 32, near=True).caption, near.words)
        assert all(near.mask(word).mean() >= VISIBLE_AREA for word in near.words) and near.words
        skies.append("sky" in {street.CLASSES[k] for k in np.unique(near.labels)})
        named |= set(near.words.values())
    assert 0.25 < np.mean(skies) < 0.75 and {"sky", "ground", "road"} <= named


def test_something_is_named_in_every_near_view():
    """Where chance leaves out sky and ground, and there is nothing else."""
    for seen, word in (({"ground": (0,)}, "grass"), ({"sky": (0,)}, "sky"), ({"water": (0,)}, "water")):
        for s in range(20):
            rng = np.random.default_rng(s)
            caption, words = write_caption(rng, World("day", "grass", "country", horizon=0.4), seen, near=True)
            assert set(words.values()) == {street.WORDS[word]}, caption


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


def test_where_things_may_stand():
    """Not in a river, nor cut by the upper border; houses of a flood in the water."""
    rng = np.random.default_rng(0)
    dry, flood = a_world(river=(0.6, 0.8), zoom=1.3), a_world(shore=0.65)
    riders = [spot for _ in range(200) if (spot := street._spot(rng, dry, "rider"))]
    assert len(riders) > 10 and all(spot.y > 0.8 and spot.box[1] >= 0 for spot in riders)
    houses = [spot for _ in range(200) if (spot := street._spot(rng, flood, "house"))]
    assert len(houses) > 20 and all(spot.y > 0.65 for spot in houses)


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
