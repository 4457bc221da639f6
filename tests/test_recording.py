"""Recording: the image is untouched, the right half and rows are kept, nothing is left behind."""

import contextlib

import accelerate
import pytest
import torch
from conftest import PROMPT, count_hooks
from diffusers import StableDiffusionPipeline
from peft import LoraConfig

import attnlab as al
from attnlab.recording import choose_layers, map_size

LAYERS = 6  # cross-attention layers of the bundled model's down and up blocks


def clone(pipe):
    """A pipeline with a denoiser of its own, for tests that change it."""
    unet = type(pipe.unet).from_config(pipe.unet.config)
    unet.load_state_dict(pipe.unet.state_dict())
    return StableDiffusionPipeline(**{**pipe.components, "unet": unet.eval()}, requires_safety_checker=False)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("prompts", [PROMPT, [PROMPT, "a red car", "two trees", "a person near water"]])
def test_image_is_bit_exact(pipe, generate, guidance, prompts):
    plain = generate(prompts, guidance=guidance)
    with al.record(pipe) as recording:
        recorded = generate(prompts, guidance=guidance)
    assert torch.equal(plain, recorded)
    assert len(recording) == (1 if isinstance(prompts, str) else 4)


def test_hooks_exist_only_inside_the_block(pipe, generate):
    with al.record(pipe):
        assert count_hooks(pipe) == 2 + (LAYERS + 1) + 1  # denoiser, its cross-attentions, text encoder
        generate()
    assert count_hooks(pipe) == 0


def test_what_is_recorded(pipe, recording):
    assert recording.prompt == PROMPT
    assert len(recording.trace.queries) == LAYERS and not any("mid_block" in name for name in recording.trace.queries)
    assert recording.trace.steps == [0, 1, 2, 3]
    assert recording.trace.timesteps == pipe.scheduler.timesteps.tolist()
    assert recording.complete
    floats = sum(4 * h * w * recording.layers[n].weight.shape[0] for n, (h, w) in recording.trace.sizes.items())
    assert recording.nbytes == 4 * floats
    assert f"{LAYERS} layers, 4 steps" in repr(recording)


def test_queries_are_those_of_the_conditional_half(pipe, generate):
    """Without guidance the batch has no other half: its first step, on the same noise, must be recorded as the same."""
    with al.record(pipe, steps=[0]) as guided:
        generate(guidance=4.0, negative_prompt="a blue car")
    with al.record(pipe, steps=[0]) as alone:
        generate(guidance=1.0)
    with al.record(pipe, steps=[0], branch="negative") as negative:
        generate(guidance=4.0, negative_prompt="a blue car")
    for name, (query,) in alone.trace.queries.items():
        torch.testing.assert_close(guided.trace.queries[name][0], query, rtol=1e-4, atol=1e-4)
        if name != next(iter(alone.trace.queries)):  # the first layer has not met the text yet
            assert (negative.trace.queries[name][0] - query).abs().max() > 1e-2
    assert negative.prompt == "a blue car"


def test_conditional_maps_do_not_depend_on_the_negative_prompt_at_the_first_step(pipe, generate):
    maps = []
    for negative in ("", "a blue car at night"):
        with al.record(pipe, steps=[0]) as recording:
            generate(negative_prompt=negative)
        maps.append(al.daam(recording)["smoke"])
    torch.testing.assert_close(*map(torch.from_numpy, maps), rtol=1e-4, atol=1e-6)


