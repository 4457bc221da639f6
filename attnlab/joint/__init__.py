"""Joint diffusion of images and label maps: labeled images without a labeling (SatSynth, CVPR 2024)."""

from .codes import bit_codes, one_hot_codes, touching
from .diffusion import JointDiffusion
from .proportions import class_proportions

__all__ = ["JointDiffusion", "bit_codes", "class_proportions", "one_hot_codes", "touching"]
