"""What met in a layer while the denoiser ran, of one image: what stores take from."""

from typing import NamedTuple

import torch

from .adapters import AttentionCall, JointCall
from .layers import Layer
from .trace import Trace

__all__ = ["Met"]


class Met(NamedTuple):
    """What met in a layer, of one image."""

    layer: Layer
    call: AttentionCall | JointCall
    trace: Trace
    row: int  # of the call's batch

    @property
    def queries(self) -> torch.Tensor:
        """The image's queries (pixel, head x width), a view."""
        return self.call.query[self.row].detach()
