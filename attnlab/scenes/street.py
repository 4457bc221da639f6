"""Render streets, countryside and disasters: `street.render(seed)` gives a `Scene` with exact masks.

    from attnlab.scenes import street
    scene = street.render(3331)
    scene.caption                    # 'a house left of a burning house with sky and black smoke'
    scene.mask("smoke")              # bool (row, column)

Seeds below `HELD_OUT` are for training, those from there on for evaluation.
"""

import copy
import itertools
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from . import captions, objects, world
from .canvas import Canvas, downsample, number_things, smooth_noise
from .captions import colors_said
from .fire import add_glow, add_smoke, draw_fire
from .scene import Scene

__all__ = ["CLASSES", "HELD_OUT", "PARTS", "THIN", "THINGS", "WORDS", "colors_said", "render", "render_both"]
__all__ += ["render_with"]

CLASSES = tuple(captions.WORDS_OF)
THIN = ("traffic light", "pole", "bicycle")  # classes of a few pixels' width
# classes whose things are counted; not smoke, whose plumes mingle. The far blocks of a skyline are no single things
THINGS = ("building", "tree", "car", "person", "traffic light", "pole", "rider", "bicycle", "fire")
PARTS = ("", "roof", "window", "door", "wheel", "trunk", "crown")
WORDS = captions.CLASS_OF  # every word that names a class, and the class
HELD_OUT = 1_000_000  # first seed that no bundled model was trained on


class _Theme(NamedTuple):
    """The kind of place that a scene shows."""

    fraction: float  # of all scenes
    chances: tuple[float, ...]  # of mountains, a skyline, a road, sidewalks beside it, a river, a flood, a fire
    objects: tuple[int, int]  # the fewest and the most in a scene
    several: float  # how often two or three of a kind are among them
    weights: dict[str, float]  # relative frequency of each kind of object


_THEMES = {
    "city": _Theme(
        0.34, (0.04, 0.6, 0.95, 0.8, 0.0, 0.08, 0.2), (1, 5), 0.45,
        {"car": 3, "person": 2.4, "traffic light": 2, "rider": 2.2, "block": 1.6, "house": 0.3, "tree": 0.7,
         "pole": 0.9, "bicycle": 1.2},
    ),
    "suburb": _Theme(
        0.21, (0.2, 0.0, 0.6, 0.5, 0.05, 0.3, 0.38), (1, 5), 0.45,
        {"house": 3.5, "tree": 1.8, "car": 2, "person": 1.6, "rider": 0.7, "bicycle": 0.9, "pole": 0.5},
    ),
    "country": _Theme(
        0.12, (0.6, 0.0, 0.25, 0.0, 0.5, 0.15, 0.3), (0, 4), 0.35,
        {"house": 1.5, "tree": 1.8, "person": 1.1, "car": 1, "rider": 0.5},
    ),
    "forest": _Theme(
        0.09, (0.3, 0.0, 0.2, 0.0, 0.15, 0.05, 0.6), (5, 8), 0.0, {"tree": 12, "house": 0.3, "person": 0.4}
    ),
    "single": _Theme(
        0.24, (0.12, 0.1, 0.3, 0.2, 0.1, 0.04, 0.22), (0, 1), 0.5,
        {"house": 1, "block": 0.6, "tree": 0.9, "car": 1.3, "person": 1.4, "traffic light": 1, "pole": 0.9,
         "rider": 1.2, "bicycle": 1.3},
    ),
}  # fmt: skip
_BOXES = {  # width and height of an object at scale 1, and of a fire
    "house": (0.5, 0.42), "block": (0.4, 0.6), "tree": (0.33, 0.54), "car": (0.48, 0.25), "person": (0.32, 0.5),
    "rider": (0.54, 0.64), "bicycle": (0.54, 0.36), "pole": (0.36, 0.64), "traffic light": (0.18, 0.74),
    "fire": (0.4, 0.3),
}  # fmt: skip
_LIMITED = ("block", "pole", "traffic light", "fire")  # are drawn lower where they would leave the image
_STANDS = {  # where objects of a kind stand if there is a road, and how often
    "car": ("road", 0.8), "rider": ("road", 0.8), "person": ("sidewalk", 0.6), "bicycle": ("sidewalk", 0.6),
    "traffic light": ("sidewalk", 0.9), "pole": ("sidewalk", 0.8),
}  # fmt: skip
_TALL = ("house", "block", "tree")
_FLAMMABLE = (*_TALL, "car")
_TEXTURE = {  # of a class: strength of coarse noise, of fine noise and of waves
    "ground": (0.10, 0.10, 0), "road": (0.05, 0.08, 0), "sidewalk": (0.03, 0.05, 0), "water": (0.04, 0.02, 0.16),
    "mountain": (0.14, 0.08, 0), "building": (0.02, 0.04, 0.03), "tree": (0.06, 0.22, 0),
}  # fmt: skip


