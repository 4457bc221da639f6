"""Photos: every form one comes in is read right, or refused in words; and recipes that are of photos."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from attnlab.dataset import Photos, Recipe
from attnlab.dataset.photos import check_photos, find_photos
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


def recipe_of(where, **change):
    asked = {name: change.pop(name) for name in ("files", "tiles", "looks", "agree", "timesteps") if name in change}
    return Recipe(photos=Photos(where, **asked), **{"classes": {"fire": "fire"}, "map": "ovam", **change})


@pytest.fixture
def folder(tmp_path):
    for name in ("b.png", "a.JPG", "below/c.png"):
        (tmp_path / "photos/below").mkdir(parents=True, exist_ok=True)
        saved(tmp_path / "photos" / name, Image.fromarray(COLORS))
    for name in (".hidden.png", "notes.txt", "below/d.json"):
        (tmp_path / "photos" / name).write_text("nothing")
    return tmp_path / "photos"


def test_photos_are_found_by_folder_name_and_pattern(folder, monkeypatch):
    assert list(find_photos(folder)) == ["a.JPG", "b.png"]
    assert find_photos(folder)["b.png"] == hashlib.sha256((folder / "b.png").read_bytes()).hexdigest()
    assert list(find_photos(str(folder / "**/*.png"))) == ["b.png", "below/c.png"]
    assert list(find_photos(str(folder / "*/*"))) == ["below/c.png"]
    assert list(find_photos(str(folder / "b.png"))) == ["b.png"]
    monkeypatch.setenv("HOME", str(folder))
    assert list(find_photos("~/below")) == ["c.png"]
    odd = folder / "a [1]*.png"
    odd.write_bytes((folder / "b.png").read_bytes())
    assert list(find_photos(str(odd))) == ["a [1]*.png"]


def test_where_no_photo_is(folder):
    for where, says in [
        (folder / "none", "name a photo, a folder, or a pattern"),
        (folder / "none/*.jpg", "name a photo, a folder, or a pattern"),
        (folder / "*.webp", "has no photo"),
        (folder / "notes.txt", "has no photo"),
    ]:
        with pytest.raises(FileNotFoundError, match=says):
            recipe_of(str(where))
    (folder / "IMG_1.HEIC").write_text("nothing")
    with pytest.raises(ValueError, match=r"Pillow cannot read IMG_1\.HEIC: convert them to JPEG or PNG"):
        recipe_of(str(folder))
    assert recipe_of(str(folder / "*.png")).photos.names == ["b.png"]


def test_a_recipe_of_photos_has_one_record_for_each(folder, tmp_path):
    recipe = recipe_of(str(folder), seed=7)
    assert len(recipe) == 2 and recipe.prompt(1) == "a photo" and recipe.seed_of(1) == 8
    assert recipe.batches(0) == [range(0, 1), range(1, 2)] and recipe.shards == 1
    path = recipe.save(tmp_path / "recipe.yaml")
    assert not {"steps", "guidance"} & {line.split(":")[0] for line in path.read_text().splitlines()}
    short = tmp_path / "short.yaml"
    short.write_text(f"photos: {folder}\nclasses: {{fire: fire}}\nmap: ovam\nseed: 7\n")
    assert Recipe.load(short).digest == Recipe.load(path).digest == recipe.digest
    other = replace(recipe, photos=replace(recipe.photos, tiles=2))
    assert other.digest != recipe.digest and other.photos.files == recipe.photos.files
    saved(folder / "b.png", Image.fromarray(COLORS[::-1].copy()))
    assert recipe_of(str(folder), seed=7).digest != recipe.digest, "bytes belong to it"
    for file in folder.glob("*.*"):
        file.unlink()
    assert len(Recipe.load(path)) == 2, "a data set is read where its photos are gone"
    with pytest.raises(ValueError, match=r"2 of 2 photos cannot be labeled.*\n- photo a\.JPG is not in .* any more"):
        check_photos(recipe.photos)


def test_recipes_without_photos_are_as_they_were():
    recipe = Recipe(prompts=["a house with fire"], classes={"fire": "fire"})
    assert "photos" not in recipe.as_dict() and recipe.batches(0) == [range(0, 1)]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tiles": 0}, "photos: tiles is 0: it is a whole number from 1 to 64"),
        ({"looks": True}, "photos: looks is True"),
        ({"agree": 0.5}, "photos: agree is 0.5: it is a fraction above 0.5"),
        ({"timesteps": []}, "photos: timesteps is ()"),
        ({"timesteps": [0.5]}, "photos: timesteps is (0.5,)"),
        ({"files": {}}, "photos: files is {}"),
        ({"files": {"../x.png": "0" * 64}}, "photos: files is {'../x.png'"),
        ({"files": {"x.png": "0"}}, "photos: files is {'x.png': '0'}"),
        ({"steps": 5}, "steps is 5: photos are not generated, leave it out"),
        ({"negative": "rain"}, "negative is 'rain': photos are not generated"),
        ({"scheduler": "DDIMScheduler"}, "scheduler is 'DDIMScheduler': photos are not generated"),
        ({"images": 5}, "images is 5: there is one record for each photo"),
        ({"prompts": ["a", "b"]}, "prompts are 2: photos have one"),
        ({"kept": 3}, "kept wants 3, there are 2 photos"),
        ({"photos": {"tiles": 2}}, "photos is {'tiles': 2}: name a folder; or where, tiles"),
        ({"photos": {"where": "x", "tile": 2}}, "photos is {'tile': 2, 'where': 'x'}"),
        ({"photos": {"where": ""}}, "photos: where is ''"),
        ({"photos": 3}, "photos is 3: name a folder"),
    ],
)
def test_what_cannot_be_looked_at_is_refused(folder, change, says):
    with pytest.raises(ValueError) as error:
        if "photos" in change:
            Recipe(classes={"fire": "fire"}, map="ovam", **change)
        else:
            recipe_of(str(folder), **change)
    assert says in str(error.value)


def test_every_photo_that_cannot_be_read_is_named(folder):
    """Before any work: a cut one, and one that can be seen through."""
    (folder / "b.png").write_bytes((folder / "b.png").read_bytes()[:-60])
    alpha = Image.fromarray(COLORS).convert("RGBA")
    alpha.putpixel((0, 0), (255, 0, 0, 0))
    saved(folder / "c.png", alpha)
    with pytest.raises(ValueError, match="2 of 3 photos cannot be labeled, mend them or move them away") as error:
        check_photos(recipe_of(str(folder)).photos)
    assert "b.png cannot be read as a photo" in str(
        error.value
    ) and "c.png cannot be read as a photo: it is trans" in str(error.value)
