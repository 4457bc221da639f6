"""Turn a map into a mask with every setting at hand: `explore_mask(heat, image)`."""

import warnings
from collections.abc import Mapping

import ipywidgets as ui
import numpy as np
from PIL import Image

from ..maps.heatmaps import upscale
from ..masks import dbscan_clusters, mask_by
from ..metrics import iou
from .drawing import MASK_RGB, border, enlarged
from .panel import Panel, Report, row, sized
from .picture import Picture

__all__ = ["MaskExplorer", "draw_clusters", "explore_mask"]

_SLIDERS = {  # method: settings with a slider
    "dbscan": ("quantile", "eps", "min_samples"),
    "threshold": ("level",),
    "otsu": (),
    "random_walker": ("low", "high"),
}
_CLUSTERING = ("quantile", "level", "eps", "min_samples")  # settings that make clusters
_NOISE_RGB = (150, 150, 150)
_CLUSTER_RGB = np.array([MASK_RGB, (31, 119, 180), (44, 160, 44), (255, 127, 14), (148, 103, 189)])


def draw_clusters(heat: np.ndarray, settings: Mapping, image) -> tuple[np.ndarray, np.ndarray, str]:
    """Draw DBSCAN's clusters in colors over the image in gray, with noise gray and the mask outlined in white.

    `heat` has the image's size, `settings` are those of `mask_by`. Returns pixels uint8 (row, column, rgb), `enlarged`,
    the mask (row, column) of the image's size, and the warnings of the method.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mask = mask_by(settings, heat, np.asarray(image))
    colored = np.repeat(0.75 * np.asarray(Image.fromarray(np.asarray(image)).convert("L"))[..., None], 3, axis=2)
    tints = np.where(mask, 1, 0)
    if settings["method"] == "dbscan":
        options = {name: value for name, value in settings.items() if name in _CLUSTERING}
        clusters = dbscan_clusters(heat, **options)
        tints = np.where(clusters > 0, (clusters - 1) % len(_CLUSTER_RGB) + 1, clusters)
    colors = np.where(tints[..., None] < 0, _NOISE_RGB, _CLUSTER_RGB[tints - 1])
    colored = np.where((tints != 0)[..., None], 0.4 * colored + 0.6 * colors, colored)
    pixels = enlarged(colored)
    pixels[border(enlarged(mask))] = 255
    return pixels.astype(np.uint8), mask, "; ".join(str(one.message) for one in caught)


def _recipe_line(settings):
    """Write settings of a mask as a line of a recipe of `attnlab.dataset`."""
    values = {name: f"{value:g}" if isinstance(value, float) else value for name, value in settings.items()}
    return f"mask: {{{', '.join(f'{name}: {value}' for name, value in values.items())}}}"


class MaskExplorer(Panel):
    """The widget of `explore_mask`; `mask` is bool (row, column) of the image's size."""

    def __init__(self, heat: np.ndarray, image: np.ndarray, truth: np.ndarray | None, settings: Mapping):
        self.image, self.truth, self.mask = image, truth, np.zeros(image.shape[:2], bool)
        self.heat = heat if heat.shape == image.shape[:2] else upscale(np.float32(heat), image.shape[:2])
        self.method = ui.ToggleButtons(options=list(_SLIDERS), style={"button_width": "120px"})
        self.sliders = {
            "quantile": ui.FloatSlider(value=0.9, min=0, max=1, step=0.01, description="quantile", **sized("300px")),
            "eps": ui.FloatSlider(value=1.5, min=0.5, max=6, step=0.25, description="eps, pixels", **sized("300px")),
            "min_samples": ui.IntSlider(value=5, min=1, max=30, description="min_samples", **sized("300px")),
            "level": ui.FloatSlider(value=0.4, min=0, max=1, step=0.01, description="level", **sized("300px")),
            "low": ui.FloatSlider(value=0.3, min=0, max=1, step=0.01, description="low", **sized("300px")),
            "high": ui.FloatSlider(value=0.7, min=0, max=1, step=0.01, description="high", **sized("300px")),
        }
        self.report, self.recipe = Report(), ui.HTML()
        self.picture = Picture(image, "the mask, outlined in white, over the image")
        super().__init__([self.method, row(*self.sliders.values()), self.picture, self.report, self.recipe])
        controls = {"method": self.method, **self.sliders}
        for name, value in settings.items():
            controls[name].value = value
        for control in controls.values():
            control.observe(lambda _: self._update(), "value")
        self._update()

    @property
    def settings(self) -> dict:
        """Method and settings, as `mask_by` and `Recipe(mask=...)` take them."""
        method = self.method.value
        return {"method": method} | {name: self.sliders[name].value for name in _SLIDERS[method]}

    def _update(self):
        """Make the mask again and draw it."""
        for name, slider in self.sliders.items():
            slider.layout.display = None if name in _SLIDERS[self.method.value] else "none"
        with self.report.saying():
            pixels, self.mask, warned = draw_clusters(self.heat, self.settings, self.image)
            self.picture.show(pixels, grid=self.mask.shape)
            agreement = "" if self.truth is None else f"IoU {iou(self.mask, self.truth):.3f}"
            parts = [f"{self.mask.mean():.1%} of the image", agreement, warned]
            self.report.say("; ".join(part for part in parts if part), "failed" if warned else "says")
            self.recipe.value = f"in a recipe: <code>{_recipe_line(self.settings)}</code>"

    def still(self) -> np.ndarray:
        """Return the image with the clusters and the mask."""
        return self.picture.pixels


def explore_mask(
    heat: np.ndarray, image, truth: np.ndarray | None = None, settings: Mapping | None = None
) -> MaskExplorer:
    """Make a widget that turns a heat map into a mask of an image, live.

    Clusters of DBSCAN are colored, the mask is outlined. The line below is what a recipe of `attnlab.dataset` takes.

    Parameters
    ----------
    heat : (row, column) array
        Heat map.
    image : PIL.Image.Image or (row, column, rgb) array of uint8
        The image.
    truth : (row, column) array of bool, optional
        Ground truth of the image's size, for the IoU.
    settings : mapping, optional
        What the sliders begin with: ``{"method": "dbscan", "quantile": 0.85}``.

    Raises
    ------
    ValueError
        If sizes do not fit, or a setting has no slider.
    """
    settings, known = dict(settings or {}), {"method", *(name for names in _SLIDERS.values() for name in names)}
    if unknown := settings.keys() - known:
        raise ValueError(f"settings {', '.join(sorted(unknown))}: there are sliders for {', '.join(sorted(known))}")
    heat, image = np.asarray(heat), np.asarray(image)
    if heat.ndim != 2 or image.ndim != 3 or (truth is not None and np.shape(truth) != image.shape[:2]):
        raise ValueError(
            f"heat is (row, column), image (row, column, rgb), truth of the image's size; not {heat.shape}, "
            f"{image.shape}, {None if truth is None else np.shape(truth)}"
        )
    return MaskExplorer(heat, image, truth, settings)
