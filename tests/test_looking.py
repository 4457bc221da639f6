"""Labels of photos: where tiles lie, what several looks agree on, and the folder that comes out."""

import hashlib
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from small_pipelines import PROMPT, SMALL
from test_families import build

import attnlab as al
from attnlab.dataset import (
    Dataset,
    Filters,
    Photos,
    Recipe,
    export_coco,
    generate_dataset,
    label,
    looking,
    making,
    verify_dataset,
)
from attnlab.dataset.looking import label_photo, look, tiling, vote_labels
from attnlab.scenes import street

OPEN = Filters(area=None, flat=None, blank=None, duplicates=None)
SEED = street.HELD_OUT + 500


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three photos of three sizes; the second lies on its side."""
    folder = tmp_path_factory.mktemp("photos")
    for k, size in enumerate([(64, 64), (96, 72), (64, 64)]):
        image, exif = Image.fromarray(street.render(SEED + k, 128).image).resize(size), Image.Exif()
        exif[0x0112] = 6 if k == 1 else 1
        image.save(folder / f"{k}.png", exif=exif)
    return folder


def recipe_of(folder, classes=("tree", "sky"), **change):
    asked = {name: change.pop(name) for name in ("tiles", "looks", "agree", "timesteps") if name in change}
    how = {"timesteps": (300,), **asked}
    options = {"map": "ovam", "filters": OPEN, "threads": 1, **change}
    return Recipe(photos=Photos(str(folder), **how), classes={name: name for name in classes}, **options)


@pytest.fixture(scope="module")
def labeled(folder, tmp_path_factory):
    recipe = recipe_of(folder, looks=3, tiles=2, shard=1)
    return generate_dataset(recipe, tmp_path_factory.mktemp("made") / "labeled")


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_tiles_cover_a_photo_and_overlap():
    rng = np.random.default_rng(0)
    for _ in range(300):
        size, tiles = tuple(rng.integers(8, 900, 2).tolist()), int(rng.integers(1, 6))
        box, multiple = tuple((rng.integers(4, 12, 2) * 16).tolist()), int(rng.choice([8, 16]))
        cut = tiling(size, box, tiles, multiple)
        covered = np.zeros(cut.size, int)
        for y, x in cut.corners:
            covered[y : y + cut.tile[0], x : x + cut.tile[1]] += 1
            assert y + cut.tile[0] <= cut.size[0] and x + cut.tile[1] <= cut.size[1]
        assert covered.min() >= 1
        assert all(side % multiple == 0 for side in (*cut.size, *cut.tile, *sum(cut.corners, ())))
        assert all(tile <= side for tile, side in zip(cut.tile, box, strict=True))
        for axis in (0, 1):
            starts = sorted({corner[axis] for corner in cut.corners})
            assert len(starts) <= tiles
            shared = cut.tile[axis] - np.diff(starts)
            assert (shared >= cut.tile[axis] / 4 - multiple).all() and (shared > 0).all()


def test_a_photo_keeps_its_shape_and_fits():
    assert tiling((3000, 4000), (512, 512)) == ((384, 512), (384, 512), [(0, 0)])
    assert tiling((4000, 3000), (512, 512)).size == (512, 384)
    cut = tiling((3000, 4000), (512, 512), tiles=3)
    assert cut.size == (960, 1280) and cut.tile == (512, 512)  # 512 and two times three quarters of it
    assert {x for _, x in cut.corners} == {0, 384, 768} and {y for y, _ in cut.corners} == {0, 224, 448}
    assert tiling((10, 1000), (64, 64)).size == (8, 64)


@pytest.fixture
def seeing(monkeypatch):
    """Let a look see the red of what it looks at, and no model at all: where tiles are put is then exact."""

    def blocks(image, recipe, size, tokens):
        side = image.shape[0] // size[0]
        red = image[..., 0].astype(np.float32).reshape(size[0], side, size[1], side).mean((1, 3))
        return {"tree": red, "sky": np.ones(size, np.float32)}

    monkeypatch.setattr(looking, "record_image", lambda pipe, images, prompts, **how: images)
    monkeypatch.setattr(looking, "heats", blocks)


@pytest.mark.parametrize("tiles", [1, 2, 4])
def test_tiles_are_put_together_without_a_seam(pipe, folder, seeing, tiles):
    photo = np.random.default_rng(0).integers(0, 256, (150, 200, 3), dtype=np.uint8)
    recipe = recipe_of(folder, tiles=tiles, looks=2)
    height, width = tiling(photo.shape[:2], (64, 64), tiles).size
    resized = np.asarray(Image.fromarray(photo).resize((width, height), Image.Resampling.LANCZOS))
    expected = resized[..., 0].astype(float).reshape(height // 4, 4, width // 4, 4).mean((1, 3))
    looks = look(pipe, photo, recipe, 0)
    assert len(looks) == 2
    for maps in looks:
        np.testing.assert_allclose(maps["sky"], np.ones((height // 4, width // 4)), atol=1e-5)
        np.testing.assert_allclose(maps["tree"], expected, rtol=1e-4)


def test_a_photo_without_content_has_no_seam(pipe, folder):
    """Over many looks at gray: maps step as much within tiles as where they end."""
    recipe = recipe_of(folder, tiles=3, looks=24, timesteps=(300, 100))
    maps = np.mean([one["sky"] for one in look(pipe, np.full((64, 256, 3), 128, np.uint8), recipe, 0)], axis=0)
    cut = tiling((64, 256), (64, 64), 3)
    ends = sorted({(x + end) // 4 for _, x in cut.corners for end in (0, cut.tile[1])} - {0, cut.size[1] // 4})
    steps = np.abs(np.diff(maps, axis=1)).mean(axis=0)  # between columns k and k + 1
    seams = steps[[end - 1 for end in ends]]
    assert len(ends) == 4 and seams.max() < 1.5 * steps.max() and seams.mean() < 1.5 * np.delete(steps, ends).mean()


def test_one_look_is_the_models_own_map(pipe, folder):
    """What record_image, ovam and otsu_mask say of the resized photo, by hand."""
    recipe = recipe_of(folder, seed=5)
    photo = al.storage.read_rgb(folder / "1.png")
    assert photo.shape == (96, 72, 3), "upright"
    small = np.asarray(Image.fromarray(photo).resize((48, 64), Image.Resampling.LANCZOS))
    recording = al.record_image(pipe, small, "a photo", timesteps=300, generator=al.seed(6))
    found = label_photo(look(pipe, photo, recipe, 1), photo, recipe)
    for name in ("tree", "sky"):
        heat = al.ovam(recording, name).upscale((96, 72), "bilinear")[name]
        assert al.metrics.iou(found.masks[name], al.otsu_mask(heat)) > 0.999
    assert found.labels.shape == (96, 72) and set(np.unique(found.labels)) <= {0, 1, 2}


def test_several_looks_vote_as_vote_mask_does(pipe, folder):
    recipe = recipe_of(folder, ["tree"], looks=5, mask={"method": "threshold", "level": 0.5}, batch=3)
    photo = al.storage.read_rgb(folder / "0.png")
    several = al.record_image(pipe, [photo] * 5, ["a photo"] * 5, timesteps=300, generator=al.seed(0))
    maps = [al.ovam(several[i], "tree").upscale(64, "bilinear")["tree"] for i in range(5)]
    found = label_photo(look(pipe, photo, recipe, 0), photo, recipe)
    expected = al.vote_mask(maps, level=0.5, agree=0.8)
    assert (found.labels != expected).mean() < 0.002 and (expected == 255).any()
    np.testing.assert_array_equal(found.labels, found.masks["tree"])
    assert found.areas == {"tree": (found.labels == 1).mean()}


def ramps(*rows):
    return [{"tree": np.array([row], np.float32), "sky": np.array([row[::-1]], np.float32)} for row in rows]


def test_a_vote_among_classes():
    """By hand: of five looks, four must give a pixel the same class."""
    image = np.random.default_rng(0).integers(0, 255, (1, 4, 3), dtype=np.uint8)
    recipe = Recipe(prompts=["tree sky"], classes={"tree": "tree", "sky": "sky"}, filters=OPEN,
                    mask={"method": "threshold", "level": 0.5})  # fmt: skip
    each = [label(maps, image, recipe) for maps in ramps(*[[9, 9, 0, 0]] * 3, [9, 0, 0, 0], [9, 0, 9, 0])]
    assert [one.labels[0].tolist() for one in each[2:]] == [[1, 1, 2, 2], [1, 0, 0, 2], [1, 2, 1, 2]]
    found = vote_labels(each[0], each, 0.8)
    assert found.labels.tolist() == [[1, 255, 255, 2]] and found.masks["tree"].tolist() == [[1, 255, 0, 0]]
    assert vote_labels(each[0], each, 0.6).labels.tolist() == [[1, 1, 2, 2]]
    assert found.rejected is None
    divided = [label(maps, image, recipe) for maps in ramps([9, 0, 0, 0], [0, 9, 0, 0], [0, 0, 9, 0])]
    assert vote_labels(divided[0], divided, 0.8).rejected == "no agreement of tree"


def test_batches_change_nothing_else(pipe, folder):
    photo = al.storage.read_rgb(folder / "1.png")
    one, many = (look(pipe, photo, recipe_of(folder, tiles=2, looks=2, batch=batch), 0) for batch in (1, 7))
    for a, b in zip(one, many, strict=True):
        np.testing.assert_allclose(a["sky"], b["sky"], atol=1e-4 * b["sky"].max())
    other = look(pipe, photo, recipe_of(folder, tiles=2, looks=2), 1)
    assert np.abs(other[0]["sky"] - many[0]["sky"]).max() > 1e-3, "each record has noise of its own"


def test_masks_have_the_photos_size_and_little_memory():
    """Four classes of twelve megapixels: the photo has 36 MB, a map of its size 48 MB."""
    photo = np.random.default_rng(0).integers(0, 256, (3000, 4000, 3), dtype=np.uint8)
    ramp = np.tile(np.linspace(0, 1, 64, dtype=np.float32), (48, 1))
    maps = {"a": ramp, "b": ramp[:, ::-1].copy(), "c": ramp.T[:48, :1] * ramp, "d": ramp**2}
    recipe = Recipe(prompts=["a b c d"], classes={n: n for n in maps}, filters=OPEN, map="ovam",
                    mask={"method": "threshold", "level": 0.5})  # fmt: skip
    recipe = replace(recipe, photos=Photos("x", {"x.png": "0" * 64}, looks=2), prompts=None)
    tracemalloc.start()
    found = label_photo([maps, maps], photo, recipe)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 400e6, f"{peak / 1e6:.0f} MB"
    assert found.labels.shape == (3000, 4000) == found.masks["a"].shape
    border = np.flatnonzero(np.diff(found.masks["a"][1500]))
    assert len(border) == 1 and abs(border[0] - 2000) <= 2, "enlarged pixels stay where they were"


@pytest.mark.parametrize("kind", ["1.x", "XL", "flux", "qwen_image"])
def test_other_models(pipe, folder, kind):
    """Stable Diffusion's layout, XL's, and joint attention, whose maps are of the prompt's words."""
    photo = np.random.default_rng(0).integers(0, 256, (80, 120, 3), dtype=np.uint8)
    if kind in SMALL:
        other, word = SMALL[kind]()[0], PROMPT.split()[1]
        recipe = recipe_of(folder, [word], prompts=[PROMPT], map="daam", tiles=2, looks=2, size=(32, 48))
    else:
        made = StableDiffusionXLPipeline if kind == "XL" else StableDiffusionPipeline
        other, word = made(**build(kind, pipe.tokenizer)), "tree"
        recipe = recipe_of(folder, tiles=2, looks=2, size=(64, 64))
    other.set_progress_bar_config(disable=True)
    looks = look(other, photo, recipe, 0)
    assert len(looks) == 2 and all(np.isfinite(maps[word]).all() and maps[word].max() > 0 for maps in looks)
    found = label_photo(looks, photo, recipe)
    assert found.labels.shape == (80, 120)


