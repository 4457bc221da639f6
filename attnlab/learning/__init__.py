"""Learn words from masks: `fit_token` (convex), `optimize_token` (gradient descent); measure them on other images."""

from .fit import Whitening, fit_token, fit_tokens
from .optimize import PRESETS, OptimizerSettings, optimize_token
from .transfer import Match, best_words, nearest_words, transfer_matrix

__all__ = ["PRESETS", "Match", "OptimizerSettings", "Whitening", "best_words", "fit_token", "fit_tokens"]
__all__ += ["nearest_words", "optimize_token", "transfer_matrix"]
