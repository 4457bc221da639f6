"""How each thing of the street world is drawn. Lengths are fractions of the image's side, (x, y) is a thing's foot."""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .canvas import Canvas, Thing

PAINTS = {  # name a caption may use -> rgb; house red is a brick red, apart from flames
    "white": (236, 233, 226), "yellow": (228, 190, 84), "blue": (72, 104, 176), "brown": (140, 92, 60),
    "red": (168, 58, 52), "green": (74, 128, 88), "black": (40, 40, 46), "gray": (146, 146, 150),
}  # fmt: skip
HOUSE_PAINTS = ("white", "yellow", "blue", "brown", "red", "gray")
CAR_PAINTS = ("white", "yellow", "blue", "red", "black", "green")
ROOFS = ((118, 58, 44), (84, 78, 84), (150, 78, 52), (64, 54, 50))
SKINS = ((236, 194, 162), (198, 146, 108), (122, 82, 58))


@dataclass
class World:
    """What holds for the whole scene; `flooded` and `paint` are filled in while it is drawn."""

    time: str
    ground: str
    theme: str
    horizon: float
    flooded: bool = False
    paint: dict[tuple[str, int], str] = field(default_factory=dict)  # (class, instance) -> color name

    def scale(self, y: float) -> float:
        """Size of a thing whose foot stands at height y: nearer is lower in the image and larger."""
        return 0.8 + 0.5 * (y - self.horizon) / (1 - self.horizon)


class Fire(NamedTuple):
    """Where a fire burns: its foot, its size, what it burns, and its smoke."""

    x: float
    y: float
    width: float
    height: float
    instance: int
    on: tuple[str, int]
    smoke: bool
    smoke_color: tuple[float, float, float]
    wind: float


def places(rng, names, world):
    """A foot (x, y) for every name, sorted from far to near; feet keep apart sideways as far as there is room."""
    rows = np.sort(rng.uniform(world.horizon + 0.08, 0.95, len(names)))
    columns = []
    for _ in names:
        tries = rng.uniform(0.1, 0.9, 12)
        gaps = [min((abs(t - c) for c in columns), default=1) for t in tries]
        columns.append(tries[int(np.argmax(gaps))])
    return list(zip(columns, rows, strict=True))


def shade(color, factor):
    """A color made darker (factor below 1) or lighter."""
    return tuple(min(255, c * factor) for c in color)


def road(canvas: Canvas, rng, world):
    """A road across the image, or one that runs to the horizon."""
    h, gray = world.horizon, rng.uniform(78, 108)
    color, line = (gray, gray, gray + 6), (226, 222, 204)
    if rng.uniform() < 0.5:
        y, half = rng.uniform(h + 0.18, 0.86), rng.uniform(0.07, 0.12)
        canvas.rectangle((0, y - half, 1, y + half), color, Thing("road"))
        for x in np.arange(rng.uniform(-0.1, 0), 1, 0.16):
            canvas.rectangle((x, y - 0.009, x + 0.08, y + 0.009), line, Thing("road"))
        return
    far, near, half = rng.uniform(0.25, 0.75), rng.uniform(0.25, 0.75), rng.uniform(0.16, 0.26)
    canvas.polygon([(far - 0.03, h), (far + 0.03, h), (near + half, 1), (near - half, 1)], color, Thing("road"))
    for t in (0.12, 0.32, 0.56, 0.82):
        (x0, y0), (x1, y1) = ((far + (near - far) * s, h + (1 - h) * s) for s in (t, t + 0.1))
        canvas.polygon(
            [(x0 - 0.01 * t, y0), (x0 + 0.01 * t, y0), (x1 + 0.016 * t, y1), (x1 - 0.016 * t, y1)], line, Thing("road")
        )


def _shore(rng, y, amount):
    xs = np.linspace(0, 1, 14)
    return list(zip(xs, y + amount * np.sin(xs * rng.uniform(4, 12) + rng.uniform(0, 6)), strict=True))


def _water_color(rng, muddy):
    return np.array((104, 116, 110) if muddy else (52, 106, 168)) + rng.uniform(-12, 12, 3)


def river(canvas: Canvas, rng, world):
    """A band of water across the ground."""
    top = rng.uniform(world.horizon + 0.04, 0.78)
    upper, lower = _shore(rng, top, 0.015), _shore(rng, top + rng.uniform(0.14, 0.3), 0.02)
    canvas.polygon(upper + lower[::-1], _water_color(rng, muddy=False), Thing("water"))


def flood(canvas: Canvas, rng, world):
    """Water from somewhere on the ground down to the lower edge of the image, road included."""
    shore = _shore(rng, world.horizon + rng.uniform(0.05, 0.3), 0.02)
    canvas.polygon([*shore, (1, 1), (0, 1)], _water_color(rng, rng.uniform() < 0.6), Thing("water"))


