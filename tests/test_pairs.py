"""Folders of pairs in the layouts of three published data sets, written here file by file."""

import numpy as np
import pytest
from PIL import Image

from attnlab.segmentation.folders import ISAID, LOVEDA, OPEN_EARTH_MAP, Layout, PairFolder, patches, shrink

RNG = np.random.default_rng(0)


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return array


def photo(rows=6, columns=8):
    return RNG.integers(0, 256, (rows, columns, 3), dtype=np.uint8)


def test_loveda(tmp_path):
    for place, number in (("Rural", 0), ("Urban", 1366)):
        image = write(tmp_path / f"Train/{place}/images_png/{number}.png", photo())
        mask = write(
            tmp_path / f"Train/{place}/masks_png/{number}.png", np.arange(48, dtype=np.uint8).reshape(6, 8) % 8
        )
    pairs = PairFolder(tmp_path / "Train", LOVEDA)
    assert len(pairs) == 2 and [p.parent.parent.name for p, _ in pairs.paths] == ["Rural", "Urban"]
    found, labels = pairs[1]
    np.testing.assert_array_equal(found, image)
    np.testing.assert_array_equal(labels, np.where(mask == 0, 255, mask - 1))  # 0 has no data
    assert pairs.classes[labels[0, 2]] == "building" and pairs.classes[labels[0, 7]] == "agriculture"  # 2 and 7


def test_open_earth_map(tmp_path):
    for region in ("aachen", "tokyo"):
        write(tmp_path / f"OpenEarthMap_wo_xBD/{region}/images/{region}_1.tif", photo())
        write(
            tmp_path / f"OpenEarthMap_wo_xBD/{region}/labels/{region}_1.tif",
            np.tile(np.arange(8, dtype=np.uint8) + 1, (6, 1)),
        )
    (tmp_path / "OpenEarthMap_wo_xBD/train.txt").write_text("aachen_1.tif\n")
    pairs = PairFolder(tmp_path / "OpenEarthMap_wo_xBD", OPEN_EARTH_MAP)
    assert len(pairs) == 2
    assert [pairs.classes[k] for k in pairs[0][1][0]] == [
        "bareland", "rangeland", "developed space", "road", "tree", "water", "agriculture land", "building"
    ]  # fmt: skip


def test_isaid(tmp_path):
    write(tmp_path / "train/images/P0002.png", photo())
    mask = np.zeros((6, 8, 3), np.uint8)
    mask[0, 0], mask[1, 1], mask[2, 2] = (0, 0, 63), (0, 127, 127), (0, 100, 155)
    write(tmp_path / "train/Semantic_masks/images/P0002_instance_color_RGB.png", mask)
    pairs = PairFolder(tmp_path / "train", ISAID)
    labels = pairs[0][1]
    assert len(pairs.classes) == 16 and (labels == 0).sum() == 45  # background is a class, nothing is left out
    assert [pairs.classes[labels[i, i]] for i in range(3)] == ["ship", "large vehicle", "harbor"]
    mask[3, 3] = (1, 2, 3)
    write(tmp_path / "train/Semantic_masks/images/P0002_instance_color_RGB.png", mask)
    with pytest.raises(ValueError, match=r"P0002_instance_color_RGB.png has \[\(1, 2, 3\)\], the values of no class"):
        pairs[0]


@pytest.mark.parametrize("mode", ["index", "palette"])
def test_a_folder_of_ones_own(tmp_path, mode):
    image, mask = photo(), RNG.integers(0, 2, (6, 8), dtype=np.uint8)
    mask[0, 0] = 255
    write(tmp_path / "photos/a.png", image)
    picture = Image.fromarray(mask)
    if mode == "palette":
        picture = Image.frombytes("P", (8, 6), mask.tobytes())
        picture.putpalette([9, 9, 9] * 256)  # the numbers count, not the colors
    (tmp_path / "m").mkdir()
    picture.save(tmp_path / "m/a_label.png")
    pairs = PairFolder(tmp_path, Layout(("sky", "roof"), images="photos/*.png", masks="m/{name}_label.png"))
    np.testing.assert_array_equal(pairs[0][1], mask)
    assert "1 pairs of sky, roof" in repr(pairs)


