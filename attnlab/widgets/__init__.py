"""Explore maps, masks, tokens and data sets in JupyterLab, with plain functions below: `views`, `mask`, `browse`.

    from attnlab import widgets
    widgets.explore(pipe)                   # generate, ask for words, point at pixels
    widgets.inspect_pixel(image, recording)  # the words a pixel attends to
    widgets.explore_mask(heat, image)       # from a map to a mask, live
    widgets.paint_token(image, recording)   # paint a thing, get a word for it
    widgets.browse_dataset("runs/05/dataset")

As the last line of a cell, a widget is live in JupyterLab and a still picture where a notebook is only read.
"""

from .browse import DatasetBrowser, browse_dataset
from .explore import Explorer, PixelInspector, explore, inspect_pixel
from .mask import MaskExplorer, explore_mask
from .paint import TokenPainter, paint_token
from .picture import Picture

__all__ = [
    "DatasetBrowser", "Explorer", "MaskExplorer", "Picture", "PixelInspector", "TokenPainter", "browse_dataset",
    "explore", "explore_mask", "inspect_pixel", "paint_token",
]  # fmt: skip
