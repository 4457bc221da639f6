"""Scenes know their single things, and masks are cut into them."""

import hashlib
import re
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from scipy.ndimage import label
from scipy.spatial.distance import jensenshannon

import attnlab as al
from attnlab.dataset import (
    Dataset,
    Filters,
    Photos,
    Recipe,
    export_coco,
    export_voc,
    export_yolo,
    generate_dataset,
    making,
    verify_dataset,
)
from attnlab.dataset.instances import attention_edges, number_instances, split_instances
from attnlab.dataset.leaks import find_images
from attnlab.scenes import aerial, street
from attnlab.scenes.canvas import Canvas, Thing, downsample, number_things

SEEDS = range(street.HELD_OUT + 50, street.HELD_OUT + 200)
NOUNS = {"cars": "car", "people": "person", "trees": "tree", "riders": "rider", "bicycles": "bicycle", "poles": "pole"}
NOUNS |= {"houses": "building", "traffic lights": "traffic light"}


@pytest.fixture(scope="module")
def streets():
    return [street.render(seed) for seed in SEEDS]


def test_things_are_numbered_in_the_order_of_painting():
    """A car with its wheel is one thing though a pole cuts it; a hidden thing has no number."""
    canvas = Canvas(32)
    canvas.rectangle((0, 0, 1, 1), (0, 0, 0), Thing("ground"))
    canvas.rectangle((0.2, 0.2, 0.3, 0.3), (1, 1, 1), Thing("car", 7))
    canvas.rectangle((0.1, 0.1, 0.6, 0.6), (9, 9, 9), Thing("car", 0))
    canvas.rectangle((0.2, 0.5, 0.3, 0.7), (5, 5, 5), Thing("car", 0, "wheel"))
    canvas.rectangle((0.4, 0.0, 0.5, 1.0), (7, 7, 7), Thing("pole", 0))
    canvas.rectangle((0.8, 0.8, 0.9, 0.9), (9, 9, 9), Thing("car", 1))
    _, ids = downsample(*canvas.arrays())
    numbers = number_things(ids, canvas.things, lambda thing: thing.name in ("car", "pole"))
    assert numbers.dtype == np.uint8 and set(np.unique(numbers)) == {0, 1, 2, 3}
    assert numbers[6, 6] == numbers[8, 18] == numbers[20, 8] == 1  # left and right of the pole, and the wheel
    assert numbers[6, 14] == 2 and numbers[27, 27] == 3 and numbers[30, 2] == 0


@pytest.mark.parametrize("world", [street, aerial])
def test_every_instance_is_a_thing_of_one_class(world):
    for seed in range(world.HELD_OUT, world.HELD_OUT + 25):
        scene = world.render(seed)
        numbers = scene.instances
        assert numbers.shape == scene.labels.shape and numbers.dtype == np.uint8
        assert set(np.unique(numbers)) - {0} == set(range(1, numbers.max() + 1))
        counted = np.isin(scene.labels, [world.CLASSES.index(name) for name in world.THINGS])
        assert not (numbers[~counted] > 0).any()
        for number in range(1, numbers.max() + 1):
            assert len(np.unique(scene.labels[numbers == number])) == 1


def test_captions_count_the_same_things(streets):
    """A caption that says two cars shows two cars; slivers are not counted there."""
    counted = 0
    for scene in streets:
        for word, noun in re.findall(rf"(two|three) (?:[a-z]+ )?({'|'.join(NOUNS)})", scene.caption):
            areas = np.bincount(scene.instances[scene.mask(NOUNS[noun])], minlength=1)[1:]
            assert np.sum(areas >= 0.004 * scene.labels.size) == {"two": 2, "three": 3}[word], scene.caption
            counted += 1
    assert counted > 20


def test_far_blocks_and_smoke_are_no_things(streets):
    far = [scene.mask("building") & (scene.instances == 0) for scene in streets]
    assert sum(map(np.any, far)) > 20
    assert all((scene.instances[scene.mask("smoke")] == 0).all() for scene in streets)
    lowest = [np.nonzero(mask.any(1))[0].max() for mask in far if mask.any()]
    assert max(lowest) <= 0.53 * 64  # a skyline ends at the horizon, a house stands below it