SIXTEEN = np.linspace(0, 65535, 48).astype(np.uint16).reshape(6, 8)
FORMS = {  # of the same gray photo
    "8 bits": Image.fromarray((SIXTEEN / 257).round().astype(np.uint8)),
    "16 bits": Image.fromarray(SIXTEEN),
    "fractions": Image.fromarray((SIXTEEN / 65535).astype(np.float32)),
    "alpha": Image.fromarray((SIXTEEN / 257).round().astype(np.uint8)).convert("LA"),
}


@pytest.mark.parametrize("form", FORMS)
def test_photos_of_every_form(tmp_path, form):
    """The shared reader has tests of its own; here of 48 grays in 16 bits none may be lost."""
    write(tmp_path / "masks/a.png", np.zeros((6, 8), np.uint8))
    (tmp_path / "images").mkdir()
    FORMS[form].save(tmp_path / "images/a.tif")
    (found, _), *_ = PairFolder(tmp_path, Layout(("all",)))
    np.testing.assert_array_equal(found, np.repeat((SIXTEEN / 257).round()[..., None], 3, 2))


NUMBERS = np.arange(48, dtype=np.uint8).reshape(6, 8) % 2
MASK_FORMS = {
    "1 bit": lambda: Image.fromarray(NUMBERS > 0),
    "8 bits": lambda: Image.fromarray(NUMBERS),
    "16 bits": lambda: Image.fromarray(NUMBERS.astype(np.uint16)),
    "32 bits": lambda: Image.fromarray(NUMBERS.astype(np.int32)),
    "float": lambda: Image.fromarray(NUMBERS.astype(np.float32)),
    "alpha": lambda: Image.fromarray(NUMBERS).convert("LA"),
}


@pytest.mark.parametrize("form", MASK_FORMS)
def test_masks_of_every_form(tmp_path, form):
    write(tmp_path / "images/a.png", photo())
    (tmp_path / "masks").mkdir()
    picture = MASK_FORMS[form]()
    picture.save(tmp_path / "masks/a.tif")
    pairs = PairFolder(tmp_path, Layout(("sky", "roof"), masks="masks/{name}.tif"))
    np.testing.assert_array_equal(pairs[0][1], NUMBERS)


def test_masks_that_say_nothing_certain_are_refused(tmp_path):
    write(tmp_path / "images/a.png", photo())
    mask, layout = tmp_path / "masks/a.png", Layout(("sky", "roof"))
    half = Image.fromarray(NUMBERS).convert("LA")
    half.putpixel((0, 0), (0, 9))
    write(mask, NUMBERS)
    (pairs,) = (PairFolder(tmp_path, layout),)
    for picture, options, says in [
        (half, {}, "has 2 channels"),
        (Image.fromarray(NUMBERS + np.float32(0.5)), {"format": "tiff"}, r"has \[0.5, 1.5\], the values of no class"),
        (Image.fromarray(NUMBERS * np.float32(np.nan)), {"format": "tiff"}, r"has \[nan\], the values of no class"),
        (Image.fromarray(NUMBERS), {"format": "jpeg", "quality": 100}, "is a JPEG, which changes the numbers"),
    ]:
        picture.save(mask, **options)
        with pytest.raises(ValueError, match=says):
            pairs[0]
    for damaged in (b"", b"no image", (tmp_path / "images/a.png").read_bytes()[:70]):
        mask.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a.png cannot be read as a mask: "):
            pairs[0]


def test_color_masks_ignore_nothing_unless_told(tmp_path):
    """The default of `ignore` is a number, which no color is."""
    colors = {(0, 0, 0): "ground", (255, 0, 0): "roof", (0, 0, 255): "roof"}
    write(tmp_path / "images/a.png", photo())
    drawn = np.zeros((6, 8, 3), np.uint8)
    drawn[0, 0], drawn[1, 1] = (255, 0, 0), (0, 0, 255)
    mask, expected = tmp_path / "masks/a.png", (drawn > 0).any(2).astype(int)
    layout = Layout(("ground", "roof"), values=colors)
    palette = Image.fromarray(drawn).convert("P", palette=Image.Palette.ADAPTIVE, colors=3)
    write(mask, drawn)
    for picture in (Image.fromarray(drawn), Image.fromarray(drawn).convert("RGBA"), palette):
        picture.save(mask)
        np.testing.assert_array_equal(PairFolder(tmp_path, layout)[0][1], expected)
    drawn[5, 5] = 9
    write(mask, drawn)
    with pytest.raises(ValueError, match=r"has \[\(9, 9, 9\)\], the values of no class"):
        PairFolder(tmp_path, layout)[0]
    told = PairFolder(tmp_path, Layout(("ground", "roof"), values=colors, ignore=((9, 9, 9),)))
    assert told[0][1][5, 5] == 255
    see_through = Image.fromarray(drawn).convert("RGBA")
    see_through.putalpha(Image.fromarray(NUMBERS * 255))
    see_through.save(mask)
    with pytest.raises(ValueError, match="transparent in places"):
        told[0]


