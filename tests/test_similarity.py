"""Text-image scores: a random small CLIP model against its own logits, and the filter that uses them."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

import attnlab as al
from attnlab.dataset import Filters, Recipe, generate_dataset, label
from attnlab.dataset.similarity import Similarity

RECIPE = Recipe(
    prompts=["a {thing} with fire"], lists={"thing": ["house", "tree"]}, classes={"fire": "fire"}, images=3, steps=3
)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A folder with a CLIP model of random weights that reads the bundled model's words."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = al.load_pipeline("tiny", device="cpu").tokenizer
    text = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 77, "eos_token_id": tokenizer.eos_token_id}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 32, "patch_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def pictures(count, side=64):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8)) for _ in range(count)]


def test_it_is_the_cosine_of_the_models_embeddings(clip):
    judge, images, texts = Similarity(clip), pictures(3, 32), ["a house", "a burning tree at night", "sky"]
    mean, std = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])  # CLIP's own
    pixels = (np.stack([np.asarray(x) for x in images]) / 255 - mean) / std  # 32 pixels: nothing to resize or crop
    for i, text in enumerate(texts):
        ids = torch.tensor([judge.tokenizer(text).input_ids])
        with torch.no_grad():
            found = judge.model(ids, torch.tensor(pixels[i : i + 1]).permute(0, 3, 1, 2).float())
        expected = float(found.logits_per_image / judge.model.logit_scale.detach().exp())
        assert judge(images, texts)[i] == pytest.approx(expected, abs=1e-5)


def test_long_prompts_are_cut(clip):
    judge, long = Similarity(clip), "a house and " * 60
    assert judge(pictures(1), [long]) == judge(pictures(1), [long + "a tree"])


def test_images_unlike_their_prompts_are_rejected(clip, tmp_path):
    loose = Filters(area=None, flat=None, blank=None, duplicates=None, clip=str(clip))
    all_of_it = generate_dataset(replace(RECIPE, filters=loose), tmp_path / "all")
    values = [metadata["similarity"] for metadata in all_of_it.records]
    judge = Similarity(clip)
    assert values == pytest.approx([judge([pair.image], [pair.metadata["prompt"]])[0] for pair in all_of_it], abs=2e-4)
    cut = float(np.median(values))
    some = generate_dataset(replace(RECIPE, filters=replace(loose, similarity=cut)), tmp_path / "some")
    assert [metadata["index"] for metadata in some.records] == [i for i, value in enumerate(values) if value >= cut]
    assert {line["reason"] for line in some.rejected} == {"unlike its prompt"}


def test_without_a_model_nothing_is_compared():
    image = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    found = label({"fire": np.arange(64.0).reshape(8, 8)}, image, RECIPE)
    assert found.similarity is None and found.rejected is None


def test_what_is_wrong_is_said_before_anything_is_made(tmp_path):
    with pytest.raises(ValueError, match="similarity wants clip"):
        replace(RECIPE, filters=Filters(similarity=0.2))
    with pytest.raises(FileNotFoundError, match="no CLIP model 'nowhere': name a folder"):
        generate_dataset(replace(RECIPE, filters=Filters(similarity=0.2, clip="nowhere")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_model_is_none(clip, tmp_path):
    cut, other, pickled = (shutil.copytree(clip, tmp_path / name) for name in ("cut", "other", "pickled"))
    (cut / "model.safetensors").write_bytes((clip / "model.safetensors").read_bytes()[:-100])
    config = json.loads((clip / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"projection_dim": 8}))
    torch.save(CLIPModel.from_pretrained(clip).state_dict(), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    for folder in (cut, other, pickled):
        with pytest.raises(FileNotFoundError, match="no CLIP model"):
            Similarity(folder)