def render(seed: int, size: int = 64, dense: bool = True, near: bool = False) -> Scene:
    """Render a street scene, which depends on the arguments alone.

    Parameters
    ----------
    seed : int
        0 or above.
    size : int
        Side of the image in pixels, at least 32; made for 64 and 128. The same seed shows the same world at every
        size; the caption may differ, for it names only what covers enough pixels.
    dense : bool
        Whether most captions name all that can be seen, with colors, and not just one to five things.
    near : bool
        Whether only a part of the scene is seen, from half the distance, and the caption begins with "near view of".
        Many of these show no sky or no ground, which all other scenes have.

    Returns
    -------
    Scene
        With image uint8 (size, size, 3), labels, parts and instances uint8 (size, size).

    Raises
    ------
    ValueError
        If `seed` is below 0 or `size` below 32.
    """
    return _caption(*_picture(seed, size, near), dense, near)


def render_both(seed: int, size: int = 64) -> tuple[Scene, Scene]:
    """Render a scene once, and return it with a sparse caption and with its dense one.

    Parameters
    ----------
    seed, size
        As in `render`.
    """
    told, *arrays = _picture(seed, size)
    again = copy.deepcopy(told)  # both captions are drawn from the same random state
    return _caption(told, *arrays, dense=False), _caption(again, *arrays, dense=True)


def _picture(seed, size, near=False):
    """Draw a scene: what its caption is written from (random state, world, visible objects), and its arrays."""
    if seed < 0 or size < 32:
        raise ValueError(f"street.render wants seed >= 0 and size >= 32, not seed={seed}, size={size}")
    rng = np.random.default_rng([seed, 0x57])
    canvas, here = Canvas(2 * size if near else size), _new_world(rng)
    burns = _backdrop(canvas, rng, here)
    _objects(canvas, rng, here, burns)
    rgb, ids = canvas.arrays()
    rgb = _light(rgb * _texture(rng, canvas, ids)[..., None] * _shadows(canvas, ids, here), canvas, ids, here)
    for flames in here.fires:
        if flames.smoke:
            rgb, ids = add_smoke(canvas, rng, rgb, ids, flames)
    if here.time == "snow":
        rgb = world.snowfall(rng, rgb)
    image, ids = downsample(rgb, ids)
    if near:
        where = np.random.default_rng([seed, 0x4E])
        left, top = where.integers(size + 1, size=2)
        top = size if where.uniform() < 0.5 else top  # the lower half, where there is no sky
        window = np.s_[top : top + size, left : left + size]
        image, ids = image[window], ids[window]
    lookup = np.array([(CLASSES.index(t.name), PARTS.index(t.part)) for t in canvas.things], dtype=np.uint8)
    labels, parts = lookup[ids, 0], lookup[ids, 1]
    instances = number_things(ids, canvas.things, _is_counted)
    return (rng, here, captions.count_visible(ids, canvas.things)), image, labels, parts, instances


def _is_counted(thing):
    return thing.name in THINGS and thing.instance != captions.SKYLINE


def _caption(told, image, labels, parts, instances, dense, near=False):
    caption, words = captions.write_caption(*told, dense, near)
    return Scene(image, caption, labels, parts, words, CLASSES, PARTS, instances)


def render_with(word: str, count: int, first: int = HELD_OUT, size: int = 64) -> list[Scene]:
    """Render the first `count` scenes from seed `first` on whose caption has `word`.

    Parameters
    ----------
    word : str
        One of `WORDS`.
    count, first : int
        Number of scenes; the first seed that is tried.
    size : int
        As in `render`.

    Returns
    -------
    list of Scene
        In the order of their seeds.

    Raises
    ------
    ValueError
        If no caption ever has the word.
    """
    if word not in WORDS:
        raise ValueError(f"no caption says {word!r}; words that name a class: {', '.join(WORDS)}")
    scenes = (render(seed, size) for seed in itertools.count(first))
    return list(itertools.islice((scene for scene in scenes if word in scene.words), count))


