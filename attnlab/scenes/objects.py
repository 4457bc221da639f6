"""Draw the objects of a street scene: one function per kind of object.

(x, y) is the foot of an object. Objects that may burn return (x, y, width) of the foot of their flames.
"""

import numpy as np

from .canvas import Canvas, Thing
from .world import World, shade, wade

__all__ = ["CLASS_OF_KIND", "DRAW"]

_PAINTS = {  # name a caption may use -> rgb
    "white": (240, 238, 232), "yellow": (244, 204, 48), "blue": (46, 92, 206), "red": (206, 36, 40),
    "green": (16, 126, 72), "black": (36, 36, 42), "gray": (142, 142, 148),
}  # fmt: skip
_WALLS = ("white", "yellow", "blue", "red", "gray")
_BODIES = ("white", "yellow", "blue", "red", "black", "green")
_CLOTHES = ("white", "yellow", "blue", "red", "green")
_FRAMES = ("yellow", "blue", "red", "green")
_ROOFS = ((92, 66, 56), (84, 80, 88), (70, 58, 56))  # none as bright as a wall, whose color a caption says
_TROUSERS = ((44, 44, 54), (72, 62, 56), (58, 60, 74))
_SKINS = ((236, 194, 162), (198, 146, 108), (122, 82, 58))
_METAL, _RUBBER, _GLASS = (62, 64, 72), (24, 24, 28), (150, 192, 220)
_LAMPS = {"red": (246, 40, 34), "yellow": (252, 206, 40), "green": (48, 232, 96)}


def _paint(rng, world, name, instance, colors):
    """Choose the color of an object: that of the first of its class if all are alike, a new one if they are not."""
    used = [color for (n, _), color in world.paint.items() if n == name and color in colors]
    if not (world.alike and used):
        free = [c for c in colors if c not in used and (c, world.ground) != ("white", "snow")]
        used = [free[rng.integers(len(free))] if free else colors[rng.integers(len(colors))]]
    world.paint[name, instance] = used[0]
    return _PAINTS[used[0]]


def _house(canvas: Canvas, rng, world: World, x, y, instance):
    """Draw a gabled house with roof, door and windows; its flames would rise from below the eaves."""
    s = world.scale(y)
    w, h, roof = s * rng.uniform(0.36, 0.46), s * rng.uniform(0.22, 0.27), s * rng.uniform(0.1, 0.14)
    wall = _paint(rng, world, "building", instance, _WALLS)
    world.kind["building", instance] = "house"
    left, right, eaves, body = x - w / 2, x + w / 2, y - h, Thing("building", instance)
    canvas.rectangle((left, eaves, right, y), shade(wall, rng.uniform(0.94, 1.04)), body)
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
    leaf = (door - w * 0.075, y - h * 0.62, door + w * 0.075, y)
    canvas.rectangle(leaf, (72, 50, 40), Thing("building", instance, "door"))
    world.shadows.append((x, y, w))
    wade(canvas, rng, world, x, y, w, 0.3 * h)
    return x, eaves + h * rng.uniform(0.1, 0.6), w * rng.uniform(0.7, 1.05)


