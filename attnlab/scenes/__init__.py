"""Procedural worlds: rendered images with a caption and the exact mask of everything in them."""

from . import aerial, street
from .scene import Scene

__all__ = ["Scene", "aerial", "street"]
