"""Train and test segmenters on pairs of image and labels: folders of pairs, augmentations, models."""

from .folders import ISAID, LOVEDA, OPEN_EARTH_MAP, Layout, PairFolder, patches, shrink
from .learn import train_segmenter
from .model import Segmenter, load_segmenter
from .pretrained import start_segmenter

__all__ = ["ISAID", "LOVEDA", "OPEN_EARTH_MAP", "Layout", "PairFolder", "Segmenter"]
__all__ += ["load_segmenter", "patches", "shrink", "start_segmenter", "train_segmenter"]