def _block(canvas: Canvas, rng, world: World, x, y, instance):
    """Draw a building of several floors with a flat roof and rows of windows."""
    s = world.scale(y)
    w, h = s * rng.uniform(0.3, 0.38), min(s * rng.uniform(0.42, 0.56), y - 0.05)
    wall = _paint(rng, world, "building", instance, _WALLS)
    world.kind["building", instance] = "building"
    left, top, body = x - w / 2, y - h, Thing("building", instance)
    canvas.rectangle((left, top, left + w, y), shade(wall, rng.uniform(0.92, 1.02)), body)
    ledge = (left - 0.012, top - 0.03 * s, left + w + 0.012, top + 0.008)
    canvas.rectangle(ledge, shade(wall, 0.55), Thing("building", instance, "roof"))
    floors, columns = max(3, round(h / (0.13 * s))), 3
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
    w, h = s * rng.uniform(0.42, 0.48), s * rng.uniform(0.21, 0.24)
    color = _paint(rng, world, "car", instance, _BODIES)
    body, pane, wheel = Thing("car", instance), Thing("car", instance, "window"), Thing("car", instance, "wheel")
    ahead, r, belt, top = rng.choice((-1, 1)), h * 0.21, y - h * 0.6, y - h * 0.92

    def at(fraction):  # from -0.5 at the rear to 0.5 at the front
        return x + ahead * fraction * w

    canvas.polygon([(at(-0.36), belt), (at(-0.24), y - h), (at(0.14), y - h), (at(0.3), belt)], color, body)
    canvas.polygon([(at(-0.29), belt), (at(-0.2), top), (at(-0.06), top), (at(-0.06), belt)], _GLASS, pane)
    canvas.polygon([(at(0), belt), (at(0), top), (at(0.11), top), (at(0.22), belt)], _GLASS, pane)
    front = [(at(0.4), belt + 0.02 * h), (at(0.5), belt + 0.14 * h), (at(0.5), y - 0.7 * r)]
    canvas.polygon([(at(-0.5), y - 0.7 * r), (at(-0.5), belt), *front], color, body)
    lamp = Thing("car", instance, glows=world.time == "night")
    canvas.rectangle((at(0.43), belt + 0.12 * h, at(0.5), belt + 0.28 * h), (255, 240, 170), lamp)
    for c in (at(-0.28), at(0.28)):
        canvas.circle(c, y - r, r, _RUBBER, wheel)
        canvas.circle(c, y - r, r * 0.45, (170, 170, 176), wheel)
    world.shadows.append((x, y, w))
    wade(canvas, rng, world, x, y, w, 0.28 * h)
    return x, y - h * 0.55, w * rng.uniform(0.55, 0.75)


def _person(canvas: Canvas, rng, world: World, x, y, instance):
    """Draw a standing person: head with hair, shirt with arms, dark trousers."""
    s = world.scale(y)
    h, thing = s * rng.uniform(0.42, 0.5), Thing("person", instance)
    shirt, skin = _paint(rng, world, "person", instance, _CLOTHES), _SKINS[rng.integers(len(_SKINS))]
    w, hip, neck, r = 0.36 * h, y - 0.4 * h, y - 0.76 * h, 0.125 * h
    trousers, stride = _TROUSERS[rng.integers(len(_TROUSERS))], rng.uniform(0, 0.12) * w
    for side in (-1, 1):
        leg = [(x + side * 0.24 * w, hip - 0.03 * h), (x + side * (0.26 * w + stride), y)]
        canvas.line(leg, 0.38 * w, trousers, thing)
        arm = [(x + side * 0.48 * w, neck + 0.05 * h), (x + side * (0.6 * w + stride), hip + 0.02 * h)]
        canvas.line(arm, 0.24 * w, shade(shirt, 0.82), thing)
    canvas.rectangle((x - 0.46 * w, neck, x + 0.46 * w, hip + 0.03 * h), shirt, thing)
    canvas.circle(x, y - h + r, r, skin, thing)
    canvas.ellipse((x - 1.08 * r, y - h - 0.1 * r, x + 1.08 * r, y - h + 0.95 * r), (58, 38, 28), thing)
    world.shadows.append((x, y, w))
    wade(canvas, rng, world, x, y, 1.3 * w, 0.26 * h)


def _pole(canvas: Canvas, rng, world: World, x, y, instance, lamp=True):
    """Draw a street pole with an arm and a lamp, or bare; return the height of its top."""
    s, thing = world.scale(y), Thing("pole", instance)
    top = max(y - s * rng.uniform(0.54, 0.64), 0.03 if lamp else 0.1)
    canvas.rectangle((x - 0.024 * s, top, x + 0.024 * s, y), _METAL, thing)
    if lamp:
        ahead = rng.choice((-1, 1))
        canvas.rectangle((x, top, x + ahead * 0.16 * s, top + 0.035 * s), _METAL, thing)
        bulb = Thing("pole", instance, glows=world.time == "night")
        lit = (x + ahead * 0.07 * s, top + 0.02 * s, x + ahead * 0.17 * s, top + 0.07 * s)
        canvas.rectangle(lit, (255, 240, 176), bulb)
    world.shadows.append((x, y, 0.08 * s))
    wade(canvas, rng, world, x, y, 0.1 * s, 0.08 * s)
    return top


