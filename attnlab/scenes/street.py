"""Streets, countryside and disasters: `street.render(seed)` gives a `Scene` with exact masks.

    from attnlab.scenes import street
    scene = street.render(579)
    scene.caption                    # 'a burning house with smoke and a street'
    scene.mask("smoke")              # bool (row, column)

Seeds are split once and for all: below `HELD_OUT` for training, from there on for evaluation.
"""

import itertools

import numpy as np

from . import captions, objects
from .canvas import Canvas, Thing, noise, reduce
from .scene import Scene

CLASSES = ("sky", "ground", "road", "water", "mountain", "house", "tree", "car", "person", "fire", "smoke")
PARTS = ("", "roof", "window", "door", "wheel", "trunk", "crown")
WORDS = captions.CLASS_OF  # every word that names a class, and the class
HELD_OUT = 1_000_000  # first seed that no bundled model was trained on

TIMES = {  # share of scenes, light (rgb factor), sky at the top and at the horizon (rgb)
    "day": (0.5, (1, 1, 1), (70, 130, 215), (180, 215, 245)),
    "overcast": (0.18, (0.86, 0.87, 0.9), (140, 145, 155), (205, 208, 212)),
    "dusk": (0.16, (0.95, 0.78, 0.68), (200, 85, 60), (255, 180, 95)),
    "night": (0.16, (0.4, 0.44, 0.62), (10, 12, 38), (38, 42, 82)),
}
GROUNDS = {"grass": (0.6, (88, 150, 62)), "dirt": (0.2, (150, 112, 74)), "snow": (0.2, (234, 240, 246))}
THEMES = {  # share of scenes, and in it the chance of: mountain, road, water, flood, and the most of each object
    "town": (0.34, (0.2, 0.85, 0.1, 0.15), {"house": 3, "tree": 3, "car": 3, "person": 2}),
    "country": (0.26, (0.6, 0.25, 0.5, 0.1), {"house": 2, "tree": 3, "car": 1, "person": 2}),
    "forest": (0.14, (0.3, 0.25, 0.15, 0.05), {"house": 1, "tree": 8, "car": 1, "person": 1}),
    "single": (0.26, (0.12, 0.15, 0.12, 0.05), {}),
}
FIRE_CHANCE = {"town": 0.45, "country": 0.4, "forest": 0.55, "single": 0.3}
SMOKE_MASK = 0.4  # smoke is labeled where it hides at least this share of what is behind it
GRAIN = {  # texture of a class: strength of coarse noise, of fine noise and of waves
    "ground": (0.10, 0.10, 0), "road": (0.05, 0.08, 0), "water": (0.04, 0.02, 0.16), "mountain": (0.14, 0.08, 0),
    "house": (0.02, 0.04, 0.04), "tree": (0.06, 0.22, 0),
}  # fmt: skip


def render(seed: int, size: int = 64) -> Scene:
    """A scene that depends on `seed` and `size` alone.

    Parameters
    ----------
    seed : int, 0 or above
    size : side of the image in pixels, at least 32; made for 64 and 128. The same seed shows the same world at every
        size; the caption may differ, for it names only what covers enough pixels.

    Returns
    -------
    Scene : image uint8 (size, size, 3), labels and parts uint8 (size, size)

    Raises
    ------
    ValueError : seed below 0 or size below 32
    """
    if seed < 0 or size < 32:
        raise ValueError(f"street.render wants seed >= 0 and size >= 32, not seed={seed}, size={size}")
    rng = np.random.default_rng([seed, 0x57])
    canvas = Canvas(size)
    world = objects.World(
        time=_draw(rng, TIMES), ground=_draw(rng, GROUNDS), theme=_draw(rng, THEMES), horizon=rng.uniform(0.36, 0.55)
    )
    _backdrop(canvas, rng, world)
    fires = _objects(canvas, rng, world)
    rgb, ids = canvas.arrays()
    rgb = _light(rgb * _texture(rng, canvas, ids)[..., None], canvas, ids, world, fires)
    for fire in fires:
        if fire.smoke:
            rgb, ids = _smoke(rng, canvas, rgb, ids, fire)
    image, ids = reduce(rgb, ids)
    lookup = np.array([(CLASSES.index(t.name), PARTS.index(t.part)) for t in canvas.things], dtype=np.uint8)
    labels, parts = lookup[ids, 0], lookup[ids, 1]
    caption, words = captions.describe(rng, world, captions.count_visible(ids, canvas.things), fires)
    return Scene(image, caption, labels, parts, words, CLASSES, PARTS)


def render_with(word: str, count: int, first: int = HELD_OUT, size: int = 64) -> list[Scene]:
    """The first `count` scenes from seed `first` on whose caption says `word`; ValueError if none ever does."""
    if word not in WORDS:
        raise ValueError(f"no caption says {word!r}; words that name a class: {', '.join(WORDS)}")
    scenes = (render(seed, size) for seed in itertools.count(first))
    return list(itertools.islice((scene for scene in scenes if word in scene.words), count))


def _draw(rng, table):
    names = list(table)
    return names[rng.choice(len(names), p=[table[n][0] for n in names])]


