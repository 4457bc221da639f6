"""`explore_mask(heat, image)`: from a map to a mask, with every setting at hand; and the plain functions behind it."""

import warnings
from collections.abc import Mapping

import ipywidgets as ui
import numpy as np
from PIL import Image

from .. import masks
from ..dataset.recipe import METHODS as MASKS
from ..maps.heatmaps import upscale
from ..metrics import iou
from .drawing import MASK, border, enlarged
from .panel import Panel, Report, row, sized
from .picture import Picture

TAKES = {  # method: settings of its sliders
    "dbscan": ("quantile", "eps", "min_samples"),
    "threshold": ("level",),
    "otsu": (),
    "random_walker": ("low", "high"),
}
CLUSTERED = ("quantile", "level", "eps", "min_samples")  # settings that make clusters
NOISE = (150, 150, 150)
CLUSTERS = np.array([MASK, (31, 119, 180), (44, 160, 44), (255, 127, 14), (148, 103, 189)])


def mask_of(heat: np.ndarray, settings: Mapping, image=None) -> tuple[np.ndarray, str]:
    """A mask by a recipe's settings, {"method": "dbscan", "eps": 1.5}, and what there is to say about it, or ""."""
    method, rest = settings["method"], {k: v for k, v in settings.items() if k != "method"}
    if method not in MASKS:
        raise ValueError(f"method={method!r}: choose one of {', '.join(MASKS)}")
    function = getattr(masks, f"{method}_mask")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = function(heat, np.asarray(image), **rest) if method == "random_walker" else function(heat, **rest)
    return found, "; ".join(str(one.message) for one in said)


def cluster_picture(heat: np.ndarray, settings: Mapping, image) -> tuple[np.ndarray, np.ndarray, str]:
    """Pixels uint8 (row, column, rgb), `enlarged`; the mask (row, column) of the image's size; what is to be said.

    The image in gray, DBSCAN's clusters in colors, noise gray, the mask outlined in white. `heat` has the image's size.
    """
    mask, said = mask_of(heat, settings, image)
    colored = np.repeat(0.75 * np.asarray(Image.fromarray(np.asarray(image)).convert("L"))[..., None], 3, axis=2)
    tints = np.where(mask, 1, 0)
    if settings["method"] == "dbscan":
        options = {name: value for name, value in settings.items() if name in CLUSTERED}
        clusters = masks.dbscan_clusters(heat, **options)
        tints = np.where(clusters > 0, (clusters - 1) % len(CLUSTERS) + 1, clusters)
    colors = np.where(tints[..., None] < 0, NOISE, CLUSTERS[tints - 1])
    colored = np.where((tints != 0)[..., None], 0.4 * colored + 0.6 * colors, colored)
    pixels, large = enlarged(colored), enlarged(mask)
    pixels[border(large)] = 255
    return pixels.astype(np.uint8), mask, said


def recipe_lines(settings: Mapping) -> str:
    """Settings of a mask as lines of a recipe of `attnlab.dataset`."""
    values = {name: f"{value:g}" if isinstance(value, float) else value for name, value in settings.items()}
    inner = ", ".join(f"{name}: {value}" for name, value in values.items())
    return f"mask: {{{inner}}}"


def agreement(mask: np.ndarray, truth: np.ndarray | None) -> str:
    """IoU with the truth as a text; "" without one."""
    return "" if truth is None else f"IoU {iou(mask, truth):.3f}"


class MaskExplorer(Panel):
    """The widget of `explore_mask`; `mask` is bool (row, column) of the image's size, `settings` a recipe's."""

    def __init__(self, heat: np.ndarray, image: np.ndarray, truth: np.ndarray | None, settings: Mapping):
        self.image, self.truth, self.mask = image, truth, np.zeros(image.shape[:2], bool)
        self.heat = heat if heat.shape == image.shape[:2] else upscale(np.float32(heat), image.shape[:2])
        self.method = ui.ToggleButtons(options=list(TAKES), style={"button_width": "120px"})
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
            pixels, self.mask, said = cluster_picture(self.heat, self.settings, self.image)
            self.picture.show(pixels, grid=self.mask.shape)
            parts = [f"{self.mask.mean():.1%} of the image", agreement(self.mask, self.truth), said]
            self.report.say("; ".join(part for part in parts if part), "failed" if said else "says")
            self.recipe.value = f"in a recipe: <code>{recipe_lines(self.settings)}</code>"

    def still(self) -> np.ndarray:
        return self.picture.pixels


def explore_mask(
    heat: np.ndarray, image, truth: np.ndarray | None = None, settings: Mapping | None = None
) -> MaskExplorer:
    """A widget that turns a heat map (row, column) into a mask of an image, live.

    Clusters of DBSCAN are colored, what becomes the mask is outlined; with `truth`, bool (row, column) of the image's
    size, it tells the IoU. The line below is what a recipe of `attnlab.dataset` takes; `settings` are such, to begin
    with: {"method": "dbscan", "quantile": 0.85}.

    ValueError for a map that is not two-dimensional, a truth of another size than the image, or unknown settings.
    """
    settings, known = dict(settings or {}), {"method", *(name for names in TAKES.values() for name in names)}
    if unknown := settings.keys() - known:
        raise ValueError(f"settings {', '.join(sorted(unknown))}: there are sliders for {', '.join(sorted(known))}")
    heat, image = np.asarray(heat), np.asarray(image)
    if heat.ndim != 2 or image.ndim != 3 or (truth is not None and np.shape(truth) != image.shape[:2]):
        raise ValueError(
            f"heat is (row, column), image (row, column, rgb), truth of the image's size; not {heat.shape}, "
            f"{image.shape}, {None if truth is None else np.shape(truth)}"
        )
    return MaskExplorer(heat, image, truth, settings)
