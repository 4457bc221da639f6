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


def test_patches_cover_all_of_an_image():
    image, labels = photo(10, 7), np.zeros((10, 7), np.uint8)
    labels[:4, :4] = 255
    found, marked = patches([(image, labels)], 4)
    corners = [(0, 3), (4, 0), (4, 3), (6, 0), (6, 3)]  # rows 0, 4, 6; columns 0, 3; at (0, 0) no pixel has a class
    assert len(found) == 5 and found.shape[1:] == (4, 4, 3) and marked.dtype == np.uint8
    for patch, (row, column) in zip(found, corners, strict=True):
        np.testing.assert_array_equal(patch, image[row : row + 4, column : column + 4])
    assert len(patches([(image, labels)], 4, stride=2, valid=0)[0]) == 4 * 3


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


def test_small_pairs_have_mean_colors_and_the_most_frequent_label():
    labels = np.array([[[0, 0, 1, 2], [0, 3, 2, 1], [5, 5, 255, 255], [5, 5, 255, 0]]], np.uint8)
    images = np.arange(16, dtype=np.uint8).reshape(1, 4, 4, 1) * np.ones(3, np.uint8)
    small, found = shrink(images, labels, 2)
    assert found.tolist() == [[[0, 2], [5, 255]]] and found.dtype == np.uint8  # of equals the higher number
    assert small[0, ..., 0].tolist() == [[2, 4], [10, 12]] and small.shape == (1, 2, 2, 3)  # 2.5 to the even number
    with pytest.raises(ValueError, match="factor=3 does not divide pairs of 4 x 4"):
        shrink(images, labels, 3)
