"""The texts that a pipeline's text encoder read lately: which words an embedding stands for."""

import torch

__all__ = ["EncodedTexts"]

_REMEMBERED = 32  # latest calls of the text encoder, to tell which words an embedding stands for
_ALIKE = 5e-3  # relative distance up to which an embedding is one that the text encoder gave: half precision rounds


class EncodedTexts:
    """The latest calls of a text encoder: which token ids became which embeddings."""

    def __init__(self):
        self.calls: list[tuple[torch.Tensor, list[torch.Tensor]]] = []

    def remember(self, encoder, args, kwargs, output):
        """Note a call; a hook of the text encoder."""
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is not None:
            norm = getattr(getattr(encoder, "text_model", encoder), "final_layer_norm", torch.nn.Identity())
            hidden = getattr(output, "hidden_states", None) or ()
            skipped = [made for h in hidden for made in (norm(h), h)]  # what clip_skip= takes, and SDXL
            self.calls = [*self.calls[1 - _REMEMBERED :], (ids.cpu(), [output[0], *skipped])]

    def token_ids(self, text: torch.Tensor, second: bool = False) -> list[int] | None:
        """Find the token ids that became `text` (token, text width), told by the result itself.

        Where there are two text encoders, the rows of `text` begin with what the first one made, and end with what the
        second one did.
        """
        for ids, outputs in reversed(self.calls):
            for output in outputs:
                for row in range(len(ids)):
                    width = output.shape[-1]
                    made, asked = output[row].to(text), text[..., -width:] if second else text[..., :width]
                    if made.shape == asked.shape and (made - asked).norm() <= _ALIKE * asked.norm():
                        return ids[row].tolist()
        return None
