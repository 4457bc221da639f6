"""The models of the study of words: what each learns from, and what its denoiser sees of the text."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import CLIPTokenizer

from attnlab import seed, training

from ..bundled.denoiser_training import DenoiserTraining, Examples, TextToImageSettings
from ..bundled.text_to_image import TextToLatent

__all__ = ["VARIANTS", "Variant", "new_model", "start_training"]

_HIDDEN = {"visible": 0.0, "registers": 0.0, "half": 0.5, "hidden": 1.0}  # in this fraction of training samples


@dataclass(frozen=True)
class Variant:
    """What a model learns from, what its denoiser sees of the text, and at which heights its attention meets it."""

    captions: str  # "sparse", or "dense": see `street.render`
    text_layers: int  # 0: words without context, token and place embedding alone
    padding: str  # from the end token on, in training: "visible", "hidden", "half" of both, or constant "registers"
    heights: tuple[int, ...] = (16, 8, 4)  # of the maps of cross-attention
    places: float = 1.0  # size of place embeddings at the start, of token embeddings 1
    keywords: float = 0.0  # fraction of captions that are cut down to one to three of their class words
    window: int = 48  # tokens per prompt
    contextless: float = 0.0  # fraction of samples whose text bypasses the text encoder's layers
    near: bool = False  # whether near views are learned from, too, a third as many (see `street.render`)
    price: float = 0.0  # of attention that is not on the start token

    @property
    def name(self) -> str:
        """What it is called in files and tables."""
        only = f"-only{self.heights[0]}" if len(self.heights) == 1 else ""
        places = f"-places{self.places}" if self.places < 1 else ""
        context = f"-contextless{self.contextless}" if self.contextless else ""
        levers = "-near" * self.near + (f"-price{self.price}" if self.price else "")
        return f"{self.captions}-{self.text_layers}-{self.padding}{only}{places}{context}{levers}"


_TEXTS = (0, "hidden"), (0, "visible"), (0, "registers"), (1, "visible"), (2, "visible"), (2, "hidden")
_PARTS = (0, "visible", (16,)), (0, "visible", (16, 8, 4), 0.2), (0, "visible", (16,), 0.2), (1, "visible", (16,), 0.2)
_SPARSE = (0, "visible"), (2, "half")  # the second is the recipe that `tiny-plain` had
VARIANTS = {
    variant.name: variant
    for variant in (
        *(Variant("dense", *given) for given in (*_TEXTS, *_PARTS)),
        *(
            Variant("dense", 1, "visible", (16,), 0.2, contextless=0.5, near=near, price=price)
            for near in (False, True)
            for price in (0.0, 0.003, 0.01, 0.03)
        ),
        *(Variant("sparse", *given, keywords=0.15, window=32) for given in _SPARSE),
    )
}


def start_training(
    variant: Variant,
    schedule: training.Schedule,
    examples: Examples,
    tokenizer: CLIPTokenizer,
    path: Path,
    device: torch.device,
    batch: int = 32,
) -> DenoiserTraining:
    """Begin the training of a variant with the schedule's seed, or go on with it.

    Parameters
    ----------
    variant, schedule : Variant, training.Schedule
        What is trained; the seed draws the starting weights and the batches.
    examples : Examples
        The training scenes, with captions that are cut to keywords where the variant wants these.
    tokenizer : CLIPTokenizer
        With the variant's window.
    path : Path
        File of the checkpoint.
    device, batch : torch.device, int
        Where, and how many scenes per step.
    """
    parts = {"keywords": variant.keywords, "hidden": _HIDDEN[variant.padding], "contextless": variant.contextless}
    parts["price"] = variant.price
    settings = TextToImageSettings(batch, grounding=0.0, **parts)
    return DenoiserTraining(new_model(variant, tokenizer, schedule.seed), examples, settings, schedule, path, device)


def new_model(variant: Variant, tokenizer: CLIPTokenizer, start: int) -> TextToLatent:
    """Return the untrained model of a variant; registers are what untrained places alone would look like."""
    with training.seeded(start):
        model = TextToLatent.new(tokenizer, 16, variant.heights, variant.text_layers, variant.places)
    if variant.padding == "registers":
        constants = torch.randn(variant.window, model.text_encoder.config.hidden_size, generator=seed(0))
        model.text_encoder.register_buffer("registers", F.layer_norm(constants, constants.shape[1:]))
        model.text_encoder.register_forward_hook(partial(_put_registers, tokenizer.eos_token_id), with_kwargs=True)
    return model


def _put_registers(end, encoder, args, options, output):
    ids = args[0] if args else options["input_ids"]
    words = ((ids == end).cumsum(-1) == 0)[..., None]
    output.last_hidden_state = torch.where(words, output.last_hidden_state, encoder.registers)
    return output
