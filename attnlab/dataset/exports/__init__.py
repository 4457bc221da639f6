"""Export labeled data sets in the forms that others' tools train on: COCO, YOLO, Pascal VOC, SegFormer.

export_yolo(dataset, "fires-yolo", splits={"train": range(0, 40), "val": range(40, 50)})

Each is read back to the very pixels of the masks; docs/exports.md tells by which tools, and what a form cannot hold.
"""

from .coco import export_coco
from .segformer import export_segformer
from .voc import export_voc
from .yolo import export_yolo

__all__ = ["export_coco", "export_segformer", "export_voc", "export_yolo"]
