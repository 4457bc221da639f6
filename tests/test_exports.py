"""Exports hold the masks' pixels, as the tools that train on them read them."""

import errno
import json
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import export_readers as readers
import numpy as np
import pytest
import supervision
from export_readers import MAPS, OBJECTS, check_objects, objects_of
from PIL import Image
from scipy import ndimage

from attnlab.dataset import Dataset, Recipe, export_coco, export_segformer, export_voc, export_yolo
from attnlab.dataset.exports import shapes
from attnlab.dataset.exports.polygons import trace_polygons
from attnlab.dataset.exports.voc import voc_colors
from attnlab.dataset.records import as_lines, write_record
from attnlab.scenes import street

ROOT = Path(__file__).parents[1]
FOLDERS = {"yolo": export_yolo, "voc": export_voc, "segformer": export_segformer}


def write_set(folder, labels, classes, images=None):
    """Write a finished data set of these labels, which no model made."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    flat = not isinstance(labels[0], dict)
    recipe = Recipe(prompts=["a scene"], classes={c: c for c in classes}, images=len(labels), labels=flat)
    recipe.save(folder / "recipe.yaml")
    lines = []
    for i, one in enumerate(labels):
        shape = one.shape if flat else next(iter(one.values())).shape
        image = np.random.default_rng(i).integers(0, 255, (*shape, 3), np.uint8) if images is None else images[i]
        masks, one = ({}, one) if flat else (one, np.zeros(shape, np.uint8))
        labeling = SimpleNamespace(labels=one, masks=masks, areas={}, scores={}, similarity=None, rejected=None)
        lines.append(write_record(folder, recipe, i, Image.fromarray(image), labeling))
    (folder / "metadata.jsonl").write_text(as_lines(lines))
    (folder / "rejected.jsonl").write_text("")
    return Dataset(folder)


def nasty():
    """Labels of two classes that are hard to write as polygons, by name."""
    rng, found = np.random.default_rng(0), {}

    def draw(name, shape=(16, 20)):
        return found.setdefault(name, np.zeros(shape, np.uint8))

    draw("nothing")
    draw("all of it")[:] = 1
    draw("corners")[[0, 0, -1, -1], [0, -1, 0, -1]] = 2
    draw("thin lines")[3] = 1
    found["thin lines"][6:, 5] = 2
    draw("diagonal")[np.arange(16), np.arange(16)] = 1
    draw("rings in rings", (21, 21))[:] = np.maximum(*np.abs(np.mgrid[-10:11, -10:11])) % 3
    draw("one pixel", (1, 1))[:] = 2
    draw("a row", (1, 30))[0, ::3] = 1
    draw("a column", (30, 1))[5:9] = 2
    draw("chess")[:] = np.indices((16, 20)).sum(0) % 2
    draw("many holes in a row", (5, 2500))[:] = 1
    found["many holes in a row"][2, 1::2] = 0
    draw("holes by a corner")[2:9, 2:9] = 1
    found["holes by a corner"][[4, 5], [4, 5]] = 0
    draw("ignored")[4:12, 4:12] = 255
    found["ignored"][6:10, 6:10] = 1
    found["ignored"][8, 8] = 255
    draw("wide", (7, 8000))[2:5, [0, 3, 5, 4001, 7997, 7999]] = 2
    for i in range(30):
        size, density = rng.integers(1, 24, 2), rng.uniform(0.1, 0.9)
        found[f"random {i}"] = np.where(rng.uniform(size=size) < density, rng.integers(1, 3, size), 0).astype(np.uint8)
    return found


@pytest.fixture(scope="module")
def hard(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("hard") / "set", list(nasty().values()), ["fire", "smoke"])


@pytest.fixture(scope="module")
def streets(tmp_path_factory):
    """Rendered scenes of two sizes, in which all classes are."""
    scenes = [street.render(street.HELD_OUT + i, 128 if i % 4 == 0 else 64) for i in range(40)]
    assert {number for scene in scenes for number in np.unique(scene.labels)} == set(range(len(street.CLASSES)))
    labels, images = [scene.labels for scene in scenes], [scene.image for scene in scenes]
    return write_set(tmp_path_factory.mktemp("streets") / "set", labels, street.CLASSES[1:], images)


@pytest.mark.parametrize("form", OBJECTS)
def test_readers_get_every_object_to_the_pixel(streets, hard, tmp_path, form):
    check_objects(streets, OBJECTS[form](streets, tmp_path / "streets"))
    kept = hard
    if form == "voc":  # which has numbers for 254 objects
        few = [labels for labels in nasty().values() if objects_of(labels, kept.classes).total() < 255]
        kept = write_set(tmp_path / "few", few, ["fire", "smoke"])
    check_objects(kept, OBJECTS[form](kept, tmp_path / "hard"))


@pytest.fixture(scope="module")
def side_by_side(tmp_path_factory):
    """Images of one size, whose objects reach all edges, by label images and by masks that overlap."""
    rng, folder = np.random.default_rng(1), tmp_path_factory.mktemp("many")
    labels = [rng.integers(0, 3, (12, 9), np.uint8) for _ in range(20)] + [np.full((12, 9), 2, np.uint8)] * 2
    masks = [{"fire": one > 0, "smoke": one != 1} for one in labels]
    return [write_set(folder / name, one, ["fire", "smoke"]) for name, one in (("labels", labels), ("masks", masks))]


def test_images_that_are_traced_together_and_alone_give_the_same_bytes(side_by_side, hard, tmp_path, monkeypatch):
    for together in (True, False):
        for number, dataset in enumerate([*side_by_side, hard]):
            export_coco(dataset, tmp_path / f"{together}/{number}.json", polygons=True)
            export_yolo(dataset, tmp_path / f"{together}/yolo-{number}")
        monkeypatch.setattr(shapes, "_TOGETHER", 1)
    assert contents(tmp_path / "True") == contents(tmp_path / "False")


def test_polygons_and_masks_of_coco_are_of_the_same_objects(side_by_side, hard, streets, tmp_path):
    for number, dataset in enumerate([*side_by_side, hard, streets]):
        found = []
        for polygons in (True, False):
            path = export_coco(dataset, tmp_path / f"{number}.json", polygons=polygons)
            found.append(json.loads(path.read_text())["annotations"])
            assert all(isinstance(one.pop("segmentation"), list if polygons else dict) for one in found[-1])
        assert found[0] == found[1] != []  # areas and boxes among it


@pytest.mark.parametrize("form", MAPS)
def test_label_maps_are_read_as_they_are(streets, hard, tmp_path, form):
    for dataset in (streets, hard):
        found = MAPS[form](dataset, tmp_path / dataset.folder.parent.name)
        assert len(found) == len(dataset)
        for image, labels, line in dataset:
            read = found[f"{line['index']:06d}"]
            assert read.dtype == np.uint8 and np.array_equal(read, labels), image.size


def overlaps(dataset, read, size=None):
    """IoU of all objects but thin ones, and of these, of what a reader filled at a size of its own."""
    counts = np.zeros((2, 2))  # (thin, both or either)
    for name, objects in read.items():
        labels = dataset[int(name)].labels
        factor = (size or len(labels)) // len(labels)
        for number, class_name in enumerate(dataset.classes[1:], 1):
            truth = np.kron(labels == number, np.ones((factor, factor), bool))
            found = np.any([np.zeros_like(truth), *(mask for one, mask in objects if one == class_name)], axis=0)
            counts[int(class_name in street.THIN)] += (found & truth).sum(), (found | truth).sum()
    return counts[:, 0] / counts[:, 1]


@pytest.mark.parametrize("enlarged", [False, True])
def test_what_the_page_says_of_enlarged_masks(streets, tmp_path, enlarged):
    folder = export_yolo(streets, tmp_path / "yolo", enlarged=enlarged)
    found = [*overlaps(streets, readers.ultralytics_objects(folder, size=(640, 640)), 640)]
    found += [*overlaps(streets, readers.yolo_objects(folder))]
    call = f"`export_yolo(...{', enlarged=True' * enlarged})`"
    row = f"| {call} | {' | '.join(f'{value:.3f}' for value in found)} |"
    assert row in (ROOT / "docs/exports.md").read_text(), row
    if enlarged:
        check_objects(streets, readers.ultralytics_objects(folder))


def test_supervision_reads_boxes_of_voc(streets, tmp_path):
    folder = export_voc(streets, tmp_path / "voc")
    read = supervision.DetectionDataset.from_pascal_voc(str(folder / "JPEGImages"), str(folder / "Annotations"))
    for (path, _, found), (_, labels, _) in zip(read, streets, strict=True):
        boxes = Counter((read.classes[c], *box) for c, box in zip(found.class_id, found.xyxy.tolist(), strict=True))
        truth = Counter()
        for number, name in enumerate(streets.classes[1:], 1):
            for rows, columns in ndimage.find_objects(ndimage.label(labels == number, np.ones((3, 3)))[0]):
                truth[name, columns.start, rows.start, columns.stop, rows.stop] += 1
        assert boxes == truth, path


def test_images_are_copied_and_jpeg_is_near(streets, tmp_path):
    yolo, hub = export_yolo(streets, tmp_path / "yolo"), export_segformer(streets, tmp_path / "hub")
    voc = export_voc(streets, tmp_path / "voc")
    for image, _, line in streets:
        name = f"{line['index']:06d}"
        for path in (yolo / f"images/train/{name}.png", hub / f"train/images/{name}.png"):
            assert path.read_bytes() == (streets.folder / line["file_name"]).read_bytes() and not path.is_symlink()
        with Image.open(voc / f"JPEGImages/{name}.jpg") as near:
            assert near.format == "JPEG"
            assert np.abs(np.asarray(near, int) - np.asarray(image, int)).mean() < 3


def test_the_palette_is_that_of_voc():
    """By the colors of the development kit's classes."""
    assert voc_colors()[:6] == [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128)]
    assert voc_colors()[20:22] == [(0, 64, 128), (128, 64, 128)] and voc_colors()[255] == (224, 224, 192)


