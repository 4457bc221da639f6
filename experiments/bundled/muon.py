"""Train the matrices of a transformer by Muon, and what else it has by AdamW, as one optimizer."""

from collections.abc import Iterable

import torch

__all__ = ["MuonAndAdamW"]


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) for matrices, whose steps it makes orthogonal, and AdamW for all other weights.

    Muon's steps are scaled to be as large as AdamW's (Liu et al., arXiv 2502.16982), so that one rate does for both.

    Parameters
    ----------
    model : torch.nn.Module
        What is trained.
    matrices : iterable of torch.Tensor
        Those of its weights that are (output, input) between hidden states: neither embeddings nor the last layer.
    lr, weight_decay : float
        Of both.
    """

    def __init__(self, model: torch.nn.Module, matrices: Iterable[torch.Tensor], lr: float, weight_decay: float):
        matrices = list(matrices)
        by_muon = set(map(id, matrices))
        others = [weight for weight in model.parameters() if id(weight) not in by_muon]
        options, self._parts = {"lr": lr, "weight_decay": weight_decay}, []
        if matrices:
            self._parts.append(torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **options))
        if others:
            self._parts.append(torch.optim.AdamW(others, betas=(0.9, 0.99), fused=True, **options))
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._share()

    def _share(self):
        """Let both parts work on this optimizer's state and groups, which a checkpoint holds."""
        for part, group in zip(self._parts, self.param_groups, strict=True):
            part.state, part.param_groups = self.state, [group]

    def load_state_dict(self, state_dict: dict) -> None:
        """Load what `state_dict` returned."""
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self) -> None:
        """Make a step of both."""
        for part in self._parts:
            part.step()