def _draw(rng, table):
    names = list(table)
    return names[rng.choice(len(names), p=[table[n][0] for n in names])]


def _new_world(rng):
    time = _draw(rng, world.HOURS)
    ground = "snow" if time == "snow" else _draw(rng, world.GROUNDS)
    return world.World(time, ground, _draw(rng, _THEMES), horizon=rng.uniform(0.36, 0.5), alike=rng.uniform() < 0.3)


def _backdrop(canvas, rng, here):
    """Draw everything behind the objects; return whether something burns in this scene."""
    world.sky(canvas, rng, here)
    mountain, skyline, road, walk, river, flood, burns = rng.uniform(size=7) < _THEMES[here.theme].chances
    if mountain:
        world.mountains(canvas, rng, here)
    if skyline:
        world.skyline(canvas, rng, here)
    world.ground(canvas, rng, here)
    if road:
        world.road(canvas, rng, here, walk, ahead=flood)
    if flood or river:
        (world.flood if flood else world.river)(canvas, rng, here)
    return bool(burns)


def _objects(canvas, rng, here, burns):
    """Draw the objects, from the farthest to the nearest, and the fires."""
    kinds = _kinds(rng, here, burns)
    spots = _spots(rng, here, kinds)
    fuel = [i for i, spot in enumerate(spots) if spot.kind in _FLAMMABLE]
    victim = fuel[-1 - int(rng.integers(min(2, len(fuel))))] if burns and fuel and "fire" not in kinds else None
    counts = {}
    for i, spot in enumerate(spots):
        if spot.kind == "fire":
            draw_fire(canvas, rng, here, spot.x, spot.y, rng.uniform(0.26, 0.4), on=("ground", 0))
            continue
        name = objects.CLASS_OF_KIND.get(spot.kind, spot.kind)
        instance = counts[name] = counts.get(name, -1) + 1
        here.feet[name, instance] = (spot.x, spot.y)
        here.place[name, instance] = "water" if spot.y > here.shore + 0.02 else spot.place
        anchor = objects.DRAW[spot.kind](canvas, rng, here, spot.x, spot.y, instance)
        wild = here.theme == "forest" and victim is not None and spot.kind == "tree" and rng.uniform() < 0.3
        if i == victim or wild:
            draw_fire(canvas, rng, here, *anchor, on=(name, instance))
    if rng.uniform() < 0.2:
        here.fires = [flames._replace(smoke=False) for flames in here.fires]


def _kinds(rng, here, burns):
    """Draw the kinds of the objects in a scene, "fire" among them if something burns that is no object."""
    _, _, (fewest, most), several, weights = _THEMES[here.theme]
    names, chances = list(weights), np.array(list(weights.values())) / sum(weights.values())
    kinds = [names[k] for k in rng.choice(len(names), rng.integers(fewest, most + 1), p=chances)]
    if here.flooded and "house" in weights and rng.uniform() < 0.7:
        kinds = ["house"] * rng.integers(2, 4) + kinds[:1]
    elif rng.uniform() < several:
        kind = names[rng.choice(len(names), p=chances)]
        kinds = [kind] * rng.integers(2, 4) + kinds[:2] * (here.theme != "single")
    bare = burns and not here.flooded and (rng.uniform() < 0.15 or not set(kinds) & set(_FLAMMABLE))
    return ["fire", *kinds] if bare else kinds


class _Spot(NamedTuple):
    y: float
    x: float
    kind: str
    place: str
    box: tuple[float, float, float, float]  # left, top, right, bottom

    def meets(self, other):
        """Return whether two objects overlap by a tenth of the smaller one; or nearly touch, if they are of a kind."""
        (a, b, c, d), (e, f, g, h) = self.box, other.box
        wide, high = min(c, g) - max(a, e), min(d, h) - max(b, f)
        if self.kind == other.kind:
            return wide > -0.02 and high > -0.02
        return wide > 0 and high > 0 and wide * high > 0.1 * min((c - a) * (d - b), (g - e) * (h - f))


