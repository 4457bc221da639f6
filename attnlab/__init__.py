"""attnlab: what a diffusion model looks at, word by word, and the masks that come of it.

    import attnlab as al

    pipe = al.load_pipeline("tiny")
    with al.record(pipe) as recording:
        image = pipe("a burning house with smoke", generator=al.seed(7)).images[0]
    mask = al.dbscan_mask(al.daam(recording)["smoke"])

Names are imported when they are first used, so that `import attnlab` is quick and does nothing.
"""

from importlib import import_module
from importlib.util import find_spec

__version__ = "0.1.0"

_NAMES = {
    "pipelines": ("load_pipeline", "seed"),
    "recording": ("Recording", "record", "record_image"),
    "maps": ("HeatMaps", "LinearMap", "daam", "linear_daam", "ovam", "propagate", "std"),
    "tokens": ("Token", "TokenLibrary"),
    "learning": ("best_words", "fit_token", "fit_tokens", "nearest_words", "optimize_token", "transfer_matrix"),
    "segmentation": ("load_segmenter",),
    "masks": ("dbscan_clusters", "dbscan_mask", "otsu_mask", "random_walker_mask", "threshold_mask", "vote_mask"),
}
_MODULE = {name: module for module, names in _NAMES.items() for name in names}
__all__ = sorted(_MODULE)


def __getattr__(name: str):
    if name in _MODULE:
        value = getattr(import_module(f".{_MODULE[name]}", __name__), name)
    elif not name.startswith("_") and find_spec(f"{__name__}.{name}"):
        value = import_module(f".{name}", __name__)  # al.plots, al.metrics, ...
    else:
        raise AttributeError(f"module 'attnlab' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *_MODULE})
