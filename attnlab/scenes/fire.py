"""Draw flames, their light on what is around them, and smoke that one can see through."""

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .canvas import Canvas, Thing, smooth_noise
from .world import Fire, World

__all__ = ["add_glow", "add_smoke", "draw_fire"]

_SMOKE_OPACITY = 0.4  # smoke is labeled where it is at least this opaque


def draw_fire(canvas: Canvas, rng, world: World, x, y, width, on) -> None:
    """Draw tongues of flame, red outside and yellow within; night does not dim them."""
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


def add_glow(rgb: np.ndarray, world: World) -> np.ndarray:
    """Add the light of fires to what is around them."""
    side = rgb.shape[0]
    rows, columns = np.mgrid[0:side, 0:side].astype(np.float32) / side
    for fire in world.fires:
        distance = (columns - fire.x) ** 2 + (rows - fire.y + fire.height / 2) ** 2
        near = np.exp(-distance / (1.2 * fire.height) ** 2)
        rgb = rgb + near[..., None] * np.array((46, 22, 4), np.float32)
    return rgb


def add_smoke(canvas: Canvas, rng, rgb, ids, fire: Fire):
    """Add a plume of puffs that rises from a fire, widens and drifts; it is labeled only where it is dense."""
    opacity = _plume(rng, canvas.side, fire)
    color = np.array(fire.smoke_color, np.float32) * (1 + 0.16 * smooth_noise(rng, canvas.side, 14)[..., None])
    number = canvas.number(Thing("smoke", fire.instance, glows=True))
    fiery = np.array([t.name == "fire" for t in canvas.things])[ids]
    opacity = np.where(fiery, opacity * 0.25, opacity)  # flames shine through
    rgb = rgb + (color - rgb) * opacity[..., None]
    return rgb, np.where(opacity > _SMOKE_OPACITY, number, ids).astype(np.uint8)


def _plume(rng, side, fire: Fire):
    """Draw the opacity of a fire's smoke: float32 (side, side), 0..1."""
    alpha = Image.new("L", (side, side))
    pen = ImageDraw.Draw(alpha)
    start, end, widen = fire.y - fire.height * 0.6, rng.uniform(-0.1, 0.1), rng.uniform(0.06, 0.12)
    for t in np.linspace(0, 1, 16):
        r = (fire.width * 0.28 + widen * t) * rng.uniform(0.8, 1.2) * side
        cx = (fire.x + fire.wind * t**1.3 + rng.normal(0, 0.012)) * side
        cy = (start + (end - start) * t) * side
        pen.ellipse((cx - r, cy - r * 0.8, cx + r, cy + r * 0.8), fill=int(235 - 75 * t))
    return np.asarray(alpha.filter(ImageFilter.GaussianBlur(side * 0.018)), dtype=np.float32) / 255
