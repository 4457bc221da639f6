"""Whose call of a denoiser is recorded, what the parts of its batch are, and which keys it really used."""

import weakref

import numpy as np
import pytest
import torch
from conftest import PROMPT, PlainAttention
from diffusers import (
    DDIMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPanoramaPipeline,
    StableDiffusionPipeline,
    StableDiffusionSAGPipeline,
)
from diffusers.models.attention_processor import CustomDiffusionAttnProcessor
from PIL import Image
from test_recording import clone

import attnlab as al


@pytest.fixture
def own(pipe):
    """A pipeline with a denoiser and a scheduler of its own."""
    return owned(pipe)


@pytest.fixture
def deep(levels):
    """The same of one with attention in its middle block."""
    return owned(levels)


def owned(pipe):
    other = clone(pipe)
    other.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="leading", clip_sample=False)
    other.set_progress_bar_config(disable=True)
    return other


def another(kind, pipe, **parts):
    """A pipeline of another kind that shares its parts."""
    shared = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    other = kind(**{**shared, "requires_safety_checker": False, **parts})
    other.set_progress_bar_config(disable=True)
    return other


def img2img(pipe, guidance, prompts=("a red car",)):
    call = {"strength": 0.5, "num_inference_steps": 4, "guidance_scale": guidance, "output_type": "latent"}
    return pipe(list(prompts), image=[Image.new("RGB", (64, 64), "red")] * len(prompts), generator=al.seed(0), **call)


@torch.no_grad()
def loop(pipe, prompts, guidance=4.0, steps=3, seed=7):
    """Generate by a loop of one's own, as tutorials do."""
    text, negative = pipe.encode_prompt(prompts, pipe.device, 1, True)
    latents = torch.randn(len(text), 4, 16, 16, generator=al.seed(seed))
    pipe.scheduler.set_timesteps(steps)
    for t in pipe.scheduler.timesteps:
        both = pipe.unet(torch.cat([latents] * 2), t, encoder_hidden_states=torch.cat([negative, text])).sample
        without, found = both.chunk(2)
        latents = pipe.scheduler.step(without + guidance * (found - without), t, latents).prev_sample
    return latents


@pytest.mark.parametrize("first, then", [(1.0, 4.0), (4.0, 1.0)])
def test_another_pipeline_that_shares_the_denoiser_is_refused(own, generate, first, then):
    """What the recorded pipeline says of its guidance is about its own latest call, and these have another."""
    other = another(StableDiffusionImg2ImgPipeline, own)
    generate(pipe=own, guidance=first, steps=1)
    with pytest.raises(ValueError, match="something else than StableDiffusionPipeline itself"), al.record(own):
        img2img(other, then)
    with pytest.raises(ValueError, match="something else"), al.record(own):  # nor one of the same class
        generate(pipe=another(StableDiffusionPipeline, own), guidance=then, steps=1)
    with al.record(other) as recording:  # and it can be recorded itself
        img2img(other, then, ("a red car", "two trees"))
    assert [one.prompt for one in recording] == ["a red car", "two trees"]


def test_a_loop_names_the_parts_of_its_batch(own, generate):
    """Maps of one's own loop are those of the pipeline, which does the same."""
    for prompts in ([PROMPT], ["a red car", "two trees"]):
        with al.record(own, parts=("negative", "conditional")) as recording:
            latents = loop(own, prompts)
        noise = torch.randn(len(prompts), 4, 16, 16, generator=al.seed(7))
        with al.record(own) as expected:
            assert torch.equal(generate(prompts, pipe=own, steps=3, latents=noise), latents)
        for found, right in zip(recording, expected, strict=True):
            np.testing.assert_array_equal(al.daam(found).values, al.daam(right).values)
            assert found.prompt == right.prompt and found.trace.timesteps == right.trace.timesteps
    with al.record(own, parts=("negative", "conditional"), branch="negative") as recording:
        loop(own, [PROMPT])
    assert recording.trace.words == []


