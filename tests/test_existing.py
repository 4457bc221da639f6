"""Maps for an existing picture."""

import accelerate
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from PIL import Image
from test_families import build

import attnlab as al


@pytest.fixture(scope="module")
def image():
    return torch.rand(64, 64, 3, generator=al.seed(0)).numpy()


def test_several_pictures(pipe, image):
    found = al.record_image(pipe, [image, image], ["a car", "smoke"], timesteps=(100, 500), generator=al.seed(0))
    assert [found[i].prompt for i in range(2)] == ["a car", "smoke"]
    assert found[0].trace.timesteps == [500, 100] and found.complete
    assert {t.generation.guidance_scale for t in found.traces} == {None}


def test_batches_change_nothing_else(pipe, image):
    pictures, prompts = [image, image[::-1].copy(), image[:, ::-1].copy()], ["a car", "smoke", "two trees"]
    all_at_once, one_by_one = (
        al.record_image(pipe, pictures, prompts, generator=al.seed(0), batch=batch) for batch in (3, 1)
    )
    for i, word in enumerate(("car", "smoke", "trees")):
        expected = al.daam(one_by_one[i])[word]
        assert abs(al.daam(all_at_once[i])[word] - expected).max() <= 1e-4 * expected.max()


def test_it_is_the_denoisers_own_pass(pipe, image):
    """The queries are those of the noised latent, computed here by hand."""
    found = al.record_image(pipe, image, "a car", timesteps=300, layers="up_blocks.2", generator=al.seed(5))
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None] * 2 - 1
    seen = []
    name = "up_blocks.2.attentions.1.transformer_blocks.0.attn2"
    handle = pipe.unet.get_submodule(name).to_q.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        latent = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
        noise = torch.randn((1, *latent.shape[1:]), generator=al.seed(5))
        noisy = pipe.scheduler.add_noise(latent, noise, torch.tensor([300]))
        text, _ = pipe.encode_prompt("a car", pipe.device, 1, False)
        pipe.unet(noisy, 300, text)
    handle.remove()
    torch.testing.assert_close(found.trace.queries[name][0], seen[0][0], rtol=1e-3, atol=1e-3)


def test_noise_is_drawn_anew_at_every_timestep(pipe, image):
    """What the denoiser sees: the latent, and as much of the next noise of the generator as the timestep has."""
    seen = []
    handle = pipe.unet.register_forward_pre_hook(lambda unet, given, named: seen.append(given[0]), with_kwargs=True)
    al.record_image(pipe, image, "a car", timesteps=(100, 500, 300), generator=al.seed(5))
    handle.remove()
    with torch.no_grad():
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None] * 2 - 1
        latent = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
    noise = torch.randn((3, *latent.shape[1:]), generator=al.seed(5))
    for found, time, one in zip(seen, (500, 300, 100), noise, strict=True):
        expected = pipe.scheduler.add_noise(latent, one[None], torch.tensor([time]))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_all_forms_of_a_picture(pipe, image):
    bytes_ = (image * 255).round().astype(np.uint8)
    forms = [bytes_, bytes_ / np.float32(255), Image.fromarray(bytes_), Image.fromarray(bytes_).convert("RGBA")]
    forms += [torch.from_numpy(bytes_), torch.from_numpy(bytes_ / np.float32(255)).requires_grad_()]
    maps = [al.daam(al.record_image(pipe, form, "a car", generator=al.seed(0)))["car"] for form in forms]
    for other in maps[1:]:
        np.testing.assert_allclose(other, maps[0], atol=1e-5 * maps[0].max())
    rough = al.record_image(pipe, torch.from_numpy(image).bfloat16(), "a car", generator=al.seed(0))
    np.testing.assert_allclose(al.daam(rough)["car"], maps[0], atol=0.1 * maps[0].max())