def test_touching_trees_are_told_apart(streets):
    """A forest's trees are one connected region, and several things."""
    several = []
    for scene in (s for s in streets if "forest" in s.caption):
        regions, count = label(scene.mask("tree"), np.ones((3, 3)))
        several.append(max(len(np.unique(scene.instances[regions == n])) for n in range(1, count + 1)))
    assert len(several) > 3 and max(several) >= 3


def test_a_vehicle_from_above_has_the_size_of_one():
    """It is 0.07 long and 0.036 wide, each up to 15% more or less; some are cut by the border of the image."""
    areas = []
    for seed in range(aerial.HELD_OUT, aerial.HELD_OUT + 40):
        scene = aerial.render(seed)
        numbers = scene.instances[scene.mask("vehicle")]
        areas += [(numbers == number).sum() / 64**2 for number in np.unique(numbers)]
    assert len(areas) > 50 and max(areas) < 1.6 * 0.07 * 0.036 * 1.15**2  # the samples on its border belong to it
    assert np.median(areas) == pytest.approx(0.07 * 0.036, rel=0.25)


@pytest.mark.parametrize("world", [street, aerial])
def test_same_things_at_every_size(world):
    small, large = (world.render(world.HELD_OUT + 9, size) for size in (64, 128))
    agree = np.any([large.instances[i::2, j::2] == small.instances for i in (0, 1) for j in (0, 1)], axis=0)
    assert small.instances.max() > 1 and agree.mean() > 0.97


def blobs(*boxes, side=64):
    """A mask of boxes (top, left, bottom, right)."""
    mask = np.zeros((side, side), bool)
    for top, left, bottom, right in boxes:
        mask[top:bottom, left:right] = True
    return mask


def halves(side=16, column=8):
    """Self-attention of two things side by side: each pixel looks at those of its own side alone."""
    left = np.arange(side * side) % side < column
    same = (left[:, None] == left).astype(np.float32)
    return torch.from_numpy(same / same.sum(1, keepdims=True)), (side, side)


def test_connected_regions_meet_at_corners_and_specks_are_left_out():
    mask = blobs((0, 0, 10, 10), (10, 10, 20, 20), (40, 40, 50, 50), (60, 0, 62, 2))
    found = split_instances(mask, min_area=8 / 64**2)
    assert found[5, 5] == found[15, 15] == 1 and found[45, 45] == 2 and found.max() == 2
    assert not found[60:62, :2].any() and not found[~mask].any()
    assert split_instances(mask, min_area=4 / 64**2)[60, 0] == 3  # 4 pixels are not fewer than 4
    assert not split_instances(np.zeros((9, 9), bool)).any()


@pytest.mark.parametrize("gap", [2, 4])
def test_clusters_join_pieces_that_lie_near(gap):
    """Two pieces with so many empty columns between them; DBSCAN of scikit-learn on the same pixels says the same."""
    mask = blobs((10, 10, 30, 20), (10, 20 + gap, 30, 40))
    found = split_instances(mask, "dbscan", eps=3.2 / 64, min_samples=4)
    assert found.max() == {2: 1, 4: 2}[gap] and ((found > 0) == mask).all()
    assert split_instances(mask).max() == 2


def test_a_large_mask_is_clustered_as_a_small_one():
    small = blobs((10, 10, 30, 20), (10, 22, 30, 40), (50, 50, 60, 60))
    large = small.repeat(17, 0).repeat(17, 1)[:1088, :1080]
    found = split_instances(large, "dbscan", eps=3.2 / 64)
    expected = split_instances(small, "dbscan", eps=3.2 / 64).repeat(17, 0).repeat(17, 1)[:, :1080]
    assert expected.max() == 2 and (found == expected).all()


def test_edges_are_where_opposite_neighbors_look_elsewhere():
    """The distance of distributions without a common pixel is 1, that of equal ones 0."""
    edges = attention_edges(*halves(column=5))
    assert edges.shape == (16, 16) and edges.dtype == np.float32
    np.testing.assert_allclose(edges[:, 4:6], 1, atol=1e-6)  # left and right of column 4 lie 3 and 5
    np.testing.assert_allclose(edges[:, [*range(4), *range(6, 16)]], 0, atol=1e-6)
    turned = torch.from_numpy(edge_turned(halves(column=5)[0].numpy()))
    np.testing.assert_allclose(attention_edges(turned, (16, 16)), edges.T, atol=1e-6)


