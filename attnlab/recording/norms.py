"""What normalizes queries or keys in some models, as numbers: so that a recording needs no module of the model."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["Norm"]

_KINDS = {"LayerNorm": "layer", "FP32LayerNorm": "layer", "RMSNorm": "rms", "LpNorm": "l2"}  # by the module's class


@dataclass(frozen=True)
class Norm:
    """A normalization of the last axis."""

    kind: str  # "layer", "rms" or "l2"
    eps: float
    whole: bool  # whether all heads are normalized together, not each by itself
    weight: torch.Tensor | None = None  # (channel,)
    bias: torch.Tensor | None = None  # (channel,)

    @classmethod
    def of(cls, module: nn.Module | None, width: int) -> "Norm | None":
        """Copy a module, None for none; TypeError for one of an unknown kind. `width` is that of a head."""
        if module is None:
            return None
        kind = type(module).__name__
        if kind not in _KINDS or getattr(module, "p", 2) != 2:
            raise TypeError(
                f"queries or keys are normalized by {kind}, which is not known here: {', '.join(_KINDS)} are"
            )
        weight, bias = (
            None if getattr(module, part, None) is None else getattr(module, part).detach().float().clone()
            for part in ("weight", "bias")
        )
        shape = getattr(module, "normalized_shape", getattr(module, "dim", None))
        size = len(weight) if weight is not None else shape[-1] if isinstance(shape, tuple) else width
        eps = module.eps if module.eps is not None else torch.finfo(torch.float32).eps
        return cls(_KINDS[kind], eps, size != width, weight, bias)

    def fits(self, channels: int) -> bool:
        """Return whether this is a normalization of so many channels."""
        known = self.kind in _KINDS.values() and type(self.eps) is float and type(self.whole) is bool
        return known and all(part is None or part.shape == (channels,) for part in (self.weight, self.bias))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize float32 (..., channel)."""
        weight, bias = (None if part is None else part.to(x.device) for part in (self.weight, self.bias))
        if self.kind == "layer":
            return F.layer_norm(x, x.shape[-1:], weight, bias, self.eps)
        if self.kind == "l2":
            return F.normalize(x, dim=-1, eps=self.eps)
        x = F.rms_norm(x, x.shape[-1:], weight, self.eps)
        return x if bias is None else x + bias
