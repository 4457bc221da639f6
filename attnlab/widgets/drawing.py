"""Draw what widgets show, uint8 (row, column, rgb), without matplotlib, which is too slow for a slider."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import binary_erosion

__all__ = ["MASK_RGB", "as_png", "beside", "draw_mask", "enlarged", "outlined"]

MASK_RGB = (255, 31, 209)  # `attnlab.plots.MASK_COLOR`: neither fire nor sky nor grass has it


def enlarged(pixels: np.ndarray, least: int = 256) -> np.ndarray:
    """Repeat pixels (row, column, ...) until neither side is shorter than `least`."""
    factor = max(1, -(-least // min(pixels.shape[:2])))
    return np.repeat(np.repeat(pixels, factor, 0), factor, 1)


def outlined(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return pixels (row, column, rgb), `enlarged`, with the border of a mask (row, column) of their size in white."""
    found, large = enlarged(pixels), enlarged(mask)
    found[large & ~binary_erosion(large)] = 255
    return found.astype(np.uint8)


def draw_mask(image, mask: np.ndarray) -> np.ndarray:
    """Draw an image with a mask (row, column) of its size tinted and `outlined`."""
    pixels = np.asarray(image).astype(float)
    return outlined(np.where(mask[..., None], 0.5 * pixels + 0.5 * np.array(MASK_RGB), pixels), mask)


def beside(images: Sequence[np.ndarray]) -> np.ndarray:
    """Put images in a row, white between and below them; if there are none, say so."""
    if not images:
        empty = Image.new("RGB", (160, 24), "white")
        ImageDraw.Draw(empty).text((8, 6), "nothing is shown yet", "black")
        return np.asarray(empty)
    height = max(x.shape[0] for x in images)
    return np.concatenate([np.pad(x, ((0, height - len(x)), (0, 4), (0, 0)), constant_values=255) for x in images], 1)


def as_png(pixels: np.ndarray) -> bytes:
    """Return pixels, uint8 (row, column, rgb), as the bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
