"""Draw arrays on matplotlib Axes, in the style and the class colors of `attnlab.plots.styling`.

    fig, axes = grid(1, 3, column_titles=["image", "smoke", "mask"])
    show_image(axes[0, 0], image)
    show_heat(axes[0, 1], heat, image=image)
    show_mask(axes[0, 2], image, mask, color="smoke")
    heat_bar(fig, "attention")
    save_figure(fig, "figures/smoke.png")

An image is (row, column, rgb) or gray (row, column), uint8 or float in 0..1, or a PIL image. Maps, masks, labels and
clusters are (row, column), smaller or larger than the image: they cover the same area, in the image's coordinates.
`color` is the name of a class in `CLASS_COLORS` or anything matplotlib takes. Functions that take `ax` return it.
ValueError says which array has the wrong shape or range.
"""

from .charts import curves, dots, matrix
from .images import heat_bar, outline, overlay, pair_sheet, show_clusters, show_heat, show_image, show_labels, show_mask
from .styling import CLASS_COLORS, MASK_COLOR, STYLE, grid, legend, save_figure, style

__all__ = [
    "CLASS_COLORS", "MASK_COLOR", "STYLE", "curves", "dots", "grid", "heat_bar", "legend", "matrix", "outline",
    "overlay", "pair_sheet", "save_figure", "show_clusters", "show_heat", "show_image", "show_labels", "show_mask",
    "style",
]  # fmt: skip
