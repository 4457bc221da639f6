"""Train and test segmentation models on image and mask pairs: folders of pairs, augmentations, models."""

from .folders import ISAID, LOVEDA, OPEN_EARTH_MAP, Layout, PairFolder, checked, patches, shrink
from .model import class_ious, evaluate, features, new_model, predict, train

__all__ = [
    "ISAID",
    "LOVEDA",
    "OPEN_EARTH_MAP",
    "Layout",
    "PairFolder",
    "checked",
    "class_ious",
    "evaluate",
    "features",
    "new_model",
    "patches",
    "predict",
    "shrink",
    "train",
]