def test_a_loop_without_names_is_refused_whatever_ran_before(own, generate):
    for guidance in (1.0, 4.0):
        generate(pipe=own, guidance=guidance, steps=1)
        with pytest.raises(ValueError, match=r"record\(pipe, parts="), al.record(own):
            loop(own, [PROMPT])


@pytest.mark.parametrize("kept", [{"keep": "sum"}, {"agreement": 8, "steps": [0]}])
def test_a_step_of_training_is_held_by_nothing_once_it_has_ended(own, kept):
    """What a graph keeps for its gradients takes far more memory than all that is recorded."""

    def watch(module, args, output):
        def pass_on(gradient):
            return gradient

        held.add(pass_on)
        output.register_hook(pass_on)  # which the graph holds, and nothing else

    held, text = weakref.WeakSet(), own.encode_prompt(PROMPT, own.device, 1, False)[0].detach()
    own.unet.requires_grad_()
    for name, module in own.unet.named_modules():
        if name.endswith(("to_q", "to_k")):
            module.register_forward_hook(watch)
    with al.record(own, parts=("conditional",), **kept) as recording:
        for timestep in (700, 500):
            noise = own.unet(torch.zeros(1, 4, 16, 16), timestep, text).sample
            assert held
            del noise
            assert not held
    assert recording.trace.generation.ran == 2