def test_the_folder_is_a_data_set_like_any_other(labeled, folder, tmp_path):
    assert verify_dataset(labeled.folder) == [] and len(labeled) == 3
    for k, (image, labels, line) in enumerate(labeled):
        np.testing.assert_array_equal(np.asarray(image), al.storage.read_rgb(folder / f"{k}.png"))
        assert labels.shape == image.size[::-1] and line["photo"] == f"{k}.png" and line["prompt"] == "a photo"
        assert set(np.unique(labels)) <= {0, 1, 2, 255} and (labels == 255).any()
    text = (labeled.folder / "README.md").read_text("utf-8")
    assert "in tiles of the size that the model draws, 2 along the longer side (3 looks, each" in text
    assert "fewer than 80% of the looks" in text and "3 images were labeled" in text and "were made" not in text
    export_coco(labeled, tmp_path / "coco.json")
    metadata = labeled.folder / "metadata.jsonl"
    before = metadata.read_text("utf-8")
    metadata.write_text(before.replace('"photo": "1.png"', '"photo": "2.png"'))
    try:
        assert any("photo is '2.png', by recipe.yaml '1.png'" in said for said in verify_dataset(labeled.folder))
    finally:
        metadata.write_text(before)


def test_interrupted_it_goes_on_wherever_the_photos_lie(labeled, folder, tmp_path, monkeypatch):
    recipe, made = labeled.recipe, making.make_shard

    def twice(recipe, out, number, *advance):
        if number == 1:
            raise KeyboardInterrupt
        return made(recipe, out, number, *advance)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(making, "make_shard", twice)
        generate_dataset(recipe, tmp_path / "labeled")
    (tmp_path / "moved").mkdir()
    for path in folder.iterdir():
        (tmp_path / "moved" / path.name).write_bytes(path.read_bytes())
    moved = recipe_of(tmp_path / "moved", looks=3, tiles=2, shard=1)
    assert moved.digest == recipe.digest and moved.photos.where != recipe.photos.where
    found = generate_dataset(moved, tmp_path / "labeled")
    assert verify_dataset(found.folder) == [] and contents(found.folder) == contents(labeled.folder)


