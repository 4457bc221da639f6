"""Colors, numbers and likeness of drawn images: of models that do exactly what is asked, or exactly the wrong thing."""

from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
from PIL import Image

import attnlab as al
from attnlab.scenes import street
from experiments.bundled import cards, colors, counting, likeness
from experiments.bundled.seen import Seen, draw_images, rate, regions, restore_seen
from experiments.studies.pair_quality import frechet_distance

PAINTS = {"red": (200, 40, 40), "blue": (60, 80, 190), "yellow": (220, 190, 60), "white": (230, 230, 225)}
PAINTS |= {"green": (60, 140, 70)}
NUMBER = {name: k for k, name in enumerate(street.CLASSES)}


def picture(things, light=1.0, seed=0):
    """Image and labels (row, column) of squares of (class, color), side by side on gray ground, in some light."""
    image = np.random.default_rng(seed).normal(120, 8, (64, 64, 3))
    labels = np.full((64, 64), NUMBER["ground"], np.uint8)
    for k, (name, color) in enumerate(things):
        place = slice(20, 34), slice(1 + 16 * k, 13 + 16 * k)
        image[place], labels[place] = image[place] - 120 + PAINTS[color], NUMBER[name]
    return (image * light).clip(0, 255).astype(np.uint8), labels


def painted(seed):
    """Caption, image and labels of one thing in a color, in light of any color."""
    rng = np.random.default_rng(seed)
    name, color = ("car", "building", "person")[seed % 3], sorted(PAINTS)[seed // 3 % len(PAINTS)]
    light = rng.uniform(0.4, 1, 3)
    return colors.color_prompt((name, color)), *picture([(name, color)], light, seed)


def seen(numbers):
    captions, images, labels = zip(*map(painted, numbers), strict=True)
    return Seen(list(captions), np.stack(images), np.stack(labels))


class Painter:
    """A pipeline that draws the squares that `things_of` makes of a prompt, and the segmenter that sees them."""

    classes = street.CLASSES

    def __init__(self, things_of):
        self.things_of, self.labels = things_of, {}

    def __call__(self, prompts, generator, **call):
        images = []
        for prompt, one in zip(prompts, generator, strict=True):
            image, labels = picture(self.things_of(prompt), seed=one.initial_seed())
            self.labels[image.tobytes()] = labels
            images.append(Image.fromarray(image))
        return SimpleNamespace(images=images)

    def segment(self, images):
        return np.stack([self.labels[image.tobytes()] for image in images])


def test_regions_by_hand():
    """Two touch at a corner and are one; 16 pixels of 4096 are below 0.4 %, 17 are not."""
    labels = np.zeros((64, 64), np.uint8)
    labels[0:4, 0:4] = labels[10:15, 10:15] = labels[15:20, 15:20] = labels[40:44, 40:44] = 3
    labels[44, 44] = 3
    labels[50:60, 0:10] = 2
    assert [mask.sum() for mask in regions(labels, 3)] == [50, 17]
    assert regions(labels, 3)[0][12, 12] and regions(labels, 3)[1][44, 44]
    assert regions(labels, 5) == []


def test_rate():
    assert rate([True] * 8 + [False] * 2) == {
        "rate": 0.8,
        "interval": pytest.approx([0.490, 0.943], abs=1e-3),
        "of": 10,
    }
    assert rate([]) == {"rate": 0.0, "interval": [0.0, 1.0], "of": 0}


def test_the_same_images_in_any_batches(pipe):
    """Each has the noise of its own seed; the first is that of a call without this helper."""
    prompts, seeds = ["a red car", "a house", "smoke"], [5, 6, 9]
    images = draw_images(pipe, prompts, seeds, batch=2, steps=2)
    alone = pipe("a red car", num_inference_steps=2, guidance_scale=4.0, generator=al.seed(5)).images[0]
    assert np.abs(images[0].astype(int) - np.asarray(alone)).max() <= 2
    again = draw_images(pipe, prompts[2:], seeds[2:], steps=2)
    assert np.abs(images[2].astype(int) - again[0]).max() <= 2 and images.dtype == np.uint8


def test_numbers_of_models_that_count_and_that_do_not():
    scenes = [("a road and two cars", 2), ("two cars with smoke", 1), ("three cars", 3), ("a car", 1)]
    labels = np.stack([picture([("car", "red")] * number)[1] for _, number in scenes])
    told = Seen([caption for caption, _ in scenes], None, labels)
    for off, expected in ((0, 1), (-1, 0), (1, 0)):

        def things(prompt, off=off):
            name, number = counting.NUMBER_PROMPTS[prompt]
            return [(name, "red")] * (number + off)

        model = Painter(things)
        found = counting.number_rates(model, model, told, images=3)
        assert {row["rate"] for row in found.values()} == {expected}
        assert found["three people"]["mean"] == 3 + off and found["two trees"]["of"] == 3
    assert found["two cars"]["scenes"]["rate"] == 0.5 and found["two cars"]["scenes"]["of"] == 2
    assert found["three cars"]["scenes"]["of"] == 1 and found["two people"]["scenes"]["of"] == 0


def test_colors_are_read_in_any_light():
    """White in blue light is as blue as blue in white light: the rest of the image tells them apart."""
    reader = colors.ColorReader(seen(range(300)))
    hits = reader.hits(seen(range(1000, 1150)))
    assert set(hits) == {(name, color) for name in ("car", "building", "person") for color in PAINTS}
    assert np.mean([*chain(*hits.values())]) > 0.97
    image, labels = picture([("car", "red"), ("building", "blue")])
    assert (reader.read(image, labels, "car"), reader.read(image, labels, "building")) == ("red", "blue")
    assert reader.read(image, labels, "person") is None
    image, labels = picture([("car", "red"), ("car", "blue")])  # of which is the color?
    assert reader.hits(Seen(["a red car"], image[None], labels[None])) == {}
    with pytest.raises(ValueError, match="60 scenes show too few persons of known color"):
        colors.ColorReader(seen(number for number in range(90) if number % 3 < 2))


def test_models_that_obey_exchange_and_ignore_colors():
    tuning, scenes = seen(range(300)), seen(range(1000, 1060))

    def rates(things_of):
        model = Painter(things_of)
        return colors.color_rates(model, model, tuning, scenes, images=4)

    found = rates(street.colors_said)
    assert {(row["rate"], row["unasked"], row["of"]) for row in found["one"].values()} == {(1, 0, 4)}
    assert {(row["rate"], row["exchanged"], row["of"]) for row in found["two"].values()} == {(1, 0, 2)}
    assert found["one"]["a red car"]["scenes"] == rate([True] * 4) and len(found["one"]) == 12

    def exchanged(prompt):
        names, paints = zip(*street.colors_said(prompt), strict=True)
        return list(zip(names, paints[::-1], strict=True))

    assert {(row["rate"], row["exchanged"]) for row in rates(exchanged)["two"].values()} == {(0, 1)}
    row = rates(lambda prompt: [("car", "red"), ("building", "blue")])["two"]["a red car and a blue house"]
    assert (row["rate"], row["exchanged"]) == (0.5, 0.5)
    found = rates(lambda prompt: [(name, "red") for name, _ in street.colors_said(prompt)])
    assert (found["one"]["a red car"]["rate"], found["one"]["a red car"]["unasked"]) == (1, 1)
    assert (found["one"]["a blue car"]["rate"], found["one"]["a blue car"]["unasked"]) == (0, 0)
    nothing = rates(lambda prompt: [])
    assert {row["rate"] for kind in ("one", "two") for row in nothing[kind].values()} == {0}


def test_colors_and_numbers_of_rendered_scenes():
    """With exact labels, what captions say is read from the pixels, and counted."""
    scenes = [street.render(s) for s in range(450)]
    told = Seen([s.caption for s in scenes], np.stack([s.image for s in scenes]), np.stack([s.labels for s in scenes]))
    hits = colors.ColorReader(Seen(*(of[:300] for of in told))).hits(Seen(*(of[300:] for of in told)))
    assert np.mean([*chain(*hits.values())]) > 0.85
    model = Painter(lambda prompt: [])
    found = counting.number_rates(model, model, told, images=1)
    numbers = [row["scenes"]["rate"] for row in found.values() if row["scenes"]["of"]]
    assert len(numbers) >= 4 and min(numbers) > 0.7 and np.mean(numbers) > 0.9


def test_frechet_distance_against_the_root_of_a_matrix():
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(300, 6)) @ rng.normal(size=(6, 6)) + shift for shift in (0, 2))
    root = scipy.linalg.sqrtm(np.cov(x.T) @ np.cov(y.T)).real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(np.cov(x.T) + np.cov(y.T) - 2 * root)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-6)


