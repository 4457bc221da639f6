"""What others read from an export: {file name of the record: [(class, bool mask) of each object]}, or class maps."""

import json
from collections import Counter, defaultdict
from pathlib import Path
from xml.etree import ElementTree

import cv2
import datasets
import numpy as np
import supervision
import yaml
from PIL import Image
from pycocotools.coco import COCO
from scipy import ndimage

from attnlab.dataset import export_coco, export_segformer, export_voc, export_yolo


def coco_objects(path):
    coco, found = COCO(path), defaultdict(list)
    for image in coco.loadImgs(coco.getImgIds()):
        for annotation in coco.loadAnns(coco.getAnnIds(imgIds=image["id"])):
            name = coco.loadCats(annotation["category_id"])[0]["name"]
            mask = coco.annToMask(annotation) > 0
            rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
            box = [columns[0], rows[0], np.ptp(columns) + 1, np.ptp(rows) + 1]
            assert annotation["area"] == mask.sum() and annotation["bbox"] == box
            found[Path(image["file_name"]).stem].append((name, mask))
        found[Path(image["file_name"]).stem] += []
    return found


def yolo_objects(folder, split="train"):
    """By supervision."""
    read = supervision.DetectionDataset.from_yolo(
        str(folder / "images" / split), str(folder / "labels" / split), str(folder / "data.yaml"), force_masks=True
    )
    found = {}
    for path, _, detections in read:
        masks = [] if detections.mask is None else detections.mask
        found[Path(path).stem] = [(read.classes[c], m) for c, m in zip(detections.class_id, masks, strict=True)]
    return found


def ultralytics_objects(folder, split="train", size=None):
    """By the rule of Ultralytics' YOLO: float32 fractions, times the size, cut off to int32, filled by fillPoly."""
    settings, found = yaml.safe_load((folder / "data.yaml").read_text()), {}
    assert settings["nc"] == len(settings["names"])
    for image in sorted((folder / settings[split]).iterdir()):
        label = Path(str(image.parent).replace("images", "labels"), f"{image.stem}.txt")
        width, height = size or Image.open(image).size
        found[image.stem] = objects = []
        for line in label.read_text().splitlines():
            number, *values = line.split()
            assert len(values) >= 6 and all(0 <= float(value) <= 1 for value in values)
            points = np.array(values, np.float32).reshape(-1, 2) * np.array([width, height], np.float32)
            mask = cv2.fillPoly(np.zeros((height, width), np.uint8), [points.astype(np.int32)], 1)
            objects.append((settings["names"][int(number)], mask > 0))
    return found


def voc_objects(folder, split="train"):
    """By the numbers of SegmentationObject, in the order of the XML file, whose boxes are their own."""
    found = {}
    for name in (folder / f"ImageSets/Segmentation/{split}.txt").read_text().split():
        numbers = np.asarray(Image.open(folder / f"SegmentationObject/{name}.png"))
        root = ElementTree.parse(folder / f"Annotations/{name}.xml").getroot()
        found[name] = [(one.find("name").text, numbers == i) for i, one in enumerate(root.iter("object"), 1)]
        for one, (_, mask) in zip(root.iter("object"), found[name], strict=True):
            left, top, right, bottom = (int(one.find(f"bndbox/{k}").text) for k in ("xmin", "ymin", "xmax", "ymax"))
            assert mask[top - 1 : bottom, left - 1 : right].sum() == mask.sum()  # in a data set without overlaps
            assert (
                mask[top - 1].any() and mask[bottom - 1].any() and mask[:, left - 1].any() and mask[:, right - 1].any()
            )
    return found


def voc_maps(folder, split="train"):
    names = (folder / f"ImageSets/Segmentation/{split}.txt").read_text().split()
    assert names == (folder / f"ImageSets/Main/{split}.txt").read_text().split()
    return {name: np.asarray(Image.open(folder / f"SegmentationClass/{name}.png")) for name in names}


def segformer_maps(folder, cache, split="train"):
    found = datasets.load_dataset(str(folder), cache_dir=str(cache))[split]
    names = json.loads((folder / "id2label.json").read_text())
    assert list(names) == [str(i) for i in range(len(names))]
    assert json.loads((folder / "label2id.json").read_text()) == {name: int(i) for i, name in names.items()}
    files = found.cast_column("image", datasets.Image(decode=False))["image"]
    return {Path(one["path"]).stem: np.asarray(label) for one, label in zip(files, found["label"], strict=True)}


OBJECTS = {
    "coco": lambda dataset, out: coco_objects(export_coco(dataset, out / "coco.json")),
    "coco polygons": lambda dataset, out: coco_objects(export_coco(dataset, out / "coco.json", polygons=True)),
    "supervision": lambda dataset, out: yolo_objects(export_yolo(dataset, out / "yolo")),
    "ultralytics": lambda dataset, out: ultralytics_objects(export_yolo(dataset, out / "yolo")),
    "voc": lambda dataset, out: voc_objects(export_voc(dataset, out / "voc")),
}
MAPS = {
    "voc": lambda dataset, out: voc_maps(export_voc(dataset, out / "voc")),
    "segformer": lambda dataset, out: segformer_maps(export_segformer(dataset, out / "set"), out / "cache"),
}


def objects_of(labels, classes):
    """Connected regions of each class, by another library's rule: counts of (class, mask)."""
    found = []
    for number, name in enumerate(classes[1:], 1):
        mask = labels[name] if isinstance(labels, dict) else labels == number
        parts, count = ndimage.label(mask, np.ones((3, 3)))
        found += [(name, parts == i) for i in range(1, count + 1)]
    return counted(found)


def counted(objects):
    return Counter((name, mask.shape, np.packbits(mask).tobytes()) for name, mask in objects)


def check_objects(dataset, found):
    assert sorted(found) == [f"{line['index']:06d}" for line in dataset.records]
    for i, (image, labels, line) in enumerate(dataset):
        there = counted(found[f"{line['index']:06d}"])
        assert there == objects_of(labels, dataset.classes), f"record {i}, {image.size}"
