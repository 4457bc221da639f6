"""The thesis's experiments (Marcos-Manchón, UAM 2023): its images, its methods, its figures' numbers, its tables.

gallery = thesis.Gallery.load("tiny-plain", "runs/cache")          # images, and what was recorded, kept on disk
experiment = thesis.Experiment(gallery, images=50)                 # who is learned from, who is tested on
experiment.curves("DAAM", "generated")["car"]                      # IoU (threshold, image)
"""

from .examples import PROMPT, SHOWN, WORDS, Example, main_object
from .experiment import (
    METHODS,
    TRACKS,
    Experiment,
    Summary,
    band,
    by_resolution,
    correlations,
    layers_by_steps,
    over_classes,
    summary,
)
from .gallery import Gallery

__all__ = [
    "METHODS",
    "PROMPT",
    "SHOWN",
    "TRACKS",
    "WORDS",
    "Example",
    "Experiment",
    "Gallery",
    "Summary",
    "band",
    "by_resolution",
    "correlations",
    "layers_by_steps",
    "main_object",
    "over_classes",
    "summary",
]