def test_what_checkpointing_runs_once_more_is_of_no_step(own):
    """In the backward pass the layers are met again."""
    text, found = own.encode_prompt(PROMPT, own.device, 1, False)[0].detach(), []
    own.unet.requires_grad_().train()
    for checkpointing in (False, True):
        if checkpointing:
            own.unet.enable_gradient_checkpointing()
        with al.record(own, parts=("conditional",), self_attention=16) as recording:
            for timestep in (700, 500):
                own.unet(torch.ones(1, 4, 16, 16), timestep, text).sample.square().mean().backward()
        found.append(recording)
    for one, other in zip(*(recording.trace.queries.values() for recording in found), strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(*(recording.self_attention()[0] for recording in found))


def test_images_of_a_loop_are_told_apart(own):
    """By text, by number and size of images, and by a return to the first timestep: nothing sets the schedule anew."""
    texts = {p: own.encode_prompt(p, own.device, 1, False)[0] for p in ("a red car", "two trees")}
    shapes = {"plain": (1, 4, 16, 16), "wide": (1, 4, 8, 24), "two": (2, 4, 16, 16)}
    car, trees = texts
    ran = [(car, "plain", (500, 500, 300)), (trees, "plain", (400, 200)), (trees, "plain", (400, 200))]
    ran += [(trees, "wide", (350, 150)), (trees, "two", (340, 140))]
    with torch.no_grad(), al.record(own, parts=["conditional"]) as recording:
        for prompt, shape, timesteps in ran:
            for t in timesteps:
                own.unet(torch.zeros(shapes[shape]), t, texts[prompt].expand(shapes[shape][0], -1, -1))
    assert [t.generation.latent_size for t in recording.traces] == [(16, 16)] * 3 + [(8, 24)] + [(16, 16)] * 2
    assert [tuple(t.timesteps) for t in recording.traces] == [one[2] for one in ran] + [ran[-1][2]]
    assert torch.equal(recording.traces[1].text, texts[trees][0])


def test_a_negative_text_of_its_own_at_every_step_begins_no_image(own):
    """As null-text inversion finds one; the words of the recorded part stay the same."""
    text, negative = own.encode_prompt(PROMPT, own.device, 1, True)
    for branch, images in (("conditional", 1), ("negative", 3)):
        with torch.no_grad(), al.record(own, parts=("negative", "conditional"), branch=branch) as recording:
            for k, t in enumerate((700, 500, 300)):
                own.unet(torch.zeros(2, 4, 16, 16), t, torch.cat([negative + k, text]))
        assert len(recording) == images


def test_noise_that_overflowed_is_named_as_what_it_is(own, generate):
    """NaN differs from itself, yet both parts of the batch are the same image."""
    with al.record(own) as recording:
        generate(pipe=own, steps=1, latents=torch.full((1, 4, 16, 16), torch.nan))
    with pytest.raises(ValueError, match="NaN or infinity"):
        al.daam(recording)


def test_a_callback_may_not_call_the_denoiser(own, generate):
    def look(pipe, step, timestep, kwargs):
        pipe.unet(torch.zeros(2, 4, 16, 16), timestep, torch.zeros(2, 48, 128))
        return kwargs

    with pytest.raises(ValueError, match="called by something else"), al.record(own):
        generate(pipe=own, callback_on_step_end=look)


def test_a_subclass_of_the_users_is_the_pipeline_itself(own, generate):
    class Mine(StableDiffusionPipeline):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    mine = another(Mine, own)
    with al.record(mine) as recording:
        generate(pipe=mine)
    assert recording.prompt == PROMPT and recording.complete


def test_a_call_that_does_not_hold_what_guidance_says(own, deep):
    """As self-attention guidance, which calls the denoiser once more without the conditional part."""

    class Guided(StableDiffusionPipeline):
        def __call__(self, prompt, **call):
            images = super().__call__(prompt, **call)
            self.unet(torch.randn(len(prompt), 4, 16, 16), 1, torch.zeros(len(prompt), 48, 128))
            return images

    guided = another(Guided, own)
    for prompts, refused in ((["a red car", "two trees"], "do not hold the same images"), (["smoke"], "not divide")):
        with pytest.raises(ValueError, match=refused), al.record(guided):
            guided(prompts, num_inference_steps=1, output_type="latent")
    sag = another(StableDiffusionSAGPipeline, deep)  # it guides by the middle block
    with pytest.raises(TypeError, match=r"does not say how it guides.* record\(pipe, parts="), al.record(sag):
        sag("a red car", num_inference_steps=1)


def test_parts_of_other_words_than_the_prompts(own, generate):
    """As LEDITS++, whose parts behind the negative one are concepts to edit; three would look like two images."""
    own.enabled_editing_prompts = 3
    with pytest.raises(TypeError, match=r"record\(pipe, parts="), al.record(own):
        generate(pipe=own, steps=1)


def test_a_panorama_is_refused_at_its_second_step(own):
    panorama, calls = another(StableDiffusionPanoramaPipeline, own), []
    handle = panorama.unet.register_forward_hook(lambda *call: calls.append(1))
    call = {"height": 64, "width": 640, "num_inference_steps": 3, "output_type": "latent", "generator": al.seed(0)}
    with pytest.raises(ValueError, match="panorama"), al.record(panorama):
        panorama("a red car", **call)
    handle.remove()
    assert len(calls) == len(panorama.get_views(64, 640, circular_padding=False)) > 1  # those of the first step alone


@pytest.mark.parametrize("parts", ["conditional", ("left", "right"), (), ("negative",)])
def test_parts_that_are_none(own, parts):
    with pytest.raises(ValueError, match="name every part of a batch in order, conditional among them"):
        al.record(own, parts=parts).__enter__()


class TestKeys:
    def test_keys_of_the_processors_own_are_refused(self, own, generate):
        """Custom Diffusion trains keys beside to_k; maps of to_k's keys would be of another model."""
        layers = {n: m for n, m in own.unet.named_modules() if n.endswith("attn2")}
        for attention in layers.values():
            with torch.random.fork_rng():
                processor = CustomDiffusionAttnProcessor(
                    True, False, attention.to_q.in_features, attention.to_k.in_features
                )
            attention.set_processor(processor)
        with pytest.raises(RuntimeError, match=rf"{len(layers)} of {len(layers)} cross-attentions .* keys of its own"):
            with al.record(own):
                generate(pipe=own)

    def test_keys_of_another_text_are_refused(self, own, generate):
        class Other:
            def __call__(self, attn, hidden_states, encoder_hidden_states=None, **kwargs):
                attn.to_q(hidden_states), attn.to_k(encoder_hidden_states.flip(1))
                return hidden_states

        own.unet.up_blocks[2].attentions[0].transformer_blocks[0].attn2.set_processor(Other())
        with pytest.raises(RuntimeError, match=r"1 of 3 cross-attentions .* up_blocks\.2"), al.record(own):
            generate(pipe=own)

    def test_a_processor_may_ask_keys_first(self, own, generate):
        class KeysFirst(PlainAttention):
            def __call__(self, attn, hidden_states, encoder_hidden_states=None, **kwargs):
                text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
                k, v, q = attn.to_k(text), attn.to_v(text), attn.to_q(hidden_states)
                q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2).double() for x in (q, k, v))
                self.store.append((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1))
                mixed = (self.store[-1] @ v).transpose(1, 2).flatten(2).to(hidden_states.dtype)
                return attn.to_out[1](attn.to_out[0](mixed))

        block = own.unet.up_blocks[2].attentions[0].transformer_blocks[0]
        stores = [], []
        for attention, store in zip((block.attn1, block.attn2), stores, strict=True):
            attention.set_processor(KeysFirst(store))
        with al.record(own, layers=["up_blocks.2"], self_attention=16) as recording:
            generate(pipe=own, steps=2)
        found = torch.from_numpy(al.daam(recording, layers=["up_blocks.2.attentions.0"]).values).flatten(1).T.double()
        expected = sum(p[1] for p in stores[1]).mean(0) / 2
        torch.testing.assert_close(found, expected[:, : found.shape[1]], atol=1e-5, rtol=0)

    def test_weights_that_change_during_a_generation(self, own, generate):
        """As a LoRA that a callback switches: what was copied of the first step is wrong for the later ones."""
        attention = own.unet.up_blocks[2].attentions[0].transformer_blocks[0].attn2

        def switch(pipe, step, timestep, kwargs):
            if step == 1:
                attention.to_k.weight.data *= 1.5
            return kwargs

        before = attention.to_k.weight.clone()
        with pytest.raises(RuntimeError, match=r"up_blocks\.2.*change at step 2.*steps=range\(2\)"), al.record(own):
            generate(pipe=own, callback_on_step_end=switch)
        attention.to_k.weight.data.copy_(before)
        with al.record(own, steps=range(2)):
            generate(pipe=own, callback_on_step_end=switch)

    def test_self_attention_to_other_images_is_refused(self, own, generate):
        """Processors that share keys between images, for consistent characters for example."""

        class Shared:
            def __call__(self, attn, hidden_states, encoder_hidden_states=None, **kwargs):
                attn.to_q(hidden_states), attn.to_k(hidden_states[:1].expand_as(hidden_states))
                return hidden_states

        own.unet.up_blocks[2].attentions[0].transformer_blocks[0].attn1.set_processor(Shared())
        with pytest.raises(RuntimeError, match="1 of 3 self-attentions"), al.record(own, self_attention=16):
            generate(pipe=own)
        with al.record(own):  # its cross-attention is as ever
            generate(pipe=own, steps=1)

    def test_layers_that_are_left_out_on_the_way(self, deep, generate):
        """As DeepCache does: at some steps a block gives again what it gave before."""
        block, kept = deep.unet.mid_block, []
        forward = block.forward

        def cached(*args, **kwargs):
            kept.append(forward(*args, **kwargs) if not kept else kept[-1])
            return kept[-1]

        block.forward = cached
        with pytest.raises(RuntimeError, match=r"1 of 7 .* mid_block.*DeepCache"), al.record(deep, layers="all"):
            generate(pipe=deep)
        kept.clear()
        with pytest.raises(RuntimeError, match=r"1 of 7 self-attentions"), al.record(deep, self_attention=16):
            generate(pipe=deep)
        kept.clear()
        with al.record(deep, layers="up_blocks") as recording:  # those layers ran
            generate(pipe=deep)
        assert recording.complete

    def test_fused_projections(self, own, generate):
        own.fuse_qkv_projections()
        with pytest.raises(TypeError, match=r"pipe\.unfuse_qkv_projections\(\)"), al.record(own):
            pass
        own.unfuse_qkv_projections()
        with al.record(own, self_attention=16):
            generate(pipe=own, steps=1)
