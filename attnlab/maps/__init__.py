"""Maps of words: softmax (`daam`, `ovam`, `goca`), what they add (`contributions`), `concept_maps`, `linear_daam`."""

from .concepts import concept_maps
from .contributions import contributions
from .goca import goca
from .heatmaps import HeatMaps, minmax, std, upscale
from .linear import LinearMap, linear_daam
from .softmax import daam, ovam, propagate

__all__ = [
    "HeatMaps", "LinearMap", "concept_maps", "contributions", "daam", "goca", "linear_daam", "minmax", "ovam",
    "propagate", "std", "upscale",
]  # fmt: skip
