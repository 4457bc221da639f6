"""How far each layer's self-attention agrees with a reference, by which `goca` weighs layers.

Axes: pixel (row-major, of a layer), cell (row-major, of a grid that all layers share), token, channel.
"""

from collections.abc import Callable
from functools import partial
from numbers import Integral

import torch
import torch.nn.functional as F

from .adapters import Adapter, AttentionCall, JointCall
from .layers import head_weights
from .met import Met
from .trace import Trace, add_to

__all__ = ["AgreementStore"]


class AgreementStore:
    """The sum over steps of each layer's agreement; in joint attention also of its maps by the agreement of heads.

    The reference is made of features: what self-attention gives the pixels in the middle one of the recorded layers.
    TypeError where self-attention is not seen, ValueError for what is no height of a grid.
    """

    def __init__(self, adapter: Adapter, height: int, share: str):
        if isinstance(height, bool) or not isinstance(height, Integral) or height < 1:
            raise ValueError(f"agreement={height!r}: give the height of a grid that layers are compared on, such as 16")
        self.adapter, self.height, self.share = adapter, height, share
        self._passed_over: Callable[[], bool] = bool  # whether what is heard is of no step
        self._modules = {name: adapter.self_attention_of(name) for name in adapter.attentions}
        self._met: tuple[str, AttentionCall] | None = None  # whose self-attention ran last, and what met in it
        self._given: torch.Tensor | None = None  # what came of that, (batch, pixel, channel)

    def listen(self, passed_over: Callable[[], bool]) -> list:
        """Listen to self-attentions that are modules of their own; return the handles to remove that by."""
        self._passed_over = passed_over
        if self.adapter.joint:
            return []
        taps = [self.adapter.tap(module, partial(self._meet, name)) for name, module in self._modules.items()]
        ends = [module.register_forward_hook(self._give) for module in self._modules.values()]
        return [*(handle for tap in taps for handle in tap), *ends]

    def take(self, met: list[Met]) -> list[tuple]:
        """Compute each image's maps in a layer, self-attention (cell, cell) and features (cell, channel)."""
        return [self._taken(one.trace, one.layer, one.call, one.row) for one in met]

    def _taken(self, trace, layer, call, row):
        taken = self._of_joint if isinstance(call, JointCall) else self._of_cross
        maps, looks, features = taken(trace, layer.name, call, row)
        height, width = latent = trace.generation.latent_size
        size, grid = self.adapter.grid(call.count, latent), (self.height, max(1, round(self.height * width / height)))
        looks = _resized(_resized(looks, size, grid).mT, size, grid).mT
        return maps, looks, _resized(features.mT, size, grid).mT

    def put(self, trace: Trace, taken: dict[str, tuple]) -> None:
        """Add a step's agreement and maps, by layer in the order of the denoiser, to a trace."""
        features = list(taken.values())[len(taken) // 2][-1]
        reference = (features @ features.mT / features.shape[-1] ** 0.5).softmax(-1)
        for name, (maps, looks, _) in taken.items():
            add_to(trace.agreement, name, (reference * looks).sum())  # of probabilities: never negative
            if maps is not None:
                add_to(trace.agreed, name, maps)
        self._met = self._given = None

    def _of_joint(self, trace, name, call, row):
        given = call.outputs(row, call.pixels[row]).float()  # (pixel, head x width)
        weight = self.adapter.output_weight(name, given.shape[-1]).float()
        features, maps = given @ weight.T, None
        if trace.length is not None and trace.generation.changed is None:  # else there is no sum for its words
            along = (given * (features @ weight)).unflatten(-1, (call.query.shape[1], -1)).sum(-1).T
            maps = call.shares(row, self.share, weights=head_weights(along), kept=trace.length)
        return maps, call.self_attention(row), features

    def _of_cross(self, trace, name, call, row):
        if self._met is None or self._met[0] != name or self._given is None:
            raise RuntimeError(
                f"the self-attention before {name} was not seen: it was left out (DeepCache), or has a processor with "
                f"keys that are not the image's own; {self.adapter.how_seen}, or without agreement="
            )
        looks = self._met[1].self_attention(row, self._modules[name])
        return None, looks, self._given[row].float()

    def _meet(self, name, call):
        if not self._passed_over():
            self._met = (name, call.lasting()) if call.among_pixels else None

    @torch.compiler.disable
    def _give(self, module, args, output):
        if not self._passed_over():
            self._given = output.detach()


def _resized(values, size, grid):
    """Resize (row, pixel) bilinearly to (row, cell), where pixels are those of a size, (height, width)."""
    return F.interpolate(values.unflatten(-1, size)[None], grid, mode="bilinear", align_corners=False)[0].flatten(1)