def test_masks_that_overlap(tmp_path):
    """Objects keep all their pixels; where one number must do, the smaller mask has it."""
    house, smoke = np.zeros((2, 12, 12), bool)
    house[2:10, 2:10], smoke[4:7, 1:9] = True, True
    dataset = write_set(tmp_path / "set", [{"house": house, "smoke": smoke}], ["house", "smoke"])
    for form in set(OBJECTS) - {"voc"}:
        check_objects(dataset, OBJECTS[form](dataset, tmp_path / form))
    for form in MAPS:
        np.testing.assert_array_equal(MAPS[form](dataset, tmp_path / form)["000000"], np.where(smoke, 2, house))
    numbers = np.asarray(Image.open(tmp_path / "voc/voc/SegmentationObject/000000.png"))
    np.testing.assert_array_equal(numbers, np.where(smoke, 2, house))


def test_what_single_masks_ignore_is_ignored_where_no_other_has_it(tmp_path):
    house, smoke = np.zeros((2, 4, 8), np.uint8)
    house[:, :4], house[:, 4], smoke[2:, 3:5], smoke[0] = 1, 255, 1, 255
    dataset = write_set(tmp_path / "set", [{"house": house, "smoke": smoke}], ["house", "smoke"])
    wanted = np.array([[1, 1, 1, 1] + [255] * 4, [1, 1, 1, 1, 255, 0, 0, 0], *[[1, 1, 1, 2, 2, 0, 0, 0]] * 2])
    for form in MAPS:
        np.testing.assert_array_equal(MAPS[form](dataset, tmp_path / form)["000000"], wanted)
    for form in set(OBJECTS) - {"voc"}:
        check_objects(dataset, OBJECTS[form](dataset, tmp_path / form))


