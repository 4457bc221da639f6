"""Draw the objects of a street scene: one function per kind of object.

(x, y) is the foot of an object. Objects that may burn return (x, y, width) of the foot of their flames.
"""

import numpy as np

from .canvas import Canvas, Thing
from .world import World, shade, wade

__all__ = ["CLASS_OF_KIND", "DRAW"]

_PAINTS = {  # name a caption may use -> rgb; house red is a brick red, apart from flames
    "white": (236, 233, 226), "yellow": (228, 190, 84), "blue": (72, 104, 176), "brown": (140, 92, 60),
    "red": (168, 58, 52), "green": (74, 128, 88), "black": (40, 40, 46), "gray": (146, 146, 150),
}  # fmt: skip
_HOUSE_PAINTS = ("white", "yellow", "blue", "brown", "red", "gray")
_BLOCK_PAINTS = ("white", "yellow", "brown", "red", "gray", "blue")
_CAR_PAINTS = ("white", "yellow", "blue", "red", "black", "green")
_CLOTHES = ("white", "yellow", "blue", "red", "green")
_ROOFS = ((118, 58, 44), (84, 78, 84), (150, 78, 52), (64, 54, 50))
_SKINS = ((236, 194, 162), (198, 146, 108), (122, 82, 58))
_METAL, _RUBBER = (74, 76, 82), (26, 26, 28)
_LAMPS = {"red": (240, 44, 34), "yellow": (250, 200, 40), "green": (52, 226, 92)}


def _pick(rng, names):
    name = str(rng.choice(names))
    return name, _PAINTS[name]


def _house(canvas: Canvas, rng, world: World, x, y, instance):
    """Draw a gabled house with roof, door and windows; its flames would rise from below the eaves."""
    s = world.scale(y)
    w, h, roof = s * rng.uniform(0.32, 0.48), s * rng.uniform(0.18, 0.25), s * rng.uniform(0.11, 0.17)
    world.paint["building", instance], wall = _pick(rng, _HOUSE_PAINTS)
    world.kind["building", instance] = "house"
    left, right, eaves, body = x - w / 2, x + w / 2, y - h, Thing("building", instance)
    canvas.rectangle((left, eaves, right, y), shade(wall, rng.uniform(0.88, 1.05)), body)
    inset = rng.uniform(0.1, 0.5) * w
    tip = [(left + inset, eaves - roof), (right - inset, eaves - roof)]
    tiles = (226, 231, 238) if world.time == "snow" and rng.uniform() < 0.6 else _ROOFS[rng.integers(len(_ROOFS))]
    canvas.polygon([(left - 0.02, eaves), *tip, (right + 0.02, eaves)], tiles, Thing("building", instance, "roof"))
    lit = world.time == "night" and rng.uniform() < 0.8
    glass, pane = (255, 220, 120) if lit else (70, 86, 112), Thing("building", instance, "window", glows=lit)
    door = left + w * rng.choice((0.22, 0.5, 0.78))
    for column in (0.22, 0.5, 0.78):
        c = left + w * column
        if abs(c - door) > 0.01:
            canvas.rectangle((c - w * 0.085, y - h * 0.75, c + w * 0.085, y - h * 0.35), glass, pane)
    leaf = (door - w * 0.07, y - h * 0.62, door + w * 0.07, y)
    canvas.rectangle(leaf, (88, 54, 38), Thing("building", instance, "door"))
    world.shadows.append((x, y, w))
    wade(canvas, rng, world, x, y, w, 0.3 * h)
    return x, eaves + h * rng.uniform(0.1, 0.6), w * rng.uniform(0.7, 1.05)


