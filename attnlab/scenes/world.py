"""Draw what surrounds the objects of a street scene: sky, ground, road, water; and say where objects may stand.

Lengths are fractions of the image's side, x to the right and y down. The foot of an object is where it stands.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from .canvas import Canvas, Thing, smooth_noise

__all__ = ["GROUNDS", "HOURS", "Fire", "Road", "World", "flood", "ground", "mountains", "river", "road"]
__all__ += ["shade", "sky", "skyline", "snowfall", "wade"]

HOURS = {  # fraction of scenes, light (rgb factor), sky at the top and at the horizon (rgb)
    "day": (0.5, (1, 1, 1), (70, 130, 215), (180, 215, 245)),
    "overcast": (0.15, (0.9, 0.91, 0.93), (140, 145, 155), (205, 208, 212)),
    "dusk": (0.13, (0.97, 0.9, 0.86), (200, 85, 60), (255, 180, 95)),
    "night": (0.12, (0.66, 0.66, 0.75), (10, 12, 38), (38, 42, 82)),
    "snow": (0.1, (0.94, 0.96, 1), (172, 180, 192), (222, 226, 232)),
}
# fraction of scenes, color (rgb)
GROUNDS = {"grass": (0.68, (112, 166, 74)), "dirt": (0.2, (150, 112, 74)), "snow": (0.12, (230, 236, 243))}
_SKYLINE = ((126, 128, 140), (108, 112, 126), (146, 138, 136), (92, 98, 114))


class Road(NamedTuple):
    """A road across the image at height `y`; or, without `y`, one ahead, from (far, horizon) to (near, lower edge)."""

    half: float  # half its width; of a road ahead, at the lower edge
    walk: float  # width of the sidewalks beside it; 0 where there are none
    y: float | None = None
    far: float = 0.5
    near: float = 0.5

    def at(self, depth):
        """Return the center and the half width of a road ahead at a depth of 0 (horizon) to 1 (lower edge)."""
        return self.far + (self.near - self.far) * depth, 0.025 + (self.half - 0.025) * depth

    def spot(self, rng, horizon, place):
        """Draw a random foot (x, y) on its lanes ("road") or beside them ("sidewalk")."""
        side = rng.choice((-1, 1))
        if self.y is not None:
            shift = rng.uniform(-0.25, 0.9) * self.half if place == "road" else side * (self.half + self.walk / 2)
            return rng.uniform(0.1, 0.9), self.y + shift
        depth = rng.uniform(0.25, 0.92)
        center, half = self.at(depth)
        shift = rng.uniform(-0.5, 0.5) * half if place == "road" else side * (half + (0.5 * self.walk + 0.01) * depth)
        return float(np.clip(center + shift, 0.08, 0.92)), horizon + (1 - horizon) * depth


class Fire(NamedTuple):
    """A fire: its foot, its size, the object that it burns, and its smoke."""

    x: float
    y: float
    width: float
    height: float
    instance: int
    on: tuple[str, int]
    smoke: bool
    smoke_color: tuple[float, float, float]
    wind: float


@dataclass
class World:
    """What holds for a whole scene; everything from `zoom` on is filled in while the scene is drawn."""

    time: str
    ground: str
    theme: str
    horizon: float
    alike: bool = False  # whether all objects of a class have the same color
    zoom: float = 1.0  # how large objects are: the fewer, the larger
    road: Road | None = None
    shore: float = 1.0  # in a flood, everything below this height is under water
    water: tuple[float, float, float] = (52, 106, 168)
    river: tuple[float, float] = (1.0, 1.0)  # its upper and lower shore
    paint: dict[tuple[str, int], str] = field(default_factory=dict)  # (class, instance) -> color name
    kind: dict[tuple[str, int], str] = field(default_factory=dict)  # (class, instance) -> what a caption calls it
    feet: dict[tuple[str, int], tuple[float, float]] = field(default_factory=dict)  # (class, instance) -> (x, y)
    place: dict[tuple[str, int], str] = field(default_factory=dict)  # (class, instance) -> road, ground, ...
    shadows: list[tuple[float, float, float]] = field(default_factory=list)  # (x, y, width)
    fires: list[Fire] = field(default_factory=list)

    @property
    def flooded(self) -> bool:
        """Whether the lower part of the scene is under water."""
        return self.shore < 1

    def scale(self, y: float) -> float:
        """Return the relative size of an object whose foot is at height y: lower is nearer, so larger."""
        return self.zoom * (0.86 + 0.3 * (y - self.horizon) / (1 - self.horizon))


def shade(color, factor):
    """Make a color darker (factor below 1) or lighter (above)."""
    return tuple(min(255, c * factor) for c in color)


def sky(canvas: Canvas, rng, world: World) -> None:
    """Draw the sky, from the color of the zenith to that of the horizon; with stars at night."""
    _, _, top, bottom = HOURS[world.time]
    for y in np.arange(0, world.horizon, 0.02):
        color = np.array(top) + (np.array(bottom) - top) * (y / world.horizon)
        canvas.rectangle((0, y, 1, y + 0.04), color, Thing("sky", glows=True))
    if world.time == "night":
        for x, y in rng.uniform(0, 1, (25, 2)) * (1, world.horizon):
            canvas.rectangle((x, y, x + 0.008, y + 0.008), (230, 230, 210), Thing("sky", glows=True))


def mountains(canvas: Canvas, rng, world: World) -> None:
    """Draw a ridge above the horizon, sometimes with snow on its highest peaks."""
    h, xs = world.horizon, np.linspace(0, 1, 24)
    waves = sum(rng.uniform(0.4, 1) * np.sin(xs * rng.uniform(4, 16) + rng.uniform(0, 6)) / (k + 1) for k in range(4))
    ridge = np.minimum(h - rng.uniform(0.14, 0.26) + 0.05 * waves + rng.normal(0, 0.008, 24), h - 0.03)
    color = np.array((122, 112, 132)) + rng.uniform(-14, 14, 3)
    canvas.polygon([(0, h), *zip(xs, ridge, strict=True), (1, h)], color, Thing("mountain"))
    line = ridge.min() + 0.05
    if world.ground == "snow" or rng.uniform() < 0.4:
        cap = np.maximum(line + rng.normal(0, 0.008, 24), ridge)
        snow = [*zip(xs, ridge, strict=True), *zip(xs[::-1], cap[::-1], strict=True)]
        canvas.polygon(snow, (232, 234, 240), Thing("mountain"))


def skyline(canvas: Canvas, rng, world: World) -> None:
    """Draw the far blocks of a city, side by side along the horizon."""
    x, block = rng.uniform(-0.05, 0.0), Thing("building", 200)
    while x < 1:
        width, top = rng.uniform(0.09, 0.19), world.horizon - rng.uniform(0.08, 0.27)
        wall = np.array(_SKYLINE[rng.integers(len(_SKYLINE))]) + rng.uniform(-8, 8, 3)
        canvas.rectangle((x, top, x + width, world.horizon + 0.01), wall, block)
        lit = world.time == "night"
        glass = Thing("building", 200, "window", glows=lit)
        for row in np.arange(top + 0.025, world.horizon - 0.02, 0.045):
            for column in np.arange(x + 0.018, x + width - 0.02, 0.038):
                if not lit or rng.uniform() < 0.6:
                    pane = (column, row, column + 0.016, row + 0.02)
                    canvas.rectangle(pane, (236, 200, 110) if lit else shade(wall, 0.72), glass)
        x += width


def ground(canvas: Canvas, rng, world: World) -> None:
    """Fill everything below the horizon with the color of the ground."""
    color = np.array(GROUNDS[world.ground][1]) + rng.uniform(-14, 14, 3)
    canvas.rectangle((0, world.horizon, 1, 1), color.clip(0, 255), Thing("ground"))


def road(canvas: Canvas, rng, world: World, walk: bool, ahead: bool = False) -> None:
    """Draw a road across the image or one to the horizon (always if `ahead`); with sidewalks if `walk`."""
    h, gray = world.horizon, rng.uniform(98, 122)
    color, line, pavement = (gray, gray, gray + 6), (226, 222, 204), np.array((182, 176, 166)) + rng.uniform(-12, 12, 3)
    if rng.uniform() < 0.5 and not ahead:
        half = rng.uniform(0.1, 0.14)
        side = rng.uniform(0.07, 0.1) if walk else 0.0
        world.road = Road(half, side, y=rng.uniform(max(h + half + side + 0.03, 0.66), 0.84))
        y = world.road.y
        if walk:
            canvas.rectangle((0, y - half - side, 1, y + half + side), pavement, Thing("sidewalk"))
            for x in np.arange(rng.uniform(-0.1, 0), 1, 0.12):
                joint = (x, y - half - side, x + 0.006, y + half + side)
                canvas.rectangle(joint, shade(pavement, 0.86), Thing("sidewalk"))
        canvas.rectangle((0, y - half, 1, y + half), color, Thing("road"))
        for x in np.arange(rng.uniform(-0.1, 0), 1, 0.16):
            canvas.rectangle((x, y - 0.009, x + 0.08, y + 0.009), line, Thing("road"))
        return
    half, side = rng.uniform(0.22, 0.32), rng.uniform(0.14, 0.2) if walk else 0.0
    world.road = Road(half, side, far=rng.uniform(0.3, 0.7), near=rng.uniform(0.3, 0.7))

    def edge(depth, side, extra=0.0):
        center, half = world.road.at(depth)
        return center + side * (half + extra * depth), h + (1 - h) * depth

    if walk:
        walkway = [edge(0, -1), edge(0, 1), edge(1, 1, world.road.walk), edge(1, -1, world.road.walk)]
        canvas.polygon(walkway, pavement, Thing("sidewalk"))
    canvas.polygon([edge(0, -1), edge(0, 1), edge(1, 1), edge(1, -1)], color, Thing("road"))
    for t in (0.12, 0.32, 0.56, 0.82):
        (x0, _), (x1, _) = world.road.at(t), world.road.at(t + 0.1)
        y0, y1 = h + (1 - h) * t, h + (1 - h) * (t + 0.1)
        dash = [(x0 - 0.01 * t, y0), (x0 + 0.01 * t, y0), (x1 + 0.016 * t, y1), (x1 - 0.016 * t, y1)]
        canvas.polygon(dash, line, Thing("road"))


def _shore(rng, y, amount):
    xs = np.linspace(0, 1, 14)
    return list(zip(xs, y + amount * np.sin(xs * rng.uniform(4, 12) + rng.uniform(0, 6)), strict=True))


def river(canvas: Canvas, rng, world: World) -> None:
    """Draw a band of water across the ground."""
    world.water = tuple(np.array((52, 106, 168)) + rng.uniform(-12, 12, 3))
    top = rng.uniform(world.horizon + 0.04, 0.76)
    world.river = top, top + rng.uniform(0.15, 0.3)
    upper, lower = _shore(rng, top, 0.015), _shore(rng, world.river[1], 0.02)
    canvas.polygon(upper + lower[::-1], world.water, Thing("water"))


def flood(canvas: Canvas, rng, world: World) -> None:
    """Draw water from a random height down to the lower edge of the image; a road leads from the horizon into it."""
    clear, muddy = (60, 106, 150), (112, 112, 96)
    world.water = tuple(np.array(muddy if rng.uniform() < 0.6 else clear) + rng.uniform(-12, 12, 3))
    world.shore = world.horizon + (rng.uniform(0.1, 0.18) if world.road else rng.uniform(0.03, 0.12))
    canvas.polygon([*_shore(rng, world.shore, 0.02), (1, 1), (0, 1)], world.water, Thing("water"))


def wade(canvas: Canvas, rng, world: World, x, y, width, depth) -> None:
    """Hide the lowest `depth` of an object behind flood water, where its foot (x, y) is under water."""
    if y < world.shore + 0.02:
        return
    xs = np.linspace(-0.62, 0.62, 9) * width
    top = [(x + d, y - depth * (1 - 0.25 * abs(d) / width) + rng.uniform(-0.006, 0.006)) for d in xs]
    canvas.polygon([*top, (x + 0.62 * width, y + 0.012), (x - 0.62 * width, y + 0.012)], world.water, Thing("water"))


def snowfall(rng, rgb: np.ndarray) -> np.ndarray:
    """Add snowflakes over everything. Labels stay: each flake hides at most 40% of what is behind it."""
    side = rgb.shape[0]
    flakes = np.clip(smooth_noise(rng, side, 48) * 3 - 1.9, 0, 0.4)[..., None]
    return rgb + (np.array((246, 248, 252), np.float32) - rgb) * flakes
