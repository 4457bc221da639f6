"""`explore_mask(heat, image)`: from a map to a mask, with every setting at hand."""

import ipywidgets as ui
import numpy as np

from ..heatmaps import upscale
from . import views
from .panel import Panel, Report, row
from .picture import Picture

TAKES = {  # method: settings of its sliders
    "dbscan": ("quantile", "eps", "min_samples"),
    "threshold": ("level",),
    "otsu": (),
    "random_walker": ("low", "high"),
}


class MaskExplorer(Panel):
    """The widget of `explore_mask`; `mask` is bool (row, column) of the image's size, `settings` a recipe's."""

    def __init__(self, heat: np.ndarray, image: np.ndarray, truth: np.ndarray | None):
        self.image, self.truth, self.mask = image, truth, np.zeros(image.shape[:2], bool)
        self.heat = heat if heat.shape == image.shape[:2] else upscale(np.float32(heat), image.shape[:2])
        small = {"description_width": "initial"}
        self.method = ui.ToggleButtons(options=list(TAKES), style={"button_width": "120px"})
        self.sliders = {
            "quantile": ui.FloatSlider(value=0.9, min=0, max=1, step=0.01, description="quantile", style=small),
            "eps": ui.FloatSlider(value=1.5, min=0.5, max=6, step=0.25, description="eps, pixels", style=small),
            "min_samples": ui.IntSlider(value=5, min=1, max=30, description="min_samples", style=small),
            "level": ui.FloatSlider(value=0.4, min=0, max=1, step=0.01, description="level", style=small),
            "low": ui.FloatSlider(value=0.3, min=0, max=1, step=0.01, description="low", style=small),
            "high": ui.FloatSlider(value=0.7, min=0, max=1, step=0.01, description="high", style=small),
        }
        self.report, self.recipe = Report(), ui.HTML()
        self.picture = Picture(image, "the mask, outlined in white, over the image")
        super().__init__([self.method, row(*self.sliders.values()), self.picture, self.report, self.recipe])
        for control in (self.method, *self.sliders.values()):
            control.observe(lambda _: self.update(), "value")
        self.update()

    @property
    def settings(self) -> dict:
        """{"method": ..., ...} as `Recipe(mask=...)` takes it."""
        method = self.method.value
        return {"method": method} | {name: self.sliders[name].value for name in TAKES[method]}

    def update(self) -> None:
        """Make the mask again and draw it."""
        for name, slider in self.sliders.items():
            slider.layout.display = None if name in TAKES[self.method.value] else "none"
        with self.report.saying():
            pixels, self.mask, said = views.cluster_picture(self.heat, self.settings, self.image)
            self.picture.show(pixels, grid=self.mask.shape)
            parts = [f"{self.mask.mean():.1%} of the image", views.agreement(self.mask, self.truth), said]
            self.report.say("; ".join(part for part in parts if part), "failed" if said else "says")
            self.recipe.value = f"in a recipe: <code>{views.recipe_lines(self.settings)}</code>"

    def still(self) -> np.ndarray:
        return self.picture.pixels


def explore_mask(heat: np.ndarray, image, truth: np.ndarray | None = None) -> MaskExplorer:
    """A widget that turns a heat map (row, column) into a mask of an image, live.

    Clusters of DBSCAN are colored, what becomes the mask is outlined; with `truth`, bool (row, column) of the image's
    size, it tells the IoU. The line below is what a recipe of `attnlab.dataset` takes.

    ValueError for a map that is not two-dimensional, or a truth of another size than the image.
    """
    heat, image = np.asarray(heat), np.asarray(image)
    if heat.ndim != 2 or image.ndim != 3 or (truth is not None and np.shape(truth) != image.shape[:2]):
        raise ValueError(
            f"heat is (row, column), image (row, column, rgb), truth of the image's size; not {heat.shape}, "
            f"{image.shape}, {None if truth is None else np.shape(truth)}"
        )
    return MaskExplorer(heat, image, truth)