def _traffic_light(canvas: Canvas, rng, world: World, x, y, instance):
    """Draw a pole and on it a head with three lamps, one of them lit."""
    s, head = world.scale(y), Thing("traffic light", instance)
    top = _pole(canvas, rng, world, x, y, instance=100 + instance, lamp=False) - 0.08 * s
    canvas.rectangle((x - 0.075 * s, top, x + 0.075 * s, top + 0.33 * s), (34, 38, 38), head)
    _paint(rng, world, "traffic light", instance, tuple(_LAMPS))
    for k, (name, color) in enumerate(_LAMPS.items()):
        on = name == world.paint["traffic light", instance]
        lamp = head._replace(glows=on)
        canvas.circle(x, top + (0.065 + 0.1 * k) * s, 0.046 * s, color if on else shade(color, 0.25), lamp)


def _bicycle(canvas: Canvas, rng, world: World, x, y, instance, ahead=None):
    """Draw two wheels, a frame, a saddle and a handlebar, from the side."""
    s, thing, wheel = world.scale(y), Thing("bicycle", instance), Thing("bicycle", instance, "wheel")
    ahead, r, color = ahead or rng.choice((-1, 1)), 0.115 * s, _paint(rng, world, "bicycle", instance, _FRAMES)

    def at(dx, dy):
        return x + ahead * dx * s, y - dy * s

    for dx in (-0.15, 0.15):
        canvas.ring(*at(dx, 0.115), r, 0.034 * s, _RUBBER, wheel)
    pedals, saddle, head = at(-0.01, 0.1), at(-0.07, 0.25), at(0.1, 0.25)
    canvas.line([at(-0.15, 0.115), saddle, head, pedals, at(-0.15, 0.115)], 0.036 * s, color, thing)
    canvas.line([saddle, pedals], 0.036 * s, color, thing)
    canvas.line([at(0.15, 0.115), head, at(0.085, 0.32)], 0.036 * s, color, thing)
    canvas.line([at(0.06, 0.32), at(0.14, 0.32)], 0.034 * s, _RUBBER, thing)
    canvas.line([at(-0.13, 0.285), at(-0.02, 0.285)], 0.042 * s, _RUBBER, thing)
    world.shadows.append((x, y, 0.44 * s))
    wade(canvas, rng, world, x, y, 0.5 * s, 0.06 * s)


def _rider(canvas: Canvas, rng, world: World, x, y, instance):
    """Draw a person on a bicycle, which is an object of its own."""
    s, ahead, thing = world.scale(y), rng.choice((-1, 1)), Thing("rider", instance)
    _bicycle(canvas, rng, world, x, y, instance=100 + instance, ahead=ahead)
    shirt, trousers = _paint(rng, world, "rider", instance, _CLOTHES), _TROUSERS[rng.integers(len(_TROUSERS))]

    def at(dx, dy):
        return x + ahead * dx * s, y - dy * s

    canvas.line([at(-0.06, 0.31), at(0.06, 0.22), at(0, 0.07)], 0.075 * s, trousers, thing)
    canvas.polygon([at(-0.13, 0.28), at(-0.02, 0.49), at(0.09, 0.46), at(0.02, 0.28)], shirt, thing)
    canvas.line([at(0.04, 0.44), at(0.12, 0.335)], 0.05 * s, shade(shirt, 0.82), thing)
    canvas.circle(*at(0.065, 0.54), 0.068 * s, _SKINS[rng.integers(len(_SKINS))], thing)
    cx, cy = at(0.06, 0.575)
    canvas.ellipse((cx - 0.075 * s, cy - 0.045 * s, cx + 0.075 * s, cy + 0.035 * s), shade(shirt, 0.9), thing)


DRAW = {
    "house": _house, "block": _block, "tree": _tree, "car": _car, "person": _person, "pole": _pole,
    "traffic light": _traffic_light, "bicycle": _bicycle, "rider": _rider,
}  # fmt: skip
CLASS_OF_KIND = {"house": "building", "block": "building"}  # the other kinds are called like their class
