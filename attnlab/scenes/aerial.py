"""Render land seen from above: `aerial.render(seed)` gives a `Scene` with exact masks.

In the manner of LoveDA (Wang et al., NeurIPS Datasets 2021) and OpenEarthMap (Xia et al., WACV 2023): bare ground,
buildings, roads, water, trees, grass and fields, vehicles. Regions differ in what their colors mean: the roofs of one
look like the ground of another, so classes differ by shape and surroundings, and a few labels do not suffice.

    from attnlab.scenes import aerial
    scene = aerial.render(7)
    scene.labels, scene.classes      # uint8 (row, column), names
"""

import itertools
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .canvas import Canvas, Thing, downsample, number_things, smooth_noise
from .scene import Scene

__all__ = ["CLASSES", "HELD_OUT", "THINGS", "render"]

CLASSES = ("ground", "building", "road", "water", "tree", "grass", "vehicle")
THINGS = ("building", "vehicle")  # classes whose things are counted; not trees, of which only woods have an outline
HELD_OUT = 1_000_000  # first seed that no bundled model was trained on
_WIDTH = {"street": 0.075, "lane": 0.05, "track": 0.03}  # of roads
_CAR = (0.07, 0.036)  # length, width of a vehicle
_ROWS = (0.03, 0.06)  # shortest, longest distance of rows in a field


class _Region(NamedTuple):
    """The colors (rgb) of a region to choose from, one or more per class."""

    ground: tuple
    building: tuple
    road: tuple
    water: tuple
    tree: tuple
    grass: tuple


_REGIONS = {
    "temperate": _Region(
        ((152, 136, 108), (140, 132, 120)), ((150, 84, 66), (118, 112, 112), (172, 150, 134)), ((122, 122, 124),),
        ((52, 74, 86), (66, 92, 84)), ((48, 78, 42), (62, 88, 48)), ((106, 134, 70), (132, 142, 80), (160, 150, 92)),
    ),
    "arid": _Region(
        ((196, 168, 128), (182, 150, 112)), ((204, 180, 146), (222, 210, 190), (176, 148, 118)), ((170, 152, 130),),
        ((96, 120, 108), (122, 118, 92)), ((92, 100, 62), (76, 86, 56)), ((150, 146, 92), (116, 128, 68)),
    ),
    "winter": _Region(
        ((196, 194, 196), (166, 158, 152)), ((212, 214, 220), (132, 118, 114), (104, 104, 112)), ((138, 138, 142),),
        ((48, 58, 72), (168, 178, 190)), ((92, 88, 80), (70, 76, 68)), ((214, 214, 216), (186, 184, 170)),
    ),
    "tropical": _Region(
        ((168, 108, 76), (150, 112, 84)), ((160, 98, 72), (134, 130, 126), (188, 172, 160)), ((156, 116, 90),),
        ((126, 104, 74), (84, 96, 78)), ((44, 92, 44), (66, 108, 50)), ((94, 142, 66), (128, 150, 76)),
    ),
    "city": _Region(
        ((134, 130, 126), (148, 142, 134)), ((112, 110, 112), (140, 136, 134), (166, 120, 104)), ((104, 104, 108),),
        ((56, 70, 78), (74, 84, 80)), ((60, 78, 54), (70, 92, 60)), ((112, 126, 82), (96, 116, 70)),
    ),
}  # fmt: skip
# fraction of scenes; chances of a river, a lake, a wood; roads each way; fraction of cells with fields, with buildings
_THEMES = {
    "town": (0.3, 0.08, 0.08, 0.15, (2, 3), 0.1, 0.85),
    "village": (0.26, 0.15, 0.12, 0.4, (1, 2), 0.35, 0.55),
    "farmland": (0.2, 0.2, 0.1, 0.35, (0, 1), 0.85, 0.08),
    "forest": (0.12, 0.25, 0.25, 1.0, (0, 1), 0.15, 0.05),
    "shore": (0.12, 0.3, 0.9, 0.3, (0, 2), 0.3, 0.3),
}