def _waterline(canvas, rng, world, x, y, width):
    """In a flood water stands around the feet of things."""
    if world.flooded:
        color = _water_color(rng, muddy=True)
        canvas.ellipse((x - width * 0.62, y - 0.03, x + width * 0.62, y + 0.02), color, Thing("water"))


def house(canvas: Canvas, rng, world, x, y, instance):
    """A gabled house with roof, door and windows; its fire would rise from the eaves."""
    s = world.scale(y)
    w, h, roof = s * rng.uniform(0.3, 0.46), s * rng.uniform(0.17, 0.24), s * rng.uniform(0.1, 0.16)
    paint = str(rng.choice(HOUSE_PAINTS))
    world.paint["house", instance] = paint
    wall, left, right, eaves = PAINTS[paint], x - w / 2, x + w / 2, y - h
    canvas.rectangle((left, eaves, right, y), shade(wall, rng.uniform(0.88, 1.05)), Thing("house", instance))
    inset = rng.uniform(0.1, 0.5) * w
    tip = [(left + inset, eaves - roof), (right - inset, eaves - roof)]
    roof_color = ROOFS[rng.integers(len(ROOFS))]
    canvas.polygon([(left - 0.02, eaves), *tip, (right + 0.02, eaves)], roof_color, Thing("house", instance, "roof"))
    lit = world.time == "night" and rng.uniform() < 0.8
    glass = (255, 220, 120) if lit else (70, 86, 112)
    door = left + w * rng.choice((0.22, 0.5, 0.78))
    for column in (0.22, 0.5, 0.78):
        c = left + w * column
        if abs(c - door) > 0.01:
            box = (c - w * 0.085, y - h * 0.75, c + w * 0.085, y - h * 0.35)
            canvas.rectangle(box, glass, Thing("house", instance, "window", glows=lit))
    canvas.rectangle(
        (door - w * 0.07, y - h * 0.62, door + w * 0.07, y), (88, 54, 38), Thing("house", instance, "door")
    )
    _waterline(canvas, rng, world, x, y, w)
    return x, eaves + h * rng.uniform(0.1, 0.6), w * rng.uniform(0.7, 1.05)


def tree(canvas: Canvas, rng, world, x, y, instance):
    """A conifer of stacked triangles or a round tree of several puffs."""
    s = world.scale(y) * rng.uniform(0.85, 1.15)
    height, trunk, crown = 0.46 * s, Thing("tree", instance, "trunk"), Thing("tree", instance, "crown")
    green = np.array((46, 112, 52)) + rng.uniform(-16, 16, 3)
    canvas.rectangle((x - 0.022 * s, y - height * 0.45, x + 0.022 * s, y), (98, 68, 46), trunk)
    if rng.uniform() < 0.45:
        for k in range(3):
            base, half = y - height * (0.18 + 0.24 * k), s * (0.14 - 0.03 * k)
            leaf = shade(green, 0.75 + 0.1 * k)
            canvas.polygon([(x - half, base), (x, base - height * 0.4), (x + half, base)], leaf, crown)
    else:
        r = s * rng.uniform(0.09, 0.12)
        for dx, dy, grow in ((-0.6, 0, 0.9), (0.6, 0, 0.9), (0, 0.1, 1), (-0.25, -0.7, 0.9), (0.3, -0.6, 0.9)):
            cx, cy, rr = x + dx * r, y - height * 0.66 + dy * r, r * grow
            canvas.ellipse((cx - rr, cy - rr, cx + rr, cy + rr), shade(green, rng.uniform(0.8, 1.15)), crown)
    _waterline(canvas, rng, world, x, y, 0.12 * s)
    return x, y - height * 0.3, s * rng.uniform(0.2, 0.28)