def _block(canvas: Canvas, rng, world: World, x, y, instance):
    """Draw a building of several floors with a flat roof and rows of windows."""
    s = world.scale(y)
    w, h = s * rng.uniform(0.28, 0.4), s * rng.uniform(0.4, 0.58)
    world.paint["building", instance], wall = _pick(rng, _BLOCK_PAINTS)
    world.kind["building", instance] = "building"
    left, top, body = x - w / 2, y - h, Thing("building", instance)
    canvas.rectangle((left, top, left + w, y), shade(wall, rng.uniform(0.82, 0.98)), body)
    ledge = (left - 0.012, top - 0.03 * s, left + w + 0.012, top + 0.008)
    canvas.rectangle(ledge, shade(wall, 0.55), Thing("building", instance, "roof"))
    floors, columns = max(3, round(h / (0.12 * s))), rng.integers(3, 5)
    lit = world.time == "night"
    for floor in range(floors):
        base = top + (floor + 0.35) * h / floors
        for column in range(columns):
            on = lit and rng.uniform() < 0.55
            c = left + (column + 0.5) * w / columns
            if floor == floors - 1 and column == columns // 2:
                box, part, color = (c - 0.035 * s, base, c + 0.035 * s, y), "door", (74, 48, 38)
            else:
                box = (c - 0.26 * w / columns, base, c + 0.26 * w / columns, base + 0.45 * h / floors)
                part, color = "window", (255, 220, 120) if on else (74, 92, 118)
            canvas.rectangle(box, color, Thing("building", instance, part, glows=on and part == "window"))
    world.shadows.append((x, y, w))
    wade(canvas, rng, world, x, y, w, 0.12 * h)
    return x, y - h * rng.uniform(0.3, 0.75), w * rng.uniform(0.6, 0.95)


def _tree(canvas: Canvas, rng, world: World, x, y, instance):
    """Draw a conifer of stacked triangles or a round tree of several puffs."""
    s = world.scale(y) * rng.uniform(0.85, 1.15)
    height, trunk, crown = 0.46 * s, Thing("tree", instance, "trunk"), Thing("tree", instance, "crown")
    green = np.array((46, 112, 52)) + rng.uniform(-16, 16, 3)
    white = world.time == "snow" and rng.uniform() < 0.6
    canvas.rectangle((x - 0.022 * s, y - height * 0.45, x + 0.022 * s, y), (98, 68, 46), trunk)
    if rng.uniform() < 0.45:
        for k in range(3):
            base, half = y - height * (0.18 + 0.24 * k), s * (0.14 - 0.03 * k)
            canvas.polygon(_cone(x, base, half, 0.4 * height), shade(green, 0.75 + 0.1 * k), crown)
            if white:
                canvas.polygon(_cone(x, base - 0.2 * height, half / 2, 0.2 * height), (226, 232, 238), crown)
    else:
        r = s * rng.uniform(0.09, 0.12)
        for dx, dy, grow in ((-0.6, 0, 0.9), (0.6, 0, 0.9), (0, 0.1, 1), (-0.25, -0.7, 0.9), (0.3, -0.6, 0.9)):
            leaf = shade(green, rng.uniform(0.8, 1.15))
            canvas.circle(x + dx * r, y - height * 0.66 + dy * r, r * grow, leaf, crown)
    world.shadows.append((x, y, 0.2 * s))
    wade(canvas, rng, world, x, y, 0.1 * s, 0.16 * height)
    return x, y - height * 0.3, s * rng.uniform(0.2, 0.28)


def _cone(x, base, half, height):
    return [(x - half, base), (x, base - height), (x + half, base)]