def render(seed: int, size: int = 64) -> Scene:
    """Render land from above, which depends on `seed` and `size` alone.

    Parameters
    ----------
    seed : int
        0 or above.
    size : int
        Side of the image in pixels, at least 32. The same seed shows the same land at every size.

    Returns
    -------
    Scene
        With image uint8 (size, size, 3), labels and instances uint8 (size, size), and an empty caption.

    Raises
    ------
    ValueError
        If `seed` is below 0 or `size` below 32.
    """
    if seed < 0 or size < 32:
        raise ValueError(f"aerial.render wants seed >= 0 and size >= 32, not seed={seed}, size={size}")
    rng = np.random.default_rng([seed, 0xAE])
    land = _Land(rng, size)
    _cover(land)
    _water(land)
    _roads(land)
    _buildings(land)
    _trees(land)
    _vehicles(land)
    rgb, ids = land.canvas.arrays()
    image, ids = downsample(_sensor(rng, _light(land, rgb, ids)), ids)
    labels = np.array([CLASSES.index(thing.name) for thing in land.canvas.things], np.uint8)[ids]
    instances = number_things(ids, land.canvas.things, lambda thing: thing.name in THINGS)
    return Scene(image, "", labels, np.zeros_like(labels), {}, CLASSES, ("",), instances)


class _Land:
    """A scene while it is drawn; points are fractions of its side, along axes turned by `angle` about the center."""

    def __init__(self, rng, size):
        self.rng, self.canvas = rng, Canvas(size)
        self.region = _REGIONS[str(rng.choice(list(_REGIONS)))]
        names = list(_THEMES)
        self.theme = _THEMES[names[rng.choice(len(names), p=[_THEMES[n][0] for n in names])]]
        self.angle = rng.uniform(0, np.pi)
        self.sun = rng.uniform(0.4, 1.6) * np.array([np.cos(a := rng.uniform(0, 2 * np.pi)), np.sin(a)])
        self.shadow = Image.new("L", self.canvas.ids.size)
        self._pen = ImageDraw.Draw(self.shadow)
        self.roads: list[tuple[np.ndarray, float]] = []  # points of its middle, width
        self.lots: list[np.ndarray] = []  # corners of parking lots
        self.cells: list[tuple[np.ndarray, np.ndarray]] = []  # low and high corner of what lies between the roads
        self.rows: dict[int, tuple[float, float]] = {}  # number of a field: direction and distance of its rows

    def turned(self, points):
        c, s = np.cos(self.angle), np.sin(self.angle)
        return (np.asarray(points, float) - 0.5) @ np.array([[c, s], [-s, c]]) + 0.5

    def color(self, name, spread=12, rng=None):
        shades, rng = getattr(self.region, name), self.rng if rng is None else rng
        return np.clip(np.array(shades[rng.integers(len(shades))]) + rng.uniform(-1, 1, 3) * spread, 0, 255)

    def cast(self, points, height):
        """Draw the shadow of a flat roof over `points`; the roof itself lies in the light."""
        points, moved = np.asarray(points), np.asarray(points) + self.sun * height
        for t in np.linspace(0, 1, 6)[1:]:
            self._shade(points * (1 - t) + moved * t, 255)
        self._shade(points, 0)

    def _shade(self, points, value):
        self._pen.polygon([tuple(p) for p in points * self.canvas.side], fill=value)

    def is_free(self, point, among=("ground", "grass")):
        """Return whether a point inside the image shows one of these classes so far."""
        x, y = (int(v * self.canvas.side) for v in point)
        inside = 0 <= x < self.canvas.side and 0 <= y < self.canvas.side
        return inside and self.canvas.things[self.canvas.ids.getpixel((x, y))].name in among


def _box(low, high):
    return np.array([low, (high[0], low[1]), high, (low[0], high[1])])


