"""Photos: every form one comes in is read right, or refused in words."""

import numpy as np
import pytest
from PIL import Image

from attnlab.storage import read_rgb

RAMP = np.linspace(0, 65535, 1024).astype(np.uint16).reshape(32, 32)
COLORS = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)


def saved(path, image, **options):
    image.save(path, **options)
    return path


def test_sixteen_bits_keep_their_ramp(tmp_path):
    """Pillow's own conversion cuts it off at 255, and of 1,024 values leaves five."""
    expected = (RAMP / 257).round()
    for name in ("ramp.png", "ramp.tif"):
        found = read_rgb(saved(tmp_path / name, Image.fromarray(RAMP)))
        assert found.dtype == np.uint8 and found.shape == (32, 32, 3) and len(np.unique(found)) == 256
        np.testing.assert_array_equal(found, np.repeat(expected[..., None], 3, 2))
    big_endian = Image.frombytes("I;16B", (32, 32), RAMP.astype(">u2").tobytes())
    np.testing.assert_array_equal(read_rgb(big_endian)[..., 0], expected)


def test_floats_are_fractions(tmp_path):
    gray = (RAMP / 65535).astype(np.float32)
    found = read_rgb(saved(tmp_path / "gray.tif", Image.fromarray(gray)))
    np.testing.assert_array_equal(found[..., 1], (gray * 255).round())
    for bad in (gray * 255, gray - 1, gray * np.nan):
        with pytest.raises(ValueError, match=r"floating-point gray is in 0\.\.1, not"):
            read_rgb(Image.fromarray(bad))


def test_a_photo_stands_as_its_camera_held_it(tmp_path):
    """EXIF's orientation 6: the first row of the file is the right column of the photo."""
    image, exif = Image.fromarray(COLORS), Image.Exif()
    exif[0x0112] = 6
    found = read_rgb(str(saved(tmp_path / "turned.png", image, exif=exif)))
    np.testing.assert_array_equal(found, np.rot90(COLORS, -1))


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_modes_without_doubt(mode, tmp_path):
    image = Image.fromarray(COLORS).convert(mode)
    found = read_rgb(saved(tmp_path / "photo.tif", image) if mode in ("RGB", "L", "1", "P", "CMYK") else image)
    np.testing.assert_array_equal(found, np.asarray(image.convert("RGB")))
    difference = np.abs(found.astype(int) - COLORS).max()
    assert difference <= {"RGB": 0, "RGBA": 0, "RGBX": 0, "CMYK": 0, "YCbCr": 4, "HSV": 12}.get(mode, 255)


def test_transparent_pixels_have_no_color(tmp_path):
    alpha = Image.fromarray(COLORS).convert("RGBA")
    alpha.putpixel((0, 0), (255, 0, 0, 254))
    palette = Image.fromarray(COLORS).convert("P")
    for number, (image, options) in enumerate([
        (alpha, {}), (alpha.convert("LA"), {}), (palette, {"transparency": palette.getpixel((0, 0))}),
        (Image.fromarray(COLORS), {"transparency": tuple(COLORS[0, 0].tolist())}),
    ]):  # fmt: skip
        with pytest.raises(ValueError, match=rf"{number}.png cannot be .*: it is transparent in places: choose"):
            read_rgb(saved(tmp_path / f"{number}.png", image, **options))
    opaque = saved(tmp_path / "opaque.png", Image.fromarray(COLORS).convert("RGBA"))
    np.testing.assert_array_equal(read_rgb(opaque), COLORS)


def test_what_is_no_photo_is_named(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError):
        read_rgb(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("a photo")
    whole = saved(tmp_path / "whole.png", Image.fromarray(np.repeat(RAMP[..., None] >> 8, 3, 2).astype(np.uint8)))
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:-60])
    for name in ("text.png", "cut.png"):
        with pytest.raises(ValueError, match=f"{name} cannot be read as a photo: "):
            read_rgb(tmp_path / name)
    for mode in ("I", "LAB"):
        with pytest.raises(ValueError, match=f'what is white in mode "{mode}" is not known'):
            read_rgb(Image.new(mode, (4, 4)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="decompression bomb"):
        read_rgb(whole)


@pytest.mark.filterwarnings("ignore")  # of the damage, by Pillow
@pytest.mark.parametrize("form", ["png", "jpg", "tif", "webp", "bmp", "gif"])
def test_damaged_files_end_in_words(form, tmp_path):
    generator = np.random.default_rng(1)
    whole = saved(tmp_path / f"whole.{form}", Image.fromarray(COLORS)).read_bytes()
    for _ in range(60):
        damaged = bytearray(whole)
        for place in generator.integers(0, len(whole), 3):
            damaged[place] = generator.integers(256)
        path = tmp_path / f"damaged.{form}"
        path.write_bytes(damaged)
        try:
            assert read_rgb(path).dtype == np.uint8
        except ValueError as error:
            assert "cannot be read as a photo" in str(error)