def _car(canvas: Canvas, rng, world: World, x, y, instance):
    """Draw a car from the side: body, cabin, windows, two wheels; it faces left or right."""
    s = world.scale(y)
    w, h = s * rng.uniform(0.32, 0.4), s * rng.uniform(0.16, 0.19)
    world.paint["car", instance], color = _pick(rng, _CAR_PAINTS)
    body, pane, wheel = Thing("car", instance), Thing("car", instance, "window"), Thing("car", instance, "wheel")
    ahead, r, belt = rng.choice((-1, 1)), h * 0.24, y - h * 0.58

    def at(fraction):  # from -0.5 at the rear to 0.5 at the front
        return x + ahead * fraction * w

    canvas.polygon([(at(-0.5), y - r), (at(-0.48), belt), (at(0.46), belt + 0.06 * h), (at(0.5), y - r)], color, body)
    cabin = [(at(-0.38), belt), (at(-0.24), y - h), (at(0.12), y - h), (at(0.3), belt)]
    canvas.polygon(cabin, shade(color, 0.92), body)
    top = y - h * 0.92
    canvas.polygon([(at(-0.31), belt), (at(-0.21), top), (at(-0.07), top), (at(-0.07), belt)], (176, 206, 222), pane)
    canvas.polygon([(at(-0.02), belt), (at(-0.02), top), (at(0.1), top), (at(0.23), belt)], (176, 206, 222), pane)
    lamp = Thing("car", instance, glows=world.time == "night")
    canvas.rectangle((at(0.44), belt + 0.1 * h, at(0.5), belt + 0.26 * h), (255, 240, 170), lamp)
    for c in (at(-0.28), at(0.28)):
        canvas.circle(c, y - r, r, _RUBBER, wheel)
        canvas.circle(c, y - r, r / 2, (150, 150, 156), wheel)
    world.shadows.append((x, y, w))
    wade(canvas, rng, world, x, y, w, 0.34 * h)
    return x, y - h * 0.5, w * rng.uniform(0.5, 0.8)


def _person(canvas: Canvas, rng, world: World, x, y, instance):
    """Draw a standing person: head with hair, shirt, arms and trousers."""
    s = world.scale(y)
    h, thing = s * rng.uniform(0.33, 0.42), Thing("person", instance)
    w, skin, shirt = h * 0.38, _SKINS[rng.integers(len(_SKINS))], _pick(rng, _CLOTHES)[1]
    trousers = _PAINTS[str(rng.choice(("black", "blue", "brown", "gray")))]
    hip, neck, r = y - 0.45 * h, y - 0.78 * h, 0.115 * h
    stride = rng.uniform(0, 0.16) * w
    for side in (-1, 1):
        leg = [(x + side * 0.2 * w, hip - 0.02 * h), (x + side * (0.2 * w + stride), y - 0.02 * h)]
        canvas.line(leg, 0.32 * w, trousers, thing)
        arm = [(x + side * 0.42 * w, neck + 0.05 * h), (x + side * (0.46 * w + stride), hip)]
        canvas.line(arm, 0.2 * w, shade(shirt, 0.8), thing)
    canvas.rectangle((x - 0.38 * w, neck, x + 0.38 * w, hip + 0.02 * h), shirt, thing)
    canvas.circle(x, y - h + r, r, skin, thing)
    hair = [(x - r, y - h + r), (x - 0.7 * r, y - h), (x + 0.7 * r, y - h), (x + r, y - h + r)]
    canvas.polygon(hair, (62, 42, 30), thing)
    world.shadows.append((x, y, w))
    wade(canvas, rng, world, x, y, 0.9 * w, 0.28 * h)


def _pole(canvas: Canvas, rng, world: World, x, y, instance, lamp=True):
    """Draw a street pole, bare or with an arm and a lamp; return the height of its top."""
    s, thing = world.scale(y), Thing("pole", instance)
    top = y - s * rng.uniform(0.52, 0.64)
    canvas.rectangle((x - 0.02 * s, top, x + 0.02 * s, y), _METAL, thing)
    if lamp:
        ahead = rng.choice((-1, 1))
        canvas.line([(x, top + 0.015 * s), (x + ahead * 0.12 * s, top + 0.015 * s)], 0.03 * s, _METAL, thing)
        bulb = Thing("pole", instance, glows=world.time == "night")
        canvas.rectangle((x + ahead * 0.07 * s, top, x + ahead * 0.15 * s, top + 0.045 * s), (250, 236, 180), bulb)
    world.shadows.append((x, y, 0.06 * s))
    wade(canvas, rng, world, x, y, 0.08 * s, 0.08 * s)
    return top


