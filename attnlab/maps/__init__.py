"""Maps of words: by softmax (`daam`, `ovam`), by what they add (`contributions`), linear (`linear_daam`)."""

from .contributions import contributions
from .heatmaps import HeatMaps, minmax, std, upscale
from .linear import LinearMap, linear_daam
from .softmax import daam, ovam, propagate

__all__ = [
    "HeatMaps", "LinearMap", "contributions", "daam", "linear_daam", "minmax", "ovam", "propagate", "std", "upscale",
]  # fmt: skip