def test_more_objects_than_voc_has_numbers(tmp_path):
    chess = np.zeros((60, 60), np.uint8)
    chess[::3, ::3] = 1
    chess[0, 1] = 1  # the largest of 400
    dataset = write_set(tmp_path / "set", [chess], ["fire"])
    with pytest.warns(UserWarning, match="1 images have more than 254 objects, 000000 the first: the smallest are 255"):
        folder = export_voc(dataset, tmp_path / "voc")
    numbers = np.asarray(Image.open(folder / "SegmentationObject/000000.png"))
    assert numbers[0, 0] == numbers[0, 1] == 1 and set(numbers[chess > 0]) == {*range(1, 256)}
    assert (folder / "Annotations/000000.xml").read_text().count("<object>") == 400


SPLITS = {"train": [0, 3, 4], "val": np.array([1]), "test": range(5, 7)}


@pytest.fixture
def marked(tmp_path):
    labels = [np.full((8, 8), i % 3, np.uint8) for i in range(8)]
    dataset = write_set(tmp_path / "set", labels, ["fire", "smoke"])
    dataset.mark("images/000003.png")
    return dataset


def test_splits_leave_out_what_is_marked(marked, tmp_path):
    wanted = {"train": ["000000", "000004"], "val": ["000001"], "test": ["000005", "000006"]}
    paths = export_coco(marked, tmp_path / "a.json", splits=SPLITS)
    assert {name: path.name for name, path in paths.items()} == {n: f"a_{n}.json" for n in wanted}
    with pytest.raises(ValueError, match=r"a: COCO is a file, whose name ends in \.json, such as a\.json"):
        export_coco(marked, tmp_path / "a")
    ids = Counter()
    yolo, voc, hub = (export(marked, tmp_path / name, splits=SPLITS) for name, export in FOLDERS.items())
    for split, names in wanted.items():
        assert sorted(readers.coco_objects(paths[split])) == names
        ids.update(image["id"] for image in json.loads(paths[split].read_text())["images"])
        assert sorted(readers.yolo_objects(yolo, split)) == names == sorted(readers.ultralytics_objects(yolo, split))
        assert sorted(readers.voc_maps(voc, split)) == names
        at = "validation" if split == "val" else split
        assert sorted(readers.segformer_maps(hub, tmp_path / "cache", at)) == names
    assert ids == Counter(range(1, 6))  # one image each
    assert not any("000003" in path.name for path in tmp_path.rglob("*") if marked.folder not in path.parents)
    for export in FOLDERS.values():
        name = "yolo" if export is export_yolo else "voc" if export is export_voc else "segformer"
        shutil.rmtree(tmp_path / name)
        assert export(marked, tmp_path / name) == tmp_path / name
    assert len(readers.yolo_objects(yolo)) == len(readers.voc_maps(voc)) == 7
    assert "# no split is called val: train stands for it" in (yolo / "data.yaml").read_text()
    assert readers.ultralytics_objects(yolo, "val").keys() == readers.ultralytics_objects(yolo).keys()