def edge_turned(attention):
    """The self-attention of the transposed image."""
    return np.ascontiguousarray(attention.reshape(16, 16, 16, 16).transpose(1, 0, 3, 2).reshape(256, 256))


def test_the_distance_of_neighbors_is_that_of_scipy():
    rows = np.random.default_rng(0).dirichlet(np.full(12, 0.3), 12)
    found, grid = attention_edges(torch.from_numpy(rows), (3, 4)), rows.reshape(3, 4, 12)
    for i, j in np.ndindex(3, 4):
        pairs = [(grid[i, max(j - 1, 0)], grid[i, min(j + 1, 3)]), (grid[max(i - 1, 0), j], grid[min(i + 1, 2), j])]
        assert found[i, j] == pytest.approx(max(jensenshannon(p, q, base=2) for p, q in pairs), abs=1e-6)


def test_a_mask_is_cut_where_self_attention_differs():
    """One connected region, of two things whose border lies between columns 31 and 32 of the image."""
    mask = blobs((20, 4, 40, 60))
    found = split_instances(mask, "edges", halves(), level=0.5)
    assert found.max() == 2 and ((found > 0) == mask).all()
    assert (found[mask & (np.arange(64) < 30)] == 1).all() and (found[mask & (np.arange(64) > 33)] == 2).all()
    same = torch.full((256, 256), 1 / 256), (16, 16)
    assert split_instances(mask, "edges", same, level=0.1).max() == 1
    thin = blobs((20, 30, 40, 34))  # an edge as a whole stays one thing
    assert (split_instances(thin, "edges", halves(), level=0.5) == thin).all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "sam"}, "write {method: one of connected, dbscan, edges}"),
        ({"method": "connected", "eps": 0.1}, "method connected has no eps; it has min_area"),
        ({"method": "dbscan", "eps": 0}, "eps is a radius, a fraction of the longer side"),
        ({"method": "dbscan", "min_samples": 1.5}, "min_samples counts"),
        ({"min_area": 1.5}, "min_area is a fraction of the image"),
        ({"method": "edges", "level": True}, "level is a Jensen-Shannon distance"),
        ({"method": "edges"}, r"give attention=recording.self_attention\(\)"),
        ({"mask": np.zeros((2, 2, 2), bool)}, r"a mask is \(row, column\), got shape \(2, 2, 2\)"),
        ({"mask": np.full((2, 2), 255)}, "mask > 0"),
        ({"method": "edges", "attention": (torch.ones(4, 4), (3, 3))}, r"self-attention of \(3, 3\) is \(9, 9\), not"),
    ],
)
def test_what_cannot_be_cut_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        split_instances(**({"mask": blobs((1, 1, 30, 30))} | given))


def test_each_class_of_a_label_image_is_cut_by_itself():
    labels = np.zeros((64, 64), np.uint8)
    labels[:20, :20], labels[:20, 20:40], labels[40:60, :20], labels[40:60, 20:] = 2, 1, 2, 255
    found = number_instances(labels, {})
    assert found.dtype == np.uint16 and found[5, 25] == 1 and found[5, 5] == 2 and found[50, 5] == 3
    assert set(np.unique(found)) == {0, 1, 2, 3} and not found[labels == 255].any()


OPEN = Filters(area=None, flat=None, blank=None, duplicates=None)
CARS = Recipe(
    prompts=["two cars on a road"], classes={"car": "cars", "road": "road"}, images=3, steps=3, batch=2, shard=1,
    threads=1, filters=OPEN, attention=16, instances={"method": "edges", "level": 0.2},
)  # fmt: skip


@pytest.fixture(scope="module")
def cars(tmp_path_factory):
    return generate_dataset(CARS, tmp_path_factory.mktemp("made") / "cars")


def test_recipes_without_instances_keep_their_digest():
    plain = replace(CARS, instances=None)
    assert "instances" not in plain.as_dict() and plain.digest != CARS.digest
    assert plain.digest == "a89590068ee10c6b"  # as before there were any
    assert Recipe(**{k: v for k, v in CARS.as_dict().items() if k != "format"}).digest == CARS.digest


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"instances": {"method": "sam"}}, "write {method: one of connected"),
        ({"instances": True}, "instances is True: write"),
        ({"instances": {"eps": 0.1}}, "method connected has no eps"),
        ({"instances": {}, "labels": False}, "instances are cut from label images"),
    ],
)
def test_a_recipe_says_which_instances_cannot_be(given, message):
    with pytest.raises(ValueError, match=message):
        replace(CARS, **given)