def test_a_picture_is_read_from_its_file(pipe, tmp_path):
    """Turned as its camera says, and of 16 bits: where its own conversion would show the sensor's image, or white."""
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    exif = Image.Exif()
    exif[0x0112] = 6
    gray = np.repeat((ramp / 257).round().astype(np.uint8)[..., None], 3, 2)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    Image.fromarray(gray).save(tmp_path / "turned.png", exif=exif)
    call = {"timesteps": 300, "layers": "up_blocks.2", "generator": al.seed(0)}
    for path, expected in ((tmp_path / "deep.png", gray), (str(tmp_path / "turned.png"), np.rot90(gray, -1))):
        maps = []
        for image in (path, Image.open(path), expected.copy()):
            maps.append(al.daam(al.record_image(pipe, image, "a car", **call | {"generator": al.seed(0)})).values)
        np.testing.assert_array_equal(maps[0], maps[2])
        np.testing.assert_array_equal(maps[1], maps[2])
    with pytest.raises(FileNotFoundError):
        al.record_image(pipe, tmp_path / "none.png", "a car")
    (tmp_path / "text.png").write_text("a car")
    with pytest.raises(ValueError, match=r"text\.png cannot be read as a photo"):
        al.record_image(pipe, tmp_path / "text.png", "a car")


def small(pipe, kind=StableDiffusionPipeline, of="1.x", unet=None, **parts):
    """A small pipeline of a kind, with another U-Net."""
    made = build(of, pipe.tokenizer)
    made["unet"] = type(made["unet"])(**made["unet"].config | (unet or {})).eval()
    return kind(**made | parts)


@pytest.mark.parametrize(
    ("kind", "unet", "parts", "wants"),
    [
        (StableDiffusionInpaintPipeline, {"in_channels": 9}, {}, "9 channels"),
        (StableDiffusionInstructPix2PixPipeline, {"in_channels": 8}, {}, "text that it encodes, 8 channels"),
        (StableDiffusionPipeline, {"time_cond_proj_dim": 8}, {}, "a strength of guidance"),
        (StableDiffusionPipeline, {"class_embed_type": "timestep"}, {}, "a class"),
        (
            StableDiffusionPipeline,
            {},
            {"scheduler": FlowMatchEulerDiscreteScheduler()},
            "another noise .*flow matching",
        ),
        (StableDiffusionPipeline, {}, {"vae": None}, "a VAE"),
    ],
)
def test_denoisers_that_want_to_know_more(pipe, image, kind, unet, parts, wants):
    with pytest.raises(TypeError, match=f"cannot record an existing image: it wants .*{wants}"):
        al.record_image(small(pipe, kind, unet=unet, **parts), image, "a car")


def test_conditions_that_an_image_prompt_adds(pipe, image):
    adapted = small(pipe)
    adapted.unet.register_to_config(encoder_hid_dim_type="ip_image_proj")  # as load_ip_adapter does
    with pytest.raises(TypeError, match=r"wants an image prompt, until pipe\.unload_ip_adapter"):
        al.record_image(adapted, image, "a car")


def test_a_vae_of_shifted_latents(pipe, image):
    with pytest.raises(TypeError, match="wants latents that are shifted"):
        al.record_image(small(pipe, vae=AutoencoderKL(shift_factor=0.1, block_out_channels=(32,))), image, "a car")


def test_the_small_autoencoder(pipe, image):
    """Its encoder gives latents as they are, without a distribution."""
    tiny = AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)
    found = al.record_image(small(pipe, vae=tiny.eval()), image, "a car", timesteps=(300,))
    assert np.isfinite(al.daam(found)["car"]).all()


def test_the_refiner_is_told_of_beauty(pipe, image):
    """As its own pipeline tells it: five numbers instead of six."""
    refiner = small(
        pipe, StableDiffusionXLImg2ImgPipeline, "XL", tokenizer=None, text_encoder=None, requires_aesthetics_score=True,
        unet={"cross_attention_dim": 48, "projection_class_embeddings_input_dim": 5 * 8 + 16},
    )  # fmt: skip
    seen = []
    handle = refiner.unet.register_forward_pre_hook(lambda unet, given, named: seen.append(named), with_kwargs=True)
    found = al.record_image(refiner, image, "a car", timesteps=(100,))
    handle.remove()
    told = ((64, 64), (0, 0), (64, 64), 6.0, 2.5, (64, 64), (0, 0), (64, 64))  # sizes, and how beautiful images are
    own, _ = refiner._get_add_time_ids(*told, dtype=torch.float32, text_encoder_projection_dim=16)
    assert seen[0]["added_cond_kwargs"]["time_ids"].tolist() == own.tolist()
    assert found.prompt == "a car" and al.daam(found)["car"].shape == (8, 8)


