"""Stable Diffusion 1.x, 2.x and XL: small pipelines of the real classes with random weights, in all their uses."""

import numpy as np
import pytest
import torch
from conftest import PROMPT, PlainAttention
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import attnlab as al
from attnlab.recording.texts import TextEncoder

KINDS = {
    "1.x": (StableDiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline),
    "2.x": (StableDiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline),
    "XL": (StableDiffusionXLPipeline, StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline),
}
UNETS = {
    "1.x": {"block_out_channels": (32, 32, 64, 64), "attention_head_dim": 8, "cross_attention_dim": 32},
    "2.x": {
        "block_out_channels": (32, 32, 64, 64),
        "attention_head_dim": (4, 4, 8, 8),
        "cross_attention_dim": 32,
        "use_linear_projection": True,
    },
    "XL": {
        "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (4, 8),
        "cross_attention_dim": 32 + 48,
        "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 16,
    },
}


def text_encoder(kind, tokenizer, width, layers):
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return kind(config).eval()


def build(family, tokenizer):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            latent_channels=4,
            norm_num_groups=4,
        )
        parts = {
            "vae": vae.eval(),
            "unet": UNet2DConditionModel(sample_size=16, layers_per_block=1, norm_num_groups=8, **UNETS[family]).eval(),
            "tokenizer": tokenizer,
            "text_encoder": text_encoder(CLIPTextModel, tokenizer, 32, 2),
        }
        second = text_encoder(CLIPTextModelWithProjection, tokenizer, 48, 3)
    if family == "XL":
        scheduler = EulerDiscreteScheduler(beta_schedule="scaled_linear")
        more = {"tokenizer_2": tokenizer, "text_encoder_2": second, "add_watermarker": False}
    else:
        made = {"1.x": (PNDMScheduler, {"skip_prk_steps": True}), "2.x": (DDIMScheduler, {"clip_sample": False})}
        scheduler = made[family][0](steps_offset=1, **made[family][1])
        more = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return {**parts, "scheduler": scheduler, **more}


@pytest.fixture(scope="module", params=list(KINDS))
def family(request, pipe):
    """(name, parts of a pipeline)"""
    return request.param, build(request.param, pipe.tokenizer)


def run(pipe, steps=3, prompt=PROMPT, **call):
    pipe.set_progress_bar_config(disable=True)
    call = {"guidance_scale": 4.0, "output_type": "latent", "generator": al.seed(7)} | call
    return pipe(prompt, num_inference_steps=steps, **call).images


def make(family, number):
    name, parts = family
    return KINDS[name][number](**parts)


@pytest.mark.parametrize("keep", [{}, {"keep": "maps", "texts": "a tree"}, {"branch": "both", "keep": "sum"}])
def test_image_is_bit_exact(family, keep):
    pipe = make(family, 0)
    plain = run(pipe, height=64, width=96)
    with al.record(pipe, **keep) as recording:
        assert torch.equal(run(pipe, height=64, width=96), plain)
    largest = (16, 24) if family[0] != "XL" else (8, 12)
    assert max(recording[0].trace.sizes.values()) == largest


def test_maps_are_the_models_own_attention(family):
    """DAAM against probabilities written out in float64; the prompt's words are known, of both text encoders' text."""
    pipe = make(family, 0)
    layers = {n: m for n, m in pipe.unet.named_modules() if n.endswith("attn2") and "mid" not in n}
    before, stores = {n: m.processor for n, m in layers.items()}, {n: [] for n in layers}
    for name, module in layers.items():
        module.set_processor(PlainAttention(stores[name]))
    with al.record(pipe) as recording:
        run(pipe)
    for name, module in layers.items():
        module.set_processor(before[name])
    assert recording.prompt == PROMPT and set(recording.trace.sizes) == set(layers)
    for name in layers:
        found = al.daam(recording, layers=[name])
        expected = sum(p[1] for p in stores[name]).mean(0) / len(stores[name])  # conditional half, mean over heads
        found = torch.from_numpy(found.values).flatten(1).T.double()
        torch.testing.assert_close(found, expected[:, : found.shape[1]], atol=1e-5, rtol=0)


def test_any_text_meets_the_queries_as_the_pipeline_would_read_it(family):
    pipe = make(family, 0)
    with al.record(pipe) as recording:
        run(pipe)
    text = recording.encode("a red car")
    embedding, *_ = pipe.encode_prompt(
        "a red car", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    assert torch.equal(text.embedding, embedding[0])
    padded = al.ovam(recording, PROMPT, padded=True, mode="bicubic")
    np.testing.assert_array_equal(padded.values, al.daam(recording).values)
    assert al.linear_daam(recording).matrix.shape[1] == (80 if family[0] == "XL" else 32)


def test_a_file_answers_with_the_text_encoders_alone(family, tmp_path):
    pipe = make(family, 0)
    with al.record(pipe) as recording:
        run(pipe)
    pipe.save_pretrained(tmp_path / "model")
    again = al.Recording.load(recording.save(tmp_path / "file"), TextEncoder.named(tmp_path / "model"))
    np.testing.assert_array_equal(al.ovam(again, "a river").values, al.ovam(recording, "a river").values)


@pytest.mark.parametrize("number", [1, 2], ids=["image to image", "inpainting"])
def test_image_to_image_and_inpainting(family, number):
    pipe = make(family, number)
    picture, mask = Image.new("RGB", (64, 64), "red"), Image.new("L", (64, 64), 255)
    call = {"image": picture, "strength": 0.5} | ({"mask_image": mask} if number == 2 else {})
    plain = run(pipe, steps=6, **call)
    with al.record(pipe) as recording:
        assert torch.equal(run(pipe, steps=6, **call), plain)
    assert recording.prompt == PROMPT and recording.complete and len(recording.trace.steps) in (3, 4)


def test_an_existing_picture(family):
    pipe = make(family, 0)
    picture = np.random.default_rng(0).uniform(size=(64, 96, 3)).astype(np.float32)
    recording = al.record_image(pipe, picture, "a red car", timesteps=[100, 400], generator=al.seed(1))
    assert recording.prompt == "a red car" and recording.trace.timesteps == [400, 100]
    assert np.isfinite(al.daam(recording)["car"]).all()
