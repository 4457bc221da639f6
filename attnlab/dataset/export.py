"""Export a labeled data set to COCO."""

import json
from pathlib import Path

import numpy as np
from pycocotools import mask as coco
from skimage.measure import label

from ..storage import write_text
from .records import Dataset

__all__ = ["export_coco"]


def export_coco(dataset: Dataset, path: str | Path) -> Path:
    """Write COCO instance annotations (JSON) for `pycocotools.coco.COCO`, one per connected region of a class.

    Masks are run-length encoded, areas in pixels, boxes (x, y, width, height); file names are relative to the data
    set's folder. Ignored pixels belong to nothing. Images marked as bad are left out.

    Parameters
    ----------
    dataset : Dataset
        A finished data set.
    path : str or Path
        The file to write.
    """
    categories = [{"id": i, "name": name} for i, name in enumerate(dataset.classes) if i]
    images, annotations = [], []
    good = (i for i, metadata in enumerate(dataset.records) if metadata["file_name"] not in dataset.bad)
    for number, pair in enumerate(map(dataset.__getitem__, good), 1):
        width, height = pair.image.size
        images.append({"id": number, "file_name": pair.metadata["file_name"], "width": width, "height": height})
        for category in categories:
            is_in = pair.labels[category["name"]] if isinstance(pair.labels, dict) else pair.labels == category["id"]
            regions = label(is_in, connectivity=2)
            for region in range(1, regions.max() + 1):
                rle = coco.encode(np.asfortranarray(regions == region, np.uint8))
                found = {"id": len(annotations) + 1, "image_id": number, "category_id": category["id"], "iscrowd": 0}
                found |= {"area": int(coco.area(rle)), "bbox": coco.toBbox(rle).tolist()}
                annotations.append(found | {"segmentation": {**rle, "counts": rle["counts"].decode("ascii")}})
    path = Path(path)
    info = {"description": f"recipe {dataset.recipe.digest}"}
    content = {"info": info, "images": images, "annotations": annotations, "categories": categories}
    write_text(path, json.dumps(content) + "\n")
    return path