def test_coco_replaces_its_own_files_alone(marked, tmp_path):
    """Neither notes of others nor files of the data set itself are lost, with one split of two there least of all."""
    export_coco(marked, tmp_path / "a.json", splits=SPLITS)
    export_coco(marked, tmp_path / "a.json", splits=SPLITS, polygons=True)  # replaces them
    before = (tmp_path / "a_train.json").read_bytes()
    for there in ('{"info": {"description": "recipe of another"}}', "{}", ""):
        (tmp_path / "a_val.json").write_text(there)
        with pytest.raises(ValueError, match=r"a_val\.json is there, and is no COCO export of this data set"):
            export_coco(marked, tmp_path / "a.json", splits=SPLITS)
        assert (tmp_path / "a_val.json").read_text() == there
    assert (tmp_path / "a_train.json").read_bytes() == before and len(list(tmp_path.glob("a*"))) == 3


@pytest.mark.parametrize(
    ("splits", "said"),
    [
        ({"train": [0], "a/b": [1]}, "split 'a/b': a name has letters"),
        ({"train": [0, 8]}, "split 'train' has 8: the data set's records are 0 to 7"),
        ({"train": [-1]}, "split 'train' has -1"),
        ({"train": [0, 1], "val": [1]}, "record 1 is in split 'train' and in 'val': keep it in one"),
        ({"train": [0], "val": []}, "split 'val' has no images: give it some, or leave it out"),
        ({"train": [0], "val": [3]}, "split 'val' has no images but those marked as bad: give it some"),
    ],
)
def test_splits_that_cannot_be(marked, tmp_path, splits, said):
    for name, export in {"coco.json": export_coco, **FOLDERS}.items():
        with pytest.raises(ValueError, match=said):
            export(marked, tmp_path / name, splits=splits)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_is_replaced_if_it_is_an_export_of_this_data_set(marked, tmp_path, name):
    export, out = FOLDERS[name], tmp_path / "out"
    out.mkdir()
    before = contents(export(marked, out))
    assert contents(export(marked, out, splits=SPLITS)) != before
    assert contents(export(marked, out)) == before
    other = write_set(tmp_path / "other", [np.zeros((8, 8), np.uint8)], ["fire"])
    for dataset, form, said in (
        (
            other,
            export,
            f"holds the .* export of recipe {marked.recipe.digest}, not the .* one of {other.recipe.digest}",
        ),
        (marked, next(one for one in FOLDERS.values() if one is not export), "holds the .* export .*: name another"),
    ):
        with pytest.raises(ValueError, match=said):
            form(dataset, out)
    below = next(path for path in out.iterdir() if path.is_dir())
    (below / "train.cache").write_text("by Ultralytics")  # nobody misses it
    assert contents(export(marked, out)) == before
    (below / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=rf"holds {below.name}/notes\.txt, which no export wrote"):
        export(marked, out)
    (below / "notes.txt").unlink()
    (out / "runs").mkdir()
    with pytest.raises(ValueError, match="holds runs, which no export wrote: move that, or name another folder"):
        export(marked, out)
    for wrong in (marked.folder, marked.folder / "recipe.yaml"):
        with pytest.raises(ValueError, match=r"has other files: name a new or empty|is a file: name a new folder"):
            export(marked, wrong)
    (out / "runs").rmdir()
    (out / "elsewhere").symlink_to(other.folder)
    with pytest.raises(ValueError, match="holds elsewhere, which no export wrote"):
        export(marked, out)
    (out / "elsewhere").unlink()
    assert contents(out) == before and sorted(path.name for path in tmp_path.iterdir()) == ["other", "out", "set"]


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("name", ["coco.json", *FOLDERS])
def test_what_is_cut_off_leaves_what_was_there(marked, tmp_path, monkeypatch, name, error):
    export = FOLDERS.get(name, export_coco)
    export(marked, tmp_path / name)
    before, calls, labels = contents(tmp_path), iter(range(10)), Dataset.numbers

    def full(self, i):
        if next(calls) == 3:
            raise error
        return labels(self, i)

    monkeypatch.setattr(Dataset, "numbers", full)
    for out in (name, f"new-{name}"):
        calls = iter(range(10))
        with pytest.raises(type(error)):
            export(marked, tmp_path / out)
    assert contents(tmp_path) == before


