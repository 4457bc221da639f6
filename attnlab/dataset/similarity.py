"""Compare images and texts by a CLIP model (Radford et al., ICML 2021)."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

__all__ = ["Similarity"]


class Similarity:
    """A CLIP model, from a folder that holds it with its tokenizer and image processor, or from the hub.

    FileNotFoundError where neither has it.
    """

    def __init__(self, source: str | Path):
        message = f"no CLIP model {str(source)!r}: name a folder with model, tokenizer and image processor, or a hub id"
        if not Path(source).is_dir() and str(source).count("/") != 1:
            raise FileNotFoundError(message)
        try:
            self.model = CLIPModel.from_pretrained(source, use_safetensors=True).eval()
            self.tokenizer = AutoTokenizer.from_pretrained(source)
            self.processor = CLIPImageProcessorPil.from_pretrained(source)  # the other one wants torchvision
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise FileNotFoundError(message) from error

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], texts: Sequence[str]) -> list[float]:
        """Return the cosine, -1..1, of each image and its text; texts are cut to the encoder's length."""
        length = self.model.config.text_config.max_position_embeddings
        words = self.tokenizer(list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt")
        pixels = self.processor(images=list(images), return_tensors="pt")["pixel_values"]
        found = self.model(input_ids=words["input_ids"], attention_mask=words["attention_mask"], pixel_values=pixels)
        return torch.cosine_similarity(found.image_embeds, found.text_embeds).tolist()