def test_quality_of_a_model_that_draws_scenes_and_of_one_that_draws_noise(pipe):
    segmenter, scenes = al.load_segmenter("street", "cpu"), [street.render(s) for s in range(40)]

    def quality(image_of):
        def draw(prompts, generator, **call):
            return SimpleNamespace(images=[image_of(one.initial_seed()) for one in generator])

        draw.vae = pipe.vae
        return likeness.image_quality(draw, segmenter, scenes)

    found = quality(lambda number: Image.fromarray(scenes[number].image))
    assert found["images"] == 20 and found["drawn"] == found["rendered"]
    noise = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), dtype=np.uint8)
    bad = quality(lambda number: Image.fromarray(noise[number]))
    assert bad["drawn"] > 3 * bad["restored"] and bad["rendered"] == found["rendered"] > 0


def test_copies_by_hand():
    """Images that depend on their noise alone, but for a shift of one gray level for each prompt."""
    noise = np.random.default_rng(0).integers(0, 200, (5, 8, 8, 3))

    def draw(prompts, generator, **call):
        shifts = [likeness.NEAR_PROMPTS.index(prompt) for prompt in prompts]
        images = [noise[one.initial_seed()] + k for one, k in zip(generator, shifts, strict=True)]
        return SimpleNamespace(images=[Image.fromarray(image.astype(np.uint8)) for image in images])

    found = likeness.noise_copies(draw)
    shifts = [(a - b) ** 2 for a in range(6) for b in range(a)]
    assert found["same noise"] == pytest.approx(10 * np.log10(255**2 / np.mean(shifts)))
    pairs = [(a, b) for b in range(6) for a in range(b)]
    other = np.mean([(noise[k] + a - noise[k - 1] - b) ** 2 for k in range(5) for a, b in pairs])
    assert found["other noise"] == pytest.approx(10 * np.log10(255**2 / other))