def test_edges_of_photos_are_refused():
    photos = Photos("photos", files={"a.png": "0" * 64})
    for instances in ({}, {"method": "dbscan"}):
        assert Recipe(classes={"car": "car"}, map="ovam", photos=photos, instances=instances).instances == instances
    with pytest.raises(ValueError, match=r"instances of photos, seen in tiles .* have no edges"):
        Recipe(classes={"car": "car"}, map="ovam", photos=photos, instances={"method": "edges"})


def test_instances_are_cut_by_what_the_model_attends_to(cars):
    """The file holds what the functions say of a recording of the same generation, made anew."""
    pipe = al.load_pipeline("tiny")
    pipe.set_progress_bar_config(disable=True)
    with al.record(pipe, self_attention=16) as recording:  # records of one batch are drawn together
        pipe([CARS.prompt(i) for i in (0, 1)], generator=[al.seed(CARS.seed_of(i)) for i in (0, 1)],
             num_inference_steps=3, guidance_scale=CARS.guidance)  # fmt: skip
    for i in (0, 1):
        found, labels = cars.instances(i), cars[i].labels
        assert found.dtype == np.uint16 and found.shape == labels.shape
        expected = number_instances(labels, CARS.instances, recording[i].self_attention(16))
        assert (found == expected).all() and found.max() > 1
    assert any((number_instances(cars[i].labels, {}) != cars.instances(i)).any() for i in range(3))


def test_a_data_set_with_instances_is_whole(cars):
    assert verify_dataset(cars.folder) == []
    assert [path.name for path in sorted(cars.folder.glob("instances/*"))] == [f"{i:06d}.png" for i in range(3)]
    assert cars.records[0]["instances_file_name"] == "instances/000000.png"
    assert set(cars.records[0]["sha256"]) == {"image", "mask", "image/instances"}
    assert Image.open(cars.folder / "instances/000000.png").mode == "I;16"


def test_the_card_says_how_things_were_cut(cars):
    assert "cut by method edges" in (cars.folder / "README.md").read_text("utf-8")


def test_instances_are_no_images_that_leak(cars):
    assert sorted(path.parent.name for path in find_images(cars.folder)) == ["images"] * 3


def damaged(cars, folder, change):
    """What is said of a copy of the data set in which the first record's instances are others, hash and all."""
    shutil.copytree(cars.folder, folder)
    path, numbers = folder / "instances/000000.png", cars.instances(0)
    Image.fromarray(change(numbers)).save(path)
    text = (folder / "metadata.jsonl").read_text("utf-8")
    old, new = (
        hashlib.sha256(file.read_bytes()).hexdigest() for file in (cars.folder / path.relative_to(folder), path)
    )
    (folder / "metadata.jsonl").write_text(text.replace(old, new), "utf-8")
    return verify_dataset(folder)


def test_wrong_instances_are_found(cars, tmp_path):
    road = cars[0].labels == 2
    for name, change, message in (
        ("gap", lambda x: np.where(x == 1, 900, x).astype(np.uint16), "otherwise than 1, 2, ... in 16 bits"),
        ("bits", lambda x: x.astype(np.uint8), "otherwise than 1, 2, ... in 16 bits"),
        ("classes", lambda x: np.where(road, 1, x).astype(np.uint16), "of several classes"),
        ("nothing", lambda x: np.maximum(x, 1).astype(np.uint16), "of several classes, or of none"),
        ("size", lambda x: x[:32], "is 64 x 32, its image 64 x 64"),
    ):
        assert message in str(damaged(cars, tmp_path / name, change)), name
    shutil.copytree(cars.folder, tmp_path / "lost")
    (tmp_path / "lost/instances/000001.png").unlink()
    (tmp_path / "lost/instances/000009.png").write_bytes(b"")
    said = verify_dataset(tmp_path / "lost")
    assert "instances/000001.png is missing" in said and "instances/000009.png is in no line of metadata.jsonl" in said


