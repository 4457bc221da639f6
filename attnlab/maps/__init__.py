"""Maps of words from a recording: by softmax (`daam`, `ovam`) or linear in the text embedding (`linear_daam`)."""

from .heatmaps import HeatMaps, minmax, std, upscale
from .linear import LinearMap, linear_daam
from .softmax import daam, ovam, propagate

__all__ = ["HeatMaps", "LinearMap", "daam", "linear_daam", "minmax", "ovam", "propagate", "std", "upscale"]