def test_restored_scenes(pipe):
    segmenter, scenes = al.load_segmenter("street", "cpu"), [street.render(s) for s in range(6)]
    found = restore_seen(pipe.vae, segmenter, scenes)
    assert found.captions == [scene.caption for scene in scenes] and found.images.dtype == np.uint8
    assert 2 < np.abs(found.images.astype(int) - np.stack([scene.image for scene in scenes])).mean() < 15
    assert (found.labels == np.stack([scene.labels for scene in scenes])).mean() > 0.8
    np.testing.assert_array_equal(found.labels, segmenter.segment(found.images))


def test_tables():
    own = {"rate": 0.9, "interval": [0.8, 1.0], "of": 20}
    row = {"rate": 0.5, "interval": [0.25, 0.75], "of": 50}
    measured = {
        "colors": {
            "images": 50,
            "one": {
                "a red car": row | {"unasked": 0.125, "scenes": own},
                "a blue car": row | {"unasked": 0.0, "scenes": own},
            },
            "two": {"a red car and a blue house": row | {"exchanged": 0.25}},
        },
        "numbers": {"two cars": row | {"mean": 1.5, "scenes": own}},
        "quality": {"images": 300, "drawn": 4.0, "restored": 2.0, "rendered": 1.0},
        "copies": {"same noise": 14.0, "other noise": 10.0},
    }
    text = "\n".join(cards._prompt_tables(measured))
    assert "| a red car | 0.500 (0.250 to 0.750) | 0.125 | 0.900 (0.800 to 1.000) of 20 |" in text
    assert "| a red car and a blue house | 0.500 (0.250 to 0.750) | 0.250 |" in text
    assert "| two cars | 0.500 (0.250 to 0.750) | 1.500 | 0.900 (0.800 to 1.000) of 20 |" in text
    assert text.count("| mean | 0.500 |") == 3 and "4.000" in text and "14.0 dB" in text