def _cover(land):
    """Draw ground or grass, cut it into cells between the future roads, and draw fields in some of them."""
    rng, (*_, ways, fields, _) = land.rng, land.theme
    name = "grass" if rng.uniform() < 0.45 else "ground"
    land.canvas.rectangle((0, 0, 1, 1), land.color(name), Thing(name))
    lines = [np.sort(rng.uniform(-0.1, 1.1, rng.integers(ways[0], ways[1] + 1))) for _ in range(2)]
    lines = [line[np.diff(line, prepend=-1) > 0.22] for line in lines]
    land.lines = lines
    xs, ys = (np.concatenate([[-0.25], line, [1.25]]) for line in lines)
    for x0, x1 in itertools.pairwise(xs):
        for y0, y1 in itertools.pairwise(ys):
            land.cells.append((np.array([x0, y0]), np.array([x1, y1])))
            _fields(land, x0, y0, x1, y1, fields)


def _fields(land, x0, y0, x1, y1, chance):
    """Draw strips of a cell, each a field with or without rows, a meadow, or bare."""
    rng = land.rng
    cuts = np.concatenate([[x0], np.sort(rng.uniform(x0, x1, rng.integers(0, 4))), [x1]])
    for left, right in itertools.pairwise(cuts):
        if rng.uniform() > chance:
            continue
        grass = rng.uniform() < 0.8  # else a field that lies fallow: bare, with furrows
        thing = Thing("grass" if grass else "ground", len(land.canvas.things))
        land.canvas.polygon(land.turned(_box((left, y0), (right, y1))), land.color(thing.name, 22), thing)
        if rng.uniform() < 0.6:
            along = land.angle + (np.pi / 2 if rng.uniform() < 0.5 else 0)
            land.rows[land.canvas.number(thing)] = (along, rng.uniform(*_ROWS))


def _water(land):
    rng, (_, river, lake, *_) = land.rng, land.theme
    color, thing = land.color("water"), Thing("water")
    if rng.uniform() < river:
        t = np.linspace(-0.3, 1.3, 40)
        bend = rng.uniform(0.3, 0.7) + sum(
            rng.uniform(-0.12, 0.12) * np.sin(t * rng.uniform(3, 9) + rng.uniform(0, 6)) for _ in range(2)
        )
        turn = rng.uniform(0, np.pi)
        c, s = np.cos(turn), np.sin(turn)
        points = (np.stack([t, bend], 1) - 0.5) @ np.array([[c, s], [-s, c]]) + 0.5
        land.canvas.line(points, rng.uniform(0.05, 0.16), color, thing)
    if rng.uniform() < lake:
        land.canvas.polygon(_blob(rng, rng.uniform(0, 1, 2), rng.uniform(0.15, 0.45), 40), color, thing)


def _blob(rng, center, radius, count):
    angles = np.linspace(0, 2 * np.pi, count, endpoint=False)
    wave = 1 + sum(rng.uniform(-0.3, 0.3) / k * np.sin(k * angles + rng.uniform(0, 6)) for k in (1, 2, 3, 4))
    return center + radius * wave[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)


def _roads(land):
    """Draw a slightly bent road along each line between cells; sometimes also a winding track."""
    rng, t = land.rng, np.linspace(-0.4, 1.4, 24)
    color = land.color("road", 8)
    for axis, line in enumerate(land.lines):
        for at in line:
            kind = "street" if rng.uniform() < 0.4 else "lane"
            bend = rng.uniform(-0.02, 0.02) * np.sin(t * rng.uniform(2, 6) + rng.uniform(0, 6))
            points = np.stack([at + bend, t], 1) if axis == 0 else np.stack([t, at + bend], 1)
            land.roads.append((land.turned(points), _WIDTH[kind]))
    if rng.uniform() < 0.35:
        bend = rng.uniform(0.2, 0.8) + 0.12 * np.sin(t * rng.uniform(3, 8) + rng.uniform(0, 6))
        land.roads.append((land.turned(np.stack([t, bend], 1)), _WIDTH["track"]))
    for points, width in land.roads:
        land.canvas.line(points, width, color, Thing("road"))
        if width == _WIDTH["street"] and rng.uniform() < 0.6:
            land.canvas.line(points, 0.006, np.clip(color + 60, 0, 255), Thing("road"))


