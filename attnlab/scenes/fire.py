"""Flames and smoke: what burns, how it glows, and smoke that lets what is behind it show through."""

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .canvas import Canvas, Thing, noise
from .world import Fire, World

SMOKE_MASK = 0.4  # smoke is labeled where it hides at least this share of what is behind it


def fire(canvas: Canvas, rng, world: World, x, y, width, on) -> None:
    """Tongues of flame, red outside and yellow within; gives light, so night does not dim it."""
    instance = len(world.fires)
    height, thing = rng.uniform(0.18, 0.3), Thing("fire", instance, glows=True)
    steps = np.linspace(-0.4, 0.4, 5)
    tongues = [(x + width * dx, height * (1 - 1.1 * abs(dx)) * rng.uniform(0.75, 1.1)) for dx in steps]
    half = width / 5.2
    for color, grow in (((226, 62, 16), 1.0), ((250, 138, 24), 0.74), ((255, 222, 92), 0.44)):
        for center, tall in tongues:
            lean = rng.uniform(-0.3, 0.3) * half
            w, waist = half * (0.55 + 0.45 * grow), y - 0.4 * tall * grow
            outline = [(center - w, y), (center - w * 0.9, waist), (center + lean, y - tall * grow)]
            canvas.polygon([*outline, (center + w * 0.9, waist), (center + w, y)], color, thing)
    gray = rng.uniform(40, 90) if rng.uniform() < 0.6 else rng.uniform(140, 200)
    color = (gray, gray, gray * 1.03)
    world.fires.append(Fire(x, y, width, height, instance, on, True, color, rng.uniform(-0.35, 0.35)))


def glow(rgb: np.ndarray, world: World) -> np.ndarray:
    """The light of fires on what is around them."""
    side = rgb.shape[0]
    rows, columns = np.mgrid[0:side, 0:side].astype(np.float32) / side
    for fire in world.fires:
        distance = (columns - fire.x) ** 2 + (rows - fire.y + fire.height / 2) ** 2
        near = np.exp(-distance / (1.2 * fire.height) ** 2)
        rgb = rgb + near[..., None] * np.array((46, 22, 4), np.float32)
    return rgb


def smoke(canvas: Canvas, rng, rgb, ids, fire: Fire):
    """A plume of puffs that rises from a fire, widens and drifts; see-through, so labeled where it is dense."""
    opacity = _plume(rng, canvas.side, fire)
    color = np.array(fire.smoke_color, np.float32) * (1 + 0.16 * noise(rng, canvas.side, 14)[..., None])
    number = canvas.number(Thing("smoke", fire.instance, glows=True))
    fiery = np.array([t.name == "fire" for t in canvas.things])[ids]
    opacity = np.where(fiery, opacity * 0.25, opacity)  # flames shine through
    rgb = rgb + (color - rgb) * opacity[..., None]
    return rgb, np.where(opacity > SMOKE_MASK, number, ids).astype(np.uint8)


def _plume(rng, side, fire: Fire):
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
