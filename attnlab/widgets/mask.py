"""Turn a map into a mask with every setting at hand: `explore_mask(heat, image)`."""

import warnings
from collections.abc import Mapping

import ipywidgets as ui
import numpy as np
from PIL import Image

from ..maps.heatmaps import upscale
from ..masks import dbscan_clusters, mask_by
from ..metrics import iou
from .drawing import MASK_RGB, outlined
from .panel import Panel, Report, row, sized
from .picture import Picture

__all__ = ["MaskExplorer", "draw_clusters", "explore_mask"]

_SLIDERS = {  # per method, the settings that have a slider: its least and largest value, step, and value at first
    "dbscan": {"level": (0, 1, 0.01, 0.4), "eps": (0.5, 6, 0.25, 1.5), "min_samples": (1, 30, 1, 5)},
    "threshold": {"level": (0, 1, 0.01, 0.4)},
    "otsu": {},
    "random_walker": {"low": (0, 1, 0.01, 0.3), "high": (0, 1, 0.01, 0.7)},
}
_CLUSTERING = ("level", "eps", "min_samples")  # settings that make clusters
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
        clusters = dbscan_clusters(heat, **{name: settings[name] for name in _CLUSTERING if name in settings})
        tints = np.where(clusters > 0, (clusters - 1) % len(_CLUSTER_RGB) + 1, clusters)
    colors = np.where(tints[..., None] < 0, _NOISE_RGB, _CLUSTER_RGB[tints - 1])
    colored = np.where((tints != 0)[..., None], 0.4 * colored + 0.6 * colors, colored)
    return outlined(colored, mask), mask, "; ".join(str(one.message) for one in caught)


class MaskExplorer(Panel):
    """The widget of `explore_mask`; `mask` is bool (row, column) of the image's size."""

    def __init__(self, heat: np.ndarray, image: np.ndarray, truth: np.ndarray | None, settings: Mapping):
        self.image, self.truth, self.mask = image, truth, np.zeros(image.shape[:2], bool)
        self.heat = heat if heat.shape == image.shape[:2] else upscale(np.float32(heat), image.shape[:2])
        self.method = ui.ToggleButtons(options=list(_SLIDERS), style={"button_width": "120px"})
        self.sliders = {}
        for name, (least, most, step, value) in (item for rows in _SLIDERS.values() for item in rows.items()):
            slider = ui.IntSlider if isinstance(value, int) else ui.FloatSlider
            options = {"description": "eps, pixels" if name == "eps" else name, **sized("300px")}
            self.sliders[name] = slider(value=value, min=least, max=most, step=step, **options)
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
        self.mask, self.recipe.value = np.zeros_like(self.mask), ""  # what stays where the settings make no mask
        with self.report.saying():
            try:
                pixels, self.mask, warned = draw_clusters(self.heat, self.settings, self.image)
            except ValueError:
                self.picture.show(outlined(self.image, self.mask), grid=self.mask.shape)
                raise
            self.picture.show(pixels, grid=self.mask.shape)
            agreement = "" if self.truth is None else f"IoU {iou(self.mask, self.truth):.3f}"
            parts = [f"{self.mask.mean():.1%} of the image", agreement, warned]
            self.report.say("; ".join(part for part in parts if part), failed=bool(warned))
            short = {name: f"{value:g}" if isinstance(value, float) else value for name, value in self.settings.items()}
            line = ", ".join(f"{name}: {value}" for name, value in short.items())
            self.recipe.value = f"in a recipe: <code>mask: {{{line}}}</code>"

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
        Ground truth, for the IoU; ValueError where it has not the image's size.
    settings : mapping, optional
        What the sliders begin with: ``{"method": "dbscan", "level": 0.5}``. ValueError for what has no slider.
    """
    settings, known = dict(settings or {}), {"method", *(name for names in _SLIDERS.values() for name in names)}
    if unknown := settings.keys() - known:
        raise ValueError(f"settings {', '.join(sorted(unknown))}: there are sliders for {', '.join(sorted(known))}")
    heat, image = np.asarray(heat), np.asarray(image)
    size = None if truth is None else np.shape(truth)
    if heat.ndim != 2 or image.ndim != 3 or size not in (None, image.shape[:2]):
        sizes = f"not {heat.shape}, {image.shape}, {size}"
        raise ValueError(f"heat is (row, column), image (row, column, rgb), truth of the image's size; {sizes}")
    return MaskExplorer(heat, image, truth, settings)