def test_an_image_of_another_size_than_its_labels(marked, tmp_path):
    Image.new("RGB", (9, 8)).save(marked.folder / "images/000002.png")
    for name, export in {"coco.json": export_coco, **FOLDERS}.items():
        with pytest.raises(ValueError, match=r"images/000002.png has \(height, width\) \(8, 9\), its labels \(8, 8\)"):
            export(marked, tmp_path / name)
        assert not (tmp_path / name).exists()


def test_polygons_of_parts_and_holes():
    """By hand: a ring, whose hole is cut open in the middle of its first row."""
    ring = np.ones((3, 4), bool)
    ring[1, 1:3] = False
    ((polygon,),) = trace_polygons(ring.astype(int))
    bridge = [[0, 1.5], [1, 1.5]]
    hole = [[1, 2], [3, 2], [3, 1], [1, 1]]
    assert polygon.tolist() == [[4, 0], [4, 3], [0, 3], *bridge, *hole, *bridge[::-1], [0, 0]]
    assert [[one.tolist() for one in parts] for parts in trace_polygons(np.eye(2, dtype=int)[:, :1], 0.25, 0.5)] == [
        [[[0.5, 0.25], [0.5, 0.5], [0.25, 0.5], [0.25, 0.25]]]
    ]
    assert trace_polygons(np.zeros((3, 3), int)) == []
    above = np.ones((5, 3), bool)
    above[[1, 3], 1] = False
    ((polygon,),) = trace_polygons(above.astype(int))
    assert [y for x, y in polygon.tolist() if x == 0] == [5, 3.5, 3.5, 1.5, 1.5, 0]  # up the left edge, and never back


def test_polygons_of_regions_side_by_side():
    """By hand: two regions cross at a corner, which each passes twice, with two points; one has a part elsewhere."""
    regions, corner = np.array([[1, 2, 0, 0], [2, 1, 0, 2]]), [[1, 1], [1, 1]]
    first, second = trace_polygons(regions)
    assert [one.tolist() for one in first] == [[[1, 0], *corner, [2, 1], [2, 2], [1, 2], *corner, [0, 1], [0, 0]]]
    assert [one.tolist() for one in second] == [
        [[2, 0], [2, 1], *corner, [1, 2], [0, 2], [0, 1], *corner, [1, 0]],
        [[4, 1], [4, 2], [3, 2], [3, 1]],
    ]
