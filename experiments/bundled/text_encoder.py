"""Make the tokenizer and the text encoder: CLIP's classes, with a vocabulary learned from the captions."""

import copy
import json
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

__all__ = ["PROMPT_LENGTH", "deepen", "new_text_encoder", "train_tokenizer", "without_context"]

PROMPT_LENGTH = 48  # tokens per prompt, start and end included
_START, _END = "<|startoftext|>", "<|endoftext|>"
_CLIP_SPLIT = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def train_tokenizer(captions, folder: Path) -> CLIPTokenizer:
    """Learn byte-pair encoding until every word of the captions is one token, and write it as CLIP's own files.

    Any other text becomes several tokens, never an unknown one.
    """
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_SPLIT), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=10_000,
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(captions, trainer)
    merges = json.loads(bpe.to_str())["model"]["merges"]
    merges = [tuple(m.split()) if isinstance(m, str) else tuple(m) for m in merges]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = dict.fromkeys([*letters, *(f"{c}</w>" for c in letters), *("".join(m) for m in merges), _START, _END])
    vocab = {token: i for i, token in enumerate(tokens)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(m) for m in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=PROMPT_LENGTH)
    tokenizer.save_pretrained(folder)
    return tokenizer


def new_text_encoder(
    tokenizer: CLIPTokenizer,
    layers: int = 1,
    places: float = 0.2,
    width: int = 128,
    heads: int = 4,
    kind: type[CLIPTextModel] | type[CLIPTextModelWithProjection] = CLIPTextModel,
) -> CLIPTextModel | CLIPTextModelWithProjection:
    """Return a text encoder with random weights, for the tokenizer's vocabulary and window.

    Its embeddings of places begin `places` times as large as those of tokens. Where both are of one size, half of a
    word's key says where in the text it stands, and its attention depends on that.
    """
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        projection_dim=width if kind is CLIPTextModelWithProjection else 512,  # of what has a projection
    )
    encoder = kind(config)
    with torch.no_grad():
        getattr(encoder, "text_model", encoder).embeddings.position_embedding.weight.mul_(places)
    return encoder


def deepen(encoder: CLIPTextModel, layers: int) -> CLIPTextModel:
    """Return a text encoder with further layers, `layers` in all, which add nothing until they are trained."""
    config = copy.deepcopy(encoder.config)
    config.num_hidden_layers, before = layers, encoder.config.num_hidden_layers
    deeper = CLIPTextModel(config)
    deeper.load_state_dict(encoder.state_dict(), strict=False)
    with torch.no_grad():
        for layer in deeper.encoder.layers[before:]:
            for last in (layer.self_attn.out_proj, layer.mlp.fc2):  # of each residual branch
                last.weight.zero_()
                last.bias.zero_()
    return deeper


def without_context(encoder: CLIPTextModel, ids: torch.Tensor) -> torch.Tensor:
    """Return hidden states (text, token, width) that bypass the layers: each of its token and place alone."""
    return encoder.final_layer_norm(encoder.embeddings(input_ids=ids))