def test_every_image_of_a_batch_is_kept_apart(pipe, generate):
    """Two prompts, two images each: image i is what prompt i // 2 gives alone from the same noise."""
    prompts = ["a red car", "two trees near a house with smoke"]
    noise = torch.randn(4, 4, 16, 16, generator=al.seed(0))
    with al.record(pipe) as batch:
        generate(prompts, latents=noise, num_images_per_prompt=2)
    assert [batch[i].prompt for i in range(4)] == [prompts[0]] * 2 + [prompts[1]] * 2
    for i in (1, 2):
        with al.record(pipe) as alone:
            generate(prompts[i // 2], latents=noise[i : i + 1])
        word = ("car", "house")[i // 2]
        expected, found = al.daam(alone)[word], al.daam(batch[i])[word]
        assert abs(found - expected).max() <= 1e-3 * expected.max()
    with pytest.raises(ValueError, match="holds 4 images; choose one"):
        al.daam(batch)


def test_not_square(pipe, generate):
    with al.record(pipe) as recording:
        latents = generate(height=64, width=96)
    assert latents.shape[-2:] == (16, 24)
    assert set(recording.trace.sizes.values()) == {(16, 24), (8, 12)}
    assert al.daam(recording)["smoke"].shape == (16, 24)


def test_odd_sizes_round_up():
    assert map_size(9 * 12, (65, 93)) == (9, 12)
    with pytest.raises(RuntimeError, match="do"):
        map_size(7, (16, 16))


def test_two_generations_in_one_block(pipe, generate):
    with al.record(pipe) as recording:
        generate("a red car", steps=2)
        generate("two trees", steps=3, height=64, width=96)
    assert [recording[i].prompt for i in range(2)] == ["a red car", "two trees"]
    assert [len(recording[i].trace.steps) for i in range(2)] == [2, 3]


def test_same_embeddings_twice_are_two_generations(pipe, generate):
    text, negative = pipe.encode_prompt(PROMPT, pipe.device, 1, True)
    with al.record(pipe) as recording:
        for _ in range(2):
            generate(None, prompt_embeds=text, negative_prompt_embeds=negative)
    assert len(recording) == 2
    with pytest.raises(ValueError, match="given as embeddings"):
        _ = recording[0].words


def test_interrupted_generation(pipe, generate):
    def stop(pipe, step, timestep, kwargs):
        if step == 1:
            raise KeyboardInterrupt
        return kwargs

    with contextlib.suppress(KeyboardInterrupt), al.record(pipe) as recording:
        generate(callback_on_step_end=stop)
    assert count_hooks(pipe) == 0
    assert recording.trace.steps == [0, 1] and not recording.complete
    assert "interrupted after 2 of 4" in repr(recording)
    assert al.daam(recording)["smoke"].shape == (16, 16)
    with al.record(pipe) as again:  # nothing of it is left over
        generate()
    assert again.complete and len(again) == 1


def test_error_inside_a_step_leaves_no_half_step(pipe, generate):
    seen = []

    def fail(module, args, output):
        seen.append(1)
        if len(seen) == 3:
            raise RuntimeError("out of memory")

    handle = pipe.unet.up_blocks[1].register_forward_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="out of memory"), al.record(pipe) as recording:
            generate()
    finally:
        handle.remove()
    assert recording.trace.steps == [0, 1]
    assert {len(steps) for steps in recording.trace.queries.values()} == {2}


def test_selection(pipe, generate):
    with al.record(pipe, layers=16, steps=[1, 3], dtype=torch.float16) as recording:
        generate()
    assert set(recording.trace.sizes.values()) == {(16, 16)} and recording.trace.steps == [1, 3]
    assert {q.dtype for qs in recording.trace.queries.values() for q in qs} == {torch.float16}
    with al.record(pipe, layers="all") as everything:
        generate()
    assert len(everything.trace.queries) == LAYERS + 1
    with al.record(pipe, layers=["mid_block", "up_blocks.1"]) as some:
        generate()
    assert {name.split(".")[0] for name in some.trace.queries} == {"mid_block", "up_blocks"}


def test_half_precision_queries(pipe, generate, recording):
    with al.record(pipe, dtype=torch.float16) as half:
        generate()
    assert half.nbytes * 2 == recording.nbytes
    full = al.daam(recording).values
    assert abs(al.daam(half).values - full).max() <= 2e-3 * full.max()


def test_only_the_kept_half_stays_in_memory(recording):
    for queries in recording.trace.queries.values():
        assert all(q.untyped_storage().nbytes() == q.numel() * q.element_size() for q in queries)


def test_seed_is_noted_only_where_given(pipe, generate):
    with al.record(pipe) as unknown:
        generate()
    with al.record(pipe, generator=al.seed(7)) as known:
        generate()
    assert unknown.trace.info["seed"] is None and known.trace.info["seed"] == 7


def test_clip_skip(pipe, generate, monkeypatch):
    # diffusers 0.42 looks for `text_model`, which the text encoder of transformers 5.23 no longer has
    monkeypatch.setitem(pipe.text_encoder.__dict__, "text_model", pipe.text_encoder)
    with al.record(pipe) as recording:
        generate(clip_skip=1)
    assert recording.prompt == PROMPT


def test_lora(pipe, generate):
    """A LoRA on queries and keys: bit-exact, and the recording's keys are those of the adapted layer."""
    tuned = clone(pipe)
    tuned.unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k"], init_lora_weights="gaussian"))
    for name, parameter in tuned.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=al.seed(1))
    plain = generate(pipe=tuned)
    with al.record(tuned) as recording:
        recorded = generate(pipe=tuned)
    assert torch.equal(plain, recorded) and not torch.equal(plain, generate())
    name, layer = next(iter(recording.layers.items()))
    text = recording.trace.text
    with torch.no_grad():
        expected = tuned.unet.get_submodule(name).to_k(text)
    torch.testing.assert_close(layer.keys(text).transpose(0, 1).flatten(1), expected, rtol=1e-4, atol=1e-5)


def test_attention_slicing(pipe, generate):
    sliced = clone(pipe)
    sliced.enable_attention_slicing()
    plain = generate(pipe=sliced)
    with al.record(sliced) as recording:
        assert torch.equal(generate(pipe=sliced), plain)
    assert len(recording.trace.queries) == LAYERS


def test_offloaded_weights(pipe, generate, recording):
    """Weights that live elsewhere between calls (here: off the meta device) are read through the layer itself."""
    offloaded = clone(pipe)
    accelerate.cpu_offload(offloaded.unet, execution_device=torch.device("cpu"))
    with al.record(offloaded) as found:
        generate(pipe=offloaded)
    expected = al.daam(recording).values
    assert abs(al.daam(found).values - expected).max() <= 1e-4 * expected.max()


def test_record_image(pipe):
    image = torch.rand(64, 64, 3, generator=al.seed(0)).numpy()
    found = al.record_image(pipe, [image, image], ["a car", "smoke"], timesteps=(100, 500), generator=al.seed(0))
    again = al.record_image(pipe, [image, image], ["a car", "smoke"], timesteps=(100, 500), generator=al.seed(0))
    assert [found[i].prompt for i in range(2)] == ["a car", "smoke"]
    assert found[0].trace.timesteps == [500, 100] and found.complete
    assert (al.daam(found[1])["smoke"] == al.daam(again[1])["smoke"]).all()
    with pytest.raises(ValueError, match="1 images but 2 prompts"):
        al.record_image(pipe, image, ["a car", "smoke"])
    with pytest.raises(ValueError, match=r"0\.\.999"):
        al.record_image(pipe, image, "a car", timesteps=[1000])


class TestRefusals:
    def test_nothing_generated(self, pipe):
        with pytest.raises(RuntimeError, match="did not run inside"), al.record(pipe):
            pass

    def test_steps_that_never_occur(self, pipe, generate):
        with pytest.raises(RuntimeError, match=r"steps=\[9\].*ran 4 steps"), al.record(pipe, steps=[9]):
            generate()

    def test_unknown_layer(self, pipe, generate):
        with pytest.raises(ValueError, match=r"no layer fits 'up_block'; layers: down_blocks\.0"):
            al.record(pipe, layers="up_block").__enter__()
        with pytest.raises(ValueError, match=r"map heights: \[16, 8, 4\]"), al.record(pipe, layers=[32]):
            generate()

    def test_branch(self, pipe, generate):
        with pytest.raises(ValueError, match="conditional, negative"), al.record(pipe, branch="both"):
            pass
        with pytest.raises(ValueError, match="needs guidance"), al.record(pipe, branch="negative"):
            generate(guidance=1.0)

    def test_pipelines_that_cannot_be_recorded(self, pipe):
        compiled = clone(pipe)
        compiled.unet = torch.compile(compiled.unet)
        with pytest.raises(TypeError, match=r"before torch\.compile"), al.record(compiled):
            pass
        with pytest.raises(TypeError, match="list has no unet"), al.record([]):
            pass

    def test_empty_recording(self, pipe, generate):
        with al.record(pipe) as recording:
            with pytest.raises(ValueError, match="nothing has been generated yet"):
                al.daam(recording)
            generate()


def test_choose_layers():
    sizes = {"down.0": (16, 24), "down.10": (8, 12), "mid_block": (4, 6)}
    assert choose_layers(sizes, None) == ["down.0", "down.10"]
    assert choose_layers(sizes, "down.1" + "0") == ["down.10"]
    assert choose_layers(sizes, ["mid_block", 16]) == ["down.0", "mid_block"]
    with pytest.raises(ValueError, match=r"no layer fits 'down\.1'"):
        choose_layers(sizes, "down.1")