def test_photos_that_changed_are_named(labeled, folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    before = recipe_of(tmp_path, looks=3, tiles=2, shard=1)
    Image.fromarray(street.render(SEED + 9).image).save(tmp_path / "1.png")
    with pytest.raises(ValueError, match=r"photo 1\.png was changed since this recipe was made"):
        generate_dataset(before, tmp_path / "out")
    assert not (tmp_path / "out").exists(), "before anything is written"
    (tmp_path / "2.png").rename(tmp_path / "3.png")
    with pytest.raises(ValueError, match=r"\(changed: 1\.png; new: 3\.png; missing: 2\.png\): name another folder"):
        generate_dataset(recipe_of(tmp_path, looks=3, tiles=2, shard=1), labeled.folder)
    assert len(Dataset(labeled.folder)) == 3


def test_masks_of_each_class_have_pixels_that_are_ignored(folder, tmp_path):
    found = generate_dataset(recipe_of(folder / "0.png", looks=3, labels=False), tmp_path / "out")
    assert verify_dataset(found.folder) == [] and len(found) == 1
    values = np.asarray(Image.open(tmp_path / "out/masks/000000_tree.png"))
    assert set(np.unique(values)) == {0, 1, 255}
    np.testing.assert_array_equal(found[0].labels["tree"], values == 1)


def test_what_a_model_cannot_look_at_is_said_before_a_folder_is_made(folder, tmp_path):
    with pytest.raises(ValueError, match=r"a look at 0\.png failed: timesteps=\[5000\]: give .* 0\.\.999"):
        generate_dataset(recipe_of(folder, timesteps=(5000,)), tmp_path / "out")
    with pytest.raises(ValueError, match="no prompt has the word 'tree'; any text does with map: ovam"):
        generate_dataset(recipe_of(folder, map="daam"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