def _spots(rng, here, kinds):
    """Draw where objects stand, from far to near: apart, if need be smaller; only trees of a forest overlap."""
    large = rng.uniform(0.92, 1.06) * (1.2 if len(kinds) < 2 else 1.05)
    for here.zoom in (large, 0.85 * large, 0.72 * large, 0.64 * large):
        spots = []
        for kind in kinds:
            others = [s for s in spots if not (here.theme == "forest" and kind == s.kind == "tree")]
            tries = filter(None, (_spot(rng, here, kind) for _ in range(24)))
            spots += itertools.islice((t for t in tries if not any(t.meets(s) for s in others)), 1)
        if len(spots) == len(kinds):
            break
    return sorted(spots)


def _spot(rng, here, kind):
    """Draw where an object may stand so that all of it is in the image; None where it may not."""
    place, often = _STANDS.get(kind, ("ground", 1))
    if here.road and rng.uniform() < often and place != "ground":
        x, y = here.road.spot(rng, here.horizon, place)
    else:
        far = here.shore + 0.05 if here.flooded and kind == "house" else here.horizon + 0.07
        place, x, y = "ground", rng.uniform(0.1, 0.9), rng.uniform(far, 0.85 if kind in _TALL else 0.95)
    y, scale = min(y, 0.97), 1 if kind == "fire" else here.scale(y)
    width, height = (scale * side for side in _BOXES[kind])
    x, top = min(max(x, width / 2 + 0.01), 0.99 - width / 2), max(y - height, 0 if kind in _LIMITED else -1)
    taken = place == "ground" and _taken(here, x, y)
    return None if top < 0 or taken else _Spot(y, x, kind, place, (x - width / 2, top, x + width / 2, y))


def _taken(here, x, y):
    """Return whether (x, y) lies on a road or in a river."""
    if here.river[0] - 0.02 < y < here.river[1] + 0.03:
        return True
    if here.road is None or y > here.shore:
        return False
    if here.road.y is not None:
        return abs(y - here.road.y) < here.road.half + here.road.walk
    depth = (y - here.horizon) / (1 - here.horizon)
    center, half = here.road.at(depth)
    return abs(x - center) < half + 0.12


def _texture(rng, canvas, ids):
    """Draw the relative brightness of every sample: float32 (row, column), about 0.7..1.3."""
    side = canvas.side
    coarse, fine = smooth_noise(rng, side, 12), smooth_noise(rng, side, 48)
    rows, columns = np.mgrid[0:side, 0:side].astype(np.float32) / side
    waves = np.sin(rows * rng.uniform(110, 150) + 1.6 * np.sin(columns * rng.uniform(15, 30)) + 2 * coarse)
    strength = [(0, 0, 0) if t.glows else _TEXTURE.get(t.name, (0, 0, 0)) for t in canvas.things]
    strength = np.array(strength, np.float32)[ids]
    gain = 1 + strength[..., 0] * coarse + strength[..., 1] * fine + strength[..., 2] * waves
    large, small = smooth_noise(rng, side, 5, aspect=2.5), smooth_noise(rng, side, 14, aspect=2.5)
    clouds = np.clip(large + small * 0.4, 0, 1)
    above = np.array([t.name == "sky" for t in canvas.things])[ids]
    return gain + above * clouds * rng.choice((0, 0.15, 0.3))


def _shadows(canvas, ids, here):
    """Return how much light reaches the ground under objects: float32 (row, column, 1), 0.6..1."""
    dark = Image.new("L", (canvas.side, canvas.side))
    pen = ImageDraw.Draw(dark)
    for x, y, width in here.shadows:
        box = (x - 0.6 * width, y - 0.02, x + 0.6 * width, y + 0.022)
        pen.ellipse([v * canvas.side for v in box], fill=255)
    dark = np.asarray(dark.filter(ImageFilter.GaussianBlur(0.01 * canvas.side)), np.float32) / 255
    flat = np.array([t.name in ("ground", "road", "sidewalk") for t in canvas.things])[ids]
    return (1 - 0.4 * dark * flat)[..., None]


def _light(rgb, canvas, ids, here):
    """Apply the light of the hour to everything that does not glow, and the glow of fires when it is dark."""
    light = np.ones((len(canvas.things), 3), np.float32)
    light[[not t.glows for t in canvas.things]] = world.HOURS[here.time][1]
    rgb = rgb * light[ids]
    return add_glow(rgb, here) if here.time in ("dusk", "night") else rgb