def _traffic_light(canvas: Canvas, rng, world: World, x, y, instance):
    """Draw a pole and on it a head with three lamps, one of them lit."""
    s, head = world.scale(y), Thing("traffic light", instance)
    top = _pole(canvas, rng, world, x, y, instance=100 + instance, lamp=False) - 0.06 * s
    canvas.rectangle((x - 0.065 * s, top, x + 0.065 * s, top + 0.27 * s), (38, 42, 40), head)
    lit = str(rng.choice(list(_LAMPS)))
    world.paint["traffic light", instance] = lit
    for k, (name, color) in enumerate(_LAMPS.items()):
        lamp = head._replace(glows=name == lit)
        canvas.circle(x, top + (0.05 + 0.085 * k) * s, 0.04 * s, color if name == lit else shade(color, 0.32), lamp)


def _bicycle(canvas: Canvas, rng, world: World, x, y, instance, ahead=None):
    """Draw two wheels, a frame, a saddle and a handlebar, from the side."""
    s, thing, wheel = world.scale(y), Thing("bicycle", instance), Thing("bicycle", instance, "wheel")
    ahead = ahead or rng.choice((-1, 1))
    r, color = 0.09 * s, _PAINTS[str(rng.choice(("blue", "red", "green", "yellow", "black")))]

    def at(dx, dy):
        return x + ahead * dx * s, y - dy * s

    for dx in (-0.13, 0.13):
        canvas.ring(*at(dx, 0.09), r, 0.024 * s, _RUBBER, wheel)
    frame = [at(-0.13, 0.09), at(-0.06, 0.19), at(0.09, 0.19), at(-0.01, 0.08), at(-0.13, 0.09)]
    canvas.line(frame, 0.024 * s, color, thing)
    canvas.line([at(-0.01, 0.08), at(-0.08, 0.23)], 0.024 * s, color, thing)
    canvas.line([at(0.13, 0.09), at(0.085, 0.25), at(0.13, 0.27)], 0.024 * s, color, thing)
    canvas.line([at(-0.12, 0.235), at(-0.04, 0.235)], 0.03 * s, _RUBBER, thing)
    world.shadows.append((x, y, 0.3 * s))
    wade(canvas, rng, world, x, y, 0.34 * s, 0.05 * s)


def _rider(canvas: Canvas, rng, world: World, x, y, instance):
    """Draw a person on a bicycle, which is an object of its own."""
    s, ahead, thing = world.scale(y), rng.choice((-1, 1)), Thing("rider", instance)
    _bicycle(canvas, rng, world, x, y, instance=100 + instance, ahead=ahead)
    shirt, trousers = _pick(rng, _CLOTHES)[1], _PAINTS[str(rng.choice(("black", "blue", "brown")))]

    def at(dx, dy):
        return x + ahead * dx * s, y - dy * s

    canvas.line([at(-0.07, 0.25), at(0.03, 0.17), at(-0.005, 0.06)], 0.05 * s, trousers, thing)
    canvas.line([at(-0.07, 0.25), at(0.025, 0.38)], 0.085 * s, shirt, thing)
    canvas.line([at(0.025, 0.37), at(0.1, 0.27)], 0.036 * s, shade(shirt, 0.8), thing)
    canvas.circle(*at(0.05, 0.435), 0.048 * s, _SKINS[rng.integers(len(_SKINS))], thing)
    helmet = [at(-0.005, 0.44), at(0.01, 0.485), at(0.05, 0.5), at(0.095, 0.475), at(0.1, 0.45)]
    canvas.polygon(helmet, _PAINTS[str(rng.choice(_CLOTHES))], thing)


DRAW = {
    "house": _house, "block": _block, "tree": _tree, "car": _car, "person": _person, "pole": _pole,
    "traffic light": _traffic_light, "bicycle": _bicycle, "rider": _rider,
}  # fmt: skip
CLASS_OF_KIND = {"house": "building", "block": "building"}  # the other kinds are called like their class