def _buildings(land):
    """Draw houses, blocks and halls in rows within cells, turned with them; some lots are for parking."""
    rng, chance, instance = land.rng, land.theme[-1], 0
    for low, high in land.cells:
        if rng.uniform() > chance:
            continue
        step = rng.uniform(0.14, 0.3)
        size = step * rng.uniform(0.55, 0.9, 2)
        gap = 0.04 + size.max() / 2
        for x in np.arange(low[0] + gap, high[0] - gap + 0.01, step):
            for y in np.arange(low[1] + gap, high[1] - gap + 0.01, step * rng.uniform(1, 1.3)):
                if rng.uniform() < 0.15:
                    continue
                own = np.random.default_rng(rng.integers(2**32))  # whether this one fits must not change the rest
                center, half = np.array([x, y]) + own.uniform(-0.01, 0.01, 2), size * own.uniform(0.75, 1, 2) / 2
                corners = land.turned(_box(center - half, center + half))
                if not all(land.is_free(p) for p in (*corners, corners.mean(0)) if (0 <= p).all() and (p < 1).all()):
                    continue
                if own.uniform() < 0.08:  # a parking lot: asphalt, labeled as road
                    land.canvas.polygon(corners, land.color("road", 8, own), Thing("road"))
                    land.lots.append(corners)
                    continue
                instance += 1
                _roof(land, own, corners, Thing("building", instance))


def _roof(land, rng, corners, thing):
    """Draw a flat roof, or one with a ridge whose far side is darker."""
    color = land.color("building", rng=rng)
    land.cast(corners, rng.uniform(0.02, 0.06))
    land.canvas.polygon(corners, color, thing)
    if rng.uniform() < 0.55:
        a, b, c, d = corners
        if np.linalg.norm(b - a) < np.linalg.norm(d - a):
            a, b, c, d = b, c, d, a
        dark = color * rng.uniform(0.72, 0.9)
        land.canvas.polygon([(a + d) / 2, (b + c) / 2, c, d], dark, thing)
    elif rng.uniform() < 0.5:  # what stands on flat roofs
        spot = corners.mean(0) + 0.25 * (corners[0] - corners.mean(0))
        land.canvas.circle(*spot, 0.012, np.clip(color * 1.25, 0, 255), thing)


def _trees(land):
    """Draw single trees, rows beside roads, and woods."""
    rng, wood = land.rng, land.theme[3]
    spots = list(rng.uniform(0, 1, (rng.integers(3, 16), 2)))
    if rng.uniform() < wood:
        for _ in range(rng.integers(1, 4)):
            center, spread = rng.uniform(0, 1, 2), rng.uniform(0.08, 0.2)
            spots += list(center + rng.normal(0, spread, (rng.integers(25, 70), 2)))
    if land.roads and rng.uniform() < 0.3:
        points, width = land.roads[rng.integers(len(land.roads))]
        spots += list(points[::2] + (0.6 * width + 0.02) * np.array([-np.sin(land.angle), np.cos(land.angle)]))
    color = land.color("tree")
    for x, y in spots:
        radius, height, tint = rng.uniform(0.015, 0.04), rng.uniform(0.01, 0.025), color + rng.uniform(-14, 14)
        if not land.is_free((x, y), ("ground", "grass", "tree")):
            continue
        ring = np.array((x, y)) + radius * np.stack([np.cos(a := np.linspace(0, 6.2, 10)), np.sin(a)], 1)
        land.cast(ring, height)
        land.canvas.circle(x, y, radius, np.clip(tint, 0, 255), Thing("tree"))
        lit = np.array((x, y)) - land.sun * 0.3 * radius
        land.canvas.circle(*lit, 0.5 * radius, np.clip(tint * 1.18, 0, 255), Thing("tree"))


