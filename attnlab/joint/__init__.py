"""Joint diffusion of images and label maps: labeled images without a labeling (SatSynth, CVPR 2024)."""

from .diffusion import JointDiffusion
from .proportions import class_proportions

__all__ = ["JointDiffusion", "class_proportions"]