def car(canvas: Canvas, rng, world, x, y, instance):
    """A car from the side: body, cabin, windows, two wheels."""
    s = world.scale(y)
    w, h = s * rng.uniform(0.3, 0.38), s * rng.uniform(0.15, 0.18)
    paint = str(rng.choice(CAR_PAINTS))
    world.paint["car", instance] = paint
    body, color, r = Thing("car", instance), PAINTS[paint], h * 0.24
    left, right, belt = x - w / 2, x + w / 2, y - h * 0.58
    canvas.polygon([(left, y - r), (left + 0.02 * w, belt), (right - 0.04 * w, belt), (right, y - r)], color, body)
    cabin = [(left + 0.16 * w, belt), (left + 0.3 * w, y - h), (right - 0.34 * w, y - h), (right - 0.16 * w, belt)]
    canvas.polygon(cabin, shade(color, 0.92), body)
    for a, b in ((0.23, 0.46), (0.5, 0.75)):
        top = y - h * 0.93
        pane = [
            (left + a * w, belt),
            (left + max(a, 0.32) * w, top),
            (left + min(b, 0.63) * w, top),
            (left + b * w, belt),
        ]
        canvas.polygon(pane, (176, 206, 222), Thing("car", instance, "window"))
    lamp = world.time == "night"
    canvas.rectangle(
        (right - 0.05 * w, belt + 0.02 * h, right, belt + 0.2 * h), (255, 240, 170), Thing("car", instance, glows=lamp)
    )
    for cx in (left + 0.22 * w, right - 0.22 * w):
        canvas.ellipse((cx - r, y - 2 * r, cx + r, y), (26, 26, 28), Thing("car", instance, "wheel"))
        canvas.ellipse(
            (cx - r / 2, y - 1.5 * r, cx + r / 2, y - r / 2), (150, 150, 156), Thing("car", instance, "wheel")
        )
    _waterline(canvas, rng, world, x, y, w)
    return x, y - h * 0.5, w * rng.uniform(0.5, 0.8)


def person(canvas: Canvas, rng, world, x, y, instance):
    """A standing person: head, shirt, arms and trousers."""
    s = world.scale(y)
    h, thing = s * rng.uniform(0.32, 0.4), Thing("person", instance)
    w, skin = h * 0.36, SKINS[rng.integers(len(SKINS))]
    shirt = PAINTS[str(rng.choice(("white", "yellow", "blue", "red", "green")))]
    trousers = PAINTS[str(rng.choice(("black", "blue", "brown", "gray")))]
    hip, neck = y - 0.45 * h, y - 0.78 * h
    for side in (-1, 1):
        canvas.rectangle((x + side * 0.04 * w, hip, x + side * 0.36 * w, y), trousers, thing)
        canvas.rectangle((x + side * 0.34 * w, neck + 0.02 * h, x + side * 0.54 * w, hip), shade(shirt, 0.85), thing)
    canvas.rectangle((x - 0.38 * w, neck, x + 0.38 * w, hip + 0.02 * h), shirt, thing)
    r = 0.12 * h
    canvas.ellipse((x - r, y - h, x + r, y - h + 2 * r), skin, thing)
    canvas.polygon(
        [(x - r, y - h + r * 0.8), (x - r * 0.7, y - h), (x + r * 0.7, y - h), (x + r, y - h + r * 0.8)],
        (62, 42, 30),
        thing,
    )
    _waterline(canvas, rng, world, x, y, w)
    return x, y, w


def fire(canvas: Canvas, rng, x, y, width, instance, on):
    """Tongues of flame, red outside and yellow within; gives light, so night does not dim it."""
    height, thing = rng.uniform(0.18, 0.3), Thing("fire", instance, glows=True)
    tongues = [
        (x + width * dx, height * (1 - 1.1 * abs(dx)) * rng.uniform(0.75, 1.1)) for dx in np.linspace(-0.4, 0.4, 5)
    ]
    half = width / 5.2
    for color, grow in (((214, 56, 18), 1.0), ((246, 128, 24), 0.72), ((255, 216, 84), 0.42)):
        for cx, tall in tongues:
            lean = rng.uniform(-0.3, 0.3) * half
            top, w = y - tall * grow, half * (0.55 + 0.45 * grow)
            outline = [
                (cx - w, y),
                (cx - w * 0.9, y - 0.4 * tall * grow),
                (cx + lean, top),
                (cx + w * 0.9, y - 0.4 * tall * grow),
                (cx + w, y),
            ]
            canvas.polygon(outline, color, thing)
    gray = rng.uniform(40, 90) if rng.uniform() < 0.6 else rng.uniform(140, 200)
    return Fire(x, y, width, height, instance, on, True, (gray, gray, gray * 1.03), rng.uniform(-0.35, 0.35))


def plume(rng, side, fire: Fire):
    """Opacity of a fire's smoke, float32 (side, side), 0..1."""
    alpha = Image.new("L", (side, side))
    pen = ImageDraw.Draw(alpha)
    start, end, widen = fire.y - fire.height * 0.6, rng.uniform(-0.1, 0.1), rng.uniform(0.06, 0.12)
    for t in np.linspace(0, 1, 16):
        r = (fire.width * 0.28 + widen * t) * rng.uniform(0.8, 1.2) * side
        cx = (fire.x + fire.wind * t**1.3 + rng.normal(0, 0.012)) * side
        cy = (start + (end - start) * t) * side
        pen.ellipse((cx - r, cy - r * 0.8, cx + r, cy + r * 0.8), fill=int(235 - 75 * t))
    return np.asarray(alpha.filter(ImageFilter.GaussianBlur(side * 0.018)), dtype=np.float32) / 255