def _vehicles(land):
    """Draw vehicles on both sides of roads, and in rows on parking lots."""
    rng = land.rng
    for points, width in land.roads:
        if width == _WIDTH["track"]:
            continue
        for _ in range(rng.integers(0, 4 if width == _WIDTH["lane"] else 7)):
            i = rng.integers(len(points) - 1)
            ahead = (points[i + 1] - points[i]) / np.linalg.norm(points[i + 1] - points[i])
            side = rng.choice((-1, 1))
            spot = points[i] + rng.uniform(0, 1) * (points[i + 1] - points[i])
            _car(land, spot + side * 0.22 * width * np.array([-ahead[1], ahead[0]]), ahead)
    for corners in land.lots:
        along, across = corners[1] - corners[0], corners[3] - corners[0]
        places = max(1, int(np.linalg.norm(along) / (1.5 * _CAR[1])))
        for k in range(places):
            if rng.uniform() < 0.65:
                _car(land, corners[0] + along * (k + 0.5) / places + 0.5 * across, across / np.linalg.norm(across))


def _car(land, spot, ahead):
    length, width = np.array(_CAR) * land.rng.uniform(0.85, 1.15)
    a, b = ahead * length / 2, np.array([-ahead[1], ahead[0]]) * width / 2
    body = land.rng.choice(((225, 225, 225), (40, 42, 48), (160, 40, 40), (60, 80, 130), (170, 172, 176)))
    if not land.is_free(spot, ("road",)):
        return
    corners = spot + np.array([a + b, a - b, -a - b, b - a])
    land.cast(corners, 0.012)
    thing = Thing("vehicle", len(land.canvas.things))
    land.canvas.polygon(corners, body, thing)
    glass = spot + np.array([0.35 * a + 0.8 * b, 0.35 * a - 0.8 * b, -0.1 * a - 0.8 * b, 0.8 * b - 0.1 * a])
    land.canvas.polygon(glass, np.array(body) * 0.45, thing)


# strength of coarse and fine noise, as a fraction of a color; roofs, roads and vehicles have (0.03, 0.03)
_NOISE = {"ground": (0.10, 0.06), "grass": (0.08, 0.07), "tree": (0.06, 0.2), "water": (0.05, 0.015)}


def _light(land, rgb, ids):
    """Apply the rows of fields, the texture of classes, and shadows."""
    side, rng = ids.shape[0], land.rng
    names = np.array([thing.name for thing in land.canvas.things])
    strength = np.array([_NOISE.get(name, (0.03, 0.03)) for name in names], np.float32)[ids]
    factor = 1 + strength[..., 0] * smooth_noise(rng, side, 6) + strength[..., 1] * smooth_noise(rng, side, 64)
    y, x = np.mgrid[:side, :side] / side
    for number, (along, distance) in land.rows.items():
        wave = np.sin(2 * np.pi * (x * np.sin(along) - y * np.cos(along)) / distance)
        factor = factor + np.where(ids == number, rng.uniform(0.06, 0.16) * wave, 0)
    shade = np.asarray(land.shadow.filter(ImageFilter.GaussianBlur(0.006 * side)), np.float32) / 255
    dark = rng.uniform(0.3, 0.6)
    return rgb * (factor * (1 - dark * shade))[..., None].astype(np.float32)


def _sensor(rng, rgb):
    """Apply haze, a blur, the gain and color balance of a camera, and its noise."""
    side = rgb.shape[0]
    haze = np.clip(rng.uniform(-0.25, 0.4) + 0.12 * smooth_noise(rng, side, 3), 0, 0.5)[..., None]
    rgb = rgb * (1 - haze) + np.array((198, 204, 214), np.float32) * haze
    gain = rng.uniform(0.75, 1.2) * rng.uniform(0.92, 1.08, 3)
    gray = rgb.mean(-1, keepdims=True)
    rgb = gray + (rgb - gray) * rng.uniform(0.6, 1.15)
    rgb = 255 * np.clip(rgb * gain / 255, 0, 1) ** rng.uniform(0.85, 1.2)
    picture = Image.fromarray(rgb.astype(np.uint8)).filter(ImageFilter.GaussianBlur(rng.uniform(0.001, 0.006) * side))
    return np.asarray(picture, np.float32) + rng.normal(0, rng.uniform(1, 9), rgb.shape).astype(np.float32)