def test_the_number_255_may_be_a_class(tmp_path):
    write(tmp_path / "images/a.png", photo())
    write(tmp_path / "masks/a.png", NUMBERS * 255)
    pairs = PairFolder(tmp_path, Layout(("sky", "roof"), values={0: "sky", 255: "roof"}))
    np.testing.assert_array_equal(pairs[0][1], NUMBERS)


@pytest.mark.parametrize(("rows", "columns"), [(6, 8), (8, 8)])
@pytest.mark.parametrize("turn", [3, 6])
def test_images_and_masks_stand_the_same_way(tmp_path, rows, columns, turn):
    """EXIF data says that a photo is turned; nothing tells whether its mask was drawn before that or after."""
    image, exif = photo(rows, columns), Image.Exif()
    exif[0x0112] = turn
    labels = RNG.integers(0, 2, (rows, columns), dtype=np.uint8)
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    Image.fromarray(image).save(tmp_path / "images/a.png", exif=exif)
    Image.fromarray(labels).save(tmp_path / "masks/a.png", exif=exif)
    pairs, upright = (
        PairFolder(tmp_path, Layout(("sky", "roof"))),
        [np.rot90(x, {3: 2, 6: -1}[turn]) for x in (image, labels)],
    )
    for found, expected in zip(pairs[0], upright, strict=True):
        np.testing.assert_array_equal(found, expected)
    Image.fromarray(labels).save(tmp_path / "masks/a.png")
    with pytest.raises(ValueError, match=r"a.png.*; EXIF data turns them differently: save both upright"):
        pairs[0]
    Image.fromarray(upright[1]).save(tmp_path / "masks/a.png")
    if turn == 6 and rows != columns:  # its size shows that it stands upright
        np.testing.assert_array_equal(pairs[0][1], upright[1])
    else:
        with pytest.raises(ValueError, match="EXIF data turns them differently"):
            pairs[0]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ignore": (0,)}, r"\[0\] are ignored, and the values of classes"),
        ({"ignore": 255}, "the tuple ignore hold whole numbers"),
        ({"ignore": ((0, 0, 0),)}, "hold whole numbers, or all of them colors"),
        ({"values": {(0, 0, 0): "sky", 1: "roof"}}, "hold colors such as"),
        ({"values": {(0, 0, 256): "sky"}}, "hold colors such as"),
        ({"values": {(0, 0, 9): "sky"}, "ignore": (255,)}, "hold colors such as"),
        ({"values": {(0, 0, 9): "sky"}, "ignore": (0, 0, 0)}, "hold colors such as"),
        ({"values": {0.5: "sky"}}, "hold whole numbers"),
        ({"values": {1: "ski"}}, r"values name \['ski'\], which are none of the classes sky, roof"),
        ({"classes": ("sky", "sky")}, "classes are 1 to 255 different names"),
        ({"classes": ()}, "classes are 1 to 255 different names"),
        ({"classes": ("sky")}, r"classes='sky' is one text: give a tuple of names, such as \('sky',\)"),
        ({"images": "/data/*.png"}, r"images='/data/\*.png' is no pattern below"),
        ({"images": ""}, "images='' is no pattern below"),
        ({"classes": tuple(map(str, range(256)))}, "not 256"),
        ({"masks": "masks/{stem}.png"}, r"masks='masks/\{stem\}.png' may name \{name\} and \{parent\}"),
    ],
)
def test_layouts_that_contradict_themselves(tmp_path, options, says):
    write(tmp_path / "images/a.png", photo())
    with pytest.raises(ValueError, match=says):
        PairFolder(tmp_path, Layout(**{"classes": ("sky", "roof")} | options))