def test_the_smallest_picture(pipe):
    found = al.record_image(pipe, np.zeros((4, 64, 3)), "a car", timesteps=100, generator=al.seed(0))
    assert al.daam(found)["car"].shape == (1, 16)


def test_offloaded_pipeline(pipe, image):
    unet = type(pipe.unet).from_config(pipe.unet.config)
    unet.load_state_dict(pipe.unet.state_dict())
    offloaded = StableDiffusionPipeline(**{**pipe.components, "unet": unet.eval()}, requires_safety_checker=False)
    accelerate.cpu_offload(offloaded.unet, execution_device=torch.device("cpu"))
    expected = al.daam(al.record_image(pipe, image, "a car", generator=al.seed(0)))["car"]
    found = al.daam(al.record_image(offloaded, image, "a car", generator=al.seed(0)))["car"]
    np.testing.assert_allclose(found, expected, atol=1e-4 * expected.max())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": ["a car", "smoke"]}, "1 images but 2 prompts"),
        ({"timesteps": [1000]}, r"0\.\.999"),
        ({"timesteps": []}, "give one or more"),
        ({"timesteps": 0.5}, "give one or more"),
        ({"timesteps": "all"}, "give one or more"),
        ({"batch": 0}, "batch=1 or more"),
        ({"batch": 1.5}, "batch=1 or more"),
        ({"prompt": 3}, "one prompt per image, as text"),
        ({"generator": 7}, r"give a torch\.Generator, for example attnlab\.seed\(7\)"),
        ({"image": np.zeros((0, 64, 3))}, r"float64 \(0, 64, 3\)"),
        ({"image": None}, "an image is a path, PIL's, or .* not object"),
        ({"image": np.zeros((3, 64, 3))}, r"images of 3 x 64 pixels: .*resize\(\(64, 4\)\)"),
        ({"image": np.zeros((480, 640, 3))}, r"was trained on 64 x 64, and takes 4 to 256 .*resize\(\(64, 48\)\)"),
        ({"image": [], "prompt": []}, "give at least one image"),
        ({"image": np.zeros((64, 64, 3), int)}, "int64"),
        ({"image": np.zeros((64, 64))}, r"float64 \(64, 64\)"),
        ({"image": np.full((64, 64, 3), 255.0)}, r"in 255\.\.255"),
        ({"image": [np.zeros((64, 64, 3)), np.zeros((64, 96, 3))], "prompt": ["a", "b"]}, "several sizes"),
    ],
)
def test_wrong_input_is_named(pipe, image, arguments, message):
    with pytest.raises(ValueError, match=message):
        al.record_image(pipe, **{"image": image, "prompt": "a car"} | arguments)


def test_all_that_can_be_kept(levels, image):
    """Sums, streamed texts and self-attention of a picture, equal to what kept queries give."""
    call = {"timesteps": [100, 400], "generator": al.seed(3)}
    whole = al.record_image(levels, image, "a car", **call)
    kept = {"keep": "sum", "texts": "smoke", "self_attention": 8}
    some = al.record_image(levels, image, "a car", **{**call, "generator": al.seed(3)}, **kept)
    np.testing.assert_allclose(al.ovam(some, "smoke").values, al.ovam(whole, "smoke").values, atol=1e-5)
    np.testing.assert_allclose(al.linear_daam(some).matrix, al.linear_daam(whole).matrix, atol=1e-5)
    assert some.self_attention()[1] == (8, 8) and not some.trace.queries