def test_an_interrupted_shard_without_its_instances_is_made_again(cars, tmp_path, monkeypatch):
    """The second shard has lost an instance file when the maker goes on: the same bytes come out."""
    monkeypatch.setattr(making, "_finish", lambda *given: None)
    generate = partial(generate_dataset, CARS, tmp_path / "cars")
    with pytest.raises(FileNotFoundError, match="not finished"):
        generate()
    (tmp_path / "cars/.parts/00000/instances/000000.png").unlink()
    monkeypatch.undo()
    again = generate()
    assert [f.read_bytes() for f in files(again)] == [f.read_bytes() for f in files(cars)]


def files(dataset):
    return sorted(path for path in dataset.folder.rglob("*") if path.is_file())


def test_datasets_reads_the_instances(cars, tmp_path):
    datasets = pytest.importorskip("datasets")
    found = datasets.load_dataset("imagefolder", data_dir=str(cars.folder), cache_dir=str(tmp_path))["train"]
    for i in range(3):
        assert (np.array(found[i]["instances"]) == cars.instances(i)).all()


@pytest.fixture(scope="module")
def touching(cars, tmp_path_factory):
    """The data set with other labels and instances: two that touch, one in two pieces, and pixels of no thing."""
    folder = tmp_path_factory.mktemp("made") / "touching"
    shutil.copytree(cars.folder, folder)
    labels, numbers = np.zeros((64, 64), np.uint8), np.zeros((64, 64), np.uint16)
    labels[8:20, 8:40], labels[30:40, 8:50], labels[50:60, 50:60] = 1, 2, 1
    numbers[8:20, 8:24], numbers[8:20, 24:40] = 1, 2
    numbers[30:40, 8:20] = numbers[30:40, 30:50] = 3
    labels[30:40, 20:30] = 0
    drawn = Image.open(folder / "masks/000000.png")
    mask = Image.fromarray(labels).convert("P")
    mask.putpalette(drawn.getpalette())
    mask.save(folder / "masks/000000.png")
    Image.fromarray(numbers).save(folder / "instances/000000.png")
    dataset = Dataset(folder)
    dataset.records = dataset.records[:1]
    return dataset, numbers


@pytest.mark.parametrize("polygons", [False, True])
def test_coco_has_the_instances(touching, tmp_path, polygons):
    dataset, numbers = touching
    coco = COCO(export_coco(dataset, tmp_path / "coco.json", polygons=polygons))
    found = coco.loadAnns(coco.getAnnIds())
    assert [one["category_id"] for one in found] == [1, 1, 2]
    for number, one in enumerate(found, 1):
        assert (coco.annToMask(one) == (numbers == number)).all()
    assert [len(one["segmentation"]) for one in found] == ([1, 1, 2] if polygons else [2, 2, 2])  # pieces; size, counts


def test_yolo_and_voc_have_the_instances(touching, tmp_path):
    """YOLO has a line for each piece."""
    dataset, numbers = touching
    export_yolo(dataset, tmp_path / "yolo")
    lines = (tmp_path / "yolo/labels/train/000000.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["0", "0", "1", "1"]
    export_voc(dataset, tmp_path / "voc")
    objects = np.array(Image.open(tmp_path / "voc/SegmentationObject/000000.png"))
    both = np.unique(np.stack([objects, numbers]).reshape(2, -1), axis=1)
    assert both.shape == (2, 4) and len(set(both[0])) == len(set(both[1])) == 4


def test_edges_of_another_model_and_of_an_image_that_is_no_square(levels):
    """A model with several sizes of self-attention, of random weights: a mask of 32 x 64 is cut along its own grid."""
    image = np.random.default_rng(0).integers(0, 255, (32, 64, 3), dtype=np.uint8)
    recording = al.record_image(levels, image, "a car", generator=al.seed(0), self_attention=[4, 8])
    mask = blobs((4, 4, 30, 60))[:32]
    for height in (4, 8):
        attention = recording[0].self_attention(height)
        edges = attention_edges(*attention)
        assert edges.shape == attention[1] == (height, 2 * height) and 0 < edges.min() <= edges.max() < 1
        found = split_instances(mask, "edges", attention, level=float(np.median(edges)), min_area=0)
        assert ((found > 0) == mask).all()