def test_images_beside_their_masks(tmp_path):
    write(tmp_path / "a.tif", photo())
    write(tmp_path / "a_mask.png", NUMBERS)
    pairs = PairFolder(tmp_path, Layout(("sky", "roof"), images="*.tif", masks="{name}_mask.png"))
    assert len(pairs) == 1 and (pairs[0:1][0][1] == NUMBERS).all()


def test_patches_cover_all_of_an_image():
    image, labels = photo(10, 7), np.zeros((10, 7), np.uint8)
    labels[:4, :4] = 255
    found, marked = patches([(image, labels)], 4)
    corners = [(0, 3), (4, 0), (4, 3), (6, 0), (6, 3)]  # rows 0, 4, 6; columns 0, 3; at (0, 0) no pixel has a class
    assert len(found) == 5 and found.shape[1:] == (4, 4, 3) and marked.dtype == np.uint8
    for patch, (row, column) in zip(found, corners, strict=True):
        np.testing.assert_array_equal(patch, image[row : row + 4, column : column + 4])
    assert len(patches([(image, labels)], 4, stride=2, valid=0)[0]) == 4 * 3
    assert len(patches([(image, labels)], 8 // 2, valid=1 - 4 / 16)[0]) == 5  # at (0, 3), 4 of 16 pixels have no class


def test_bad_input(tmp_path):
    layout = Layout(("sky", "roof"))
    with pytest.raises(FileNotFoundError, match="no folder"):
        PairFolder(tmp_path / "nowhere", layout)
    with pytest.raises(FileNotFoundError, match=r"has no images/\*: name the folder above"):
        PairFolder(tmp_path, layout)
    for name in "ab":
        write(tmp_path / f"images/{name}.png", photo())
    write(tmp_path / "masks/a.png", np.zeros((6, 7), np.uint8))
    with pytest.raises(FileNotFoundError, match=r"1 of 2 images have no mask masks/\{name\}.png: images/b.png"):
        PairFolder(tmp_path, layout)
    write(tmp_path / "masks/b.png", np.full((6, 8), 7, np.uint8))
    pairs = PairFolder(tmp_path, layout)
    with pytest.raises(ValueError, match=r"a.png is 6 x 7, its image a.png 6 x 8"):
        pairs[0]
    with pytest.raises(ValueError, match=r"b.png has \[7\], the values of no class"):
        pairs[1]
    write(tmp_path / "masks/b.png", photo())
    with pytest.raises(ValueError, match="has 3 channels: give the layout's values as colors"):
        pairs[1]
    with pytest.raises(ValueError, match="no patch of 64 x 64 in 1 images"):
        patches([(photo(), np.zeros((6, 8), np.uint8))], 64)
    for wrong in ({"size": 0}, {"size": 2.5}, {"stride": 0}, {"valid": 50}, {"valid": "half"}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.*: give a "):
            patches([(photo(), np.zeros((6, 8), np.uint8))], **{"size": 4} | wrong)


def test_small_pairs_have_mean_colors_and_the_most_frequent_label():
    labels = np.array([[[0, 0, 1, 2], [0, 3, 2, 1], [5, 5, 255, 255], [5, 5, 255, 0]]], np.uint8)
    images = np.arange(16, dtype=np.uint8).reshape(1, 4, 4, 1) * np.ones(3, np.uint8)
    small, found = shrink(images, labels, 2)
    assert found.tolist() == [[[0, 2], [5, 255]]] and found.dtype == np.uint8  # of equals the higher number
    assert small[0, ..., 0].tolist() == [[2, 4], [10, 12]] and small.shape == (1, 2, 2, 3)  # 2.5 to the even number
    odd = np.array([3, 4, 3, 4], np.uint8).reshape(1, 2, 2, 1) * np.ones(3, np.uint8)
    assert shrink(odd, labels[:, :2, :2], 2)[0].tolist() == [[[[4, 4, 4]]]]  # 3.5, rounded
    for factor in (0, -2, 2.0):
        with pytest.raises(ValueError, match=f"factor={factor}: give a whole number, 1 or more"):
            shrink(images, labels, factor)
    with pytest.raises(ValueError, match="factor=3 does not divide pairs of 4 x 4"):
        shrink(images, labels, 3)
