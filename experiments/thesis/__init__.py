"""Repeat the thesis's experiments (Marcos-Manchón, UAM 2023): its images, methods, the numbers of figures and tables.

gallery = thesis.Gallery.load("tiny-plain", "runs/cache")          # images and recordings, kept on disk
experiment = thesis.Experiment(gallery, images=50)                 # train and test examples
experiment.curves("DAAM", "generated")["car"]                      # IoU (threshold, image)
"""

from .examples import MIN_OBJECT_AREA, PROMPT, PROMPT_WORDS, Example, main_object
from .experiment import (
    THESIS_METHODS,
    TRACKS,
    CurveSummary,
    Experiment,
    bootstrap_band,
    by_resolution,
    correlations,
    layers_by_steps,
    over_classes,
    summarize_curve,
)
from .gallery import Gallery

__all__ = ["MIN_OBJECT_AREA", "PROMPT", "PROMPT_WORDS", "THESIS_METHODS", "TRACKS", "CurveSummary", "Example"]
__all__ += ["Experiment", "Gallery", "bootstrap_band", "by_resolution", "correlations", "layers_by_steps"]
__all__ += ["main_object", "over_classes", "summarize_curve"]