def _backdrop(canvas, rng, world):
    """Sky, mountains, ground, road and river: everything that lies behind the objects."""
    h = world.horizon
    _, _, top, bottom = TIMES[world.time]
    for y in np.arange(0, h, 0.02):
        color = np.array(top) + (np.array(bottom) - top) * (y / h)
        canvas.rectangle((0, y, 1, y + 0.04), color, Thing("sky", glows=True))
    if world.time == "night":
        for x, y in rng.uniform(0, 1, (25, 2)) * (1, h):
            canvas.rectangle((x, y, x + 0.008, y + 0.008), (230, 230, 210), Thing("sky", glows=True))
    mountain, road, water, flood = rng.uniform(size=4) < THEMES[world.theme][1]
    if mountain:
        xs = np.linspace(0, 1, 24)
        waves = sum(
            rng.uniform(0.4, 1) * np.sin(xs * rng.uniform(4, 16) + rng.uniform(0, 6)) / (k + 1) for k in range(4)
        )
        ridge = h - rng.uniform(0.12, 0.24) + 0.05 * waves + rng.normal(0, 0.008, 24)
        color = np.array((122, 112, 132)) + rng.uniform(-14, 14, 3)
        canvas.polygon([(0, h), *zip(xs, ridge, strict=True), (1, h)], color, Thing("mountain"))
    color = np.array(GROUNDS[world.ground][1]) + rng.uniform(-14, 14, 3)
    canvas.rectangle((0, h, 1, 1), color.clip(0, 255), Thing("ground"))
    if road:
        objects.road(canvas, rng, world)
    if flood or water:
        (objects.flood if flood else objects.river)(canvas, rng, world)
    world.flooded = bool(flood)


def _objects(canvas, rng, world):
    """Houses, trees, cars and people from the farthest to the nearest, and what burns; returns the fires."""
    most = THEMES[world.theme][2]
    if world.theme == "single":
        counts = {str(rng.choice(("house", "tree", "car", "person"))): 1} if rng.uniform() < 0.85 else {}
    else:
        low = {"tree": 4} if world.theme == "forest" else {}
        counts = {name: int(rng.integers(low.get(name, 0), n + 1)) for name, n in most.items()}
    names = [name for name, n in counts.items() for _ in range(n)]
    feet = objects.places(rng, names, world)
    fires = []
    burns = rng.uniform() < FIRE_CHANCE[world.theme]
    victims = [i for i, name in enumerate(names) if name != "person"]
    victim = (
        victims[-1 - int(rng.integers(min(2, len(victims))))] if burns and victims and rng.uniform() < 0.8 else None
    )
    for i, (name, (x, y)) in enumerate(zip(names, feet, strict=True)):
        instance = names[:i].count(name)
        anchor = getattr(objects, name)(canvas, rng, world, x, y, instance)
        if i == victim or (world.theme == "forest" and victim is not None and name == "tree" and rng.uniform() < 0.3):
            fires.append(objects.fire(canvas, rng, *anchor, instance=len(fires), on=(name, instance)))
    if burns and victim is None:
        x, y = rng.uniform(0.2, 0.8), rng.uniform(world.horizon + 0.15, 0.92)
        fires.append(objects.fire(canvas, rng, x, y, rng.uniform(0.22, 0.4), instance=0, on=("ground", 0)))
    if fires and rng.uniform() < 0.2:
        fires = [fire._replace(smoke=False) for fire in fires]
    return fires


def _texture(rng, canvas, ids):
    """Brightness of every sample, float32 (row, column), about 0.7..1.3: what tells grass from paint."""
    side = canvas.side
    coarse, fine = noise(rng, side, 12), noise(rng, side, 48)
    rows, columns = np.mgrid[0:side, 0:side].astype(np.float32) / side
    waves = np.sin(rows * rng.uniform(110, 150) + 1.6 * np.sin(columns * rng.uniform(15, 30)) + 2 * coarse)
    strength = np.array([(0, 0, 0) if t.glows else GRAIN.get(t.name, (0, 0, 0)) for t in canvas.things], np.float32)[
        ids
    ]
    gain = 1 + strength[..., 0] * coarse + strength[..., 1] * fine + strength[..., 2] * waves
    clouds = np.clip(noise(rng, side, 5, aspect=2.5) + noise(rng, side, 14, aspect=2.5) * 0.4, 0, 1)
    sky = np.array([t.name == "sky" for t in canvas.things])[ids]
    return gain + sky * clouds * rng.choice((0, 0.15, 0.3))


def _light(rgb, canvas, ids, world, fires):
    """The hour's light on everything that does not glow, and the glow of fires around them."""
    light = np.ones((len(canvas.things), 3), np.float32)
    light[[not t.glows for t in canvas.things]] = TIMES[world.time][1]
    rgb = rgb * light[ids]
    if world.time in ("dusk", "night"):
        rows, columns = np.mgrid[0 : canvas.side, 0 : canvas.side].astype(np.float32) / canvas.side
        for fire in fires:
            near = np.exp(
                -((columns - fire.x) ** 2 + (rows - fire.y + fire.height / 2) ** 2) / (1.2 * fire.height) ** 2
            )
            rgb = rgb + near[..., None] * np.array((46, 22, 4), np.float32)
    return rgb


def _smoke(rng, canvas, rgb, ids, fire):
    """A plume of puffs that rises from a fire, widens and drifts; see-through, so labeled where it is dense."""
    opacity = objects.plume(rng, canvas.side, fire)
    color = np.array(fire.smoke_color, np.float32) * (1 + 0.16 * noise(rng, canvas.side, 14)[..., None])
    number = canvas.number(Thing("smoke", fire.instance, glows=True))
    fiery = np.array([t.name == "fire" for t in canvas.things])[ids]
    opacity = np.where(fiery, opacity * 0.25, opacity)  # flames shine through
    rgb = rgb + (color - rgb) * opacity[..., None]
    return rgb, np.where(opacity > SMOKE_MASK, number, ids).astype(np.uint8)
