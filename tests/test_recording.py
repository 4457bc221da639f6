"""Recording: the image is untouched, the right half and rows are kept, nothing is left behind."""

import contextlib
import weakref
from functools import partial

import accelerate
import numpy as np
import pytest
import torch
from conftest import PROMPT, count_hooks
from diffusers import (
    DDIMInverseScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
)
from diffusers.models.attention_processor import Attention
from peft import LoraConfig
from PIL import Image
from torch.multiprocessing.reductions import StorageWeakRef

import attnlab as al
from attnlab.recording import current, stores
from attnlab.recording.adapters import Adapter
from attnlab.recording.layers import Layer, choose_layers
from experiments.gpu_check import Operations

LAYERS = 3  # cross-attention layers of the bundled model's down and up blocks


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
        assert count_hooks(pipe) == 2 + 3 * LAYERS + 1  # denoiser, its cross-attentions, text encoder
        generate()
    assert count_hooks(pipe) == 0


def test_what_is_recorded(pipe, recording):
    assert recording.prompt == PROMPT
    assert len(recording.trace.queries) == LAYERS and not any("mid_block" in name for name in recording.trace.queries)
    assert recording.trace.steps == [0, 1, 2, 3]
    assert recording.trace.timesteps == pipe.scheduler.timesteps.tolist()
    assert recording.complete
    widths = {name: layer.weight.shape[0] for name, layer in recording.trace.layers.items()}
    queries = sum(4 * h * w * widths[name] for name, (h, w) in recording.trace.sizes.items())
    tokens, wide = pipe.tokenizer.model_max_length, pipe.unet.config.cross_attention_dim
    weights = sum(width * (2 * wide + width) for width in widths.values())  # of keys, values and outputs
    assert recording.nbytes == 4 * (queries + weights + tokens * wide)  # float32
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


def test_not_square(levels, generate):
    with al.record(levels) as recording:
        latents = generate(pipe=levels, height=64, width=96)
    assert latents.shape[-2:] == (16, 24)
    assert set(recording.trace.sizes.values()) == {(16, 24), (8, 12)}
    assert al.daam(recording)["smoke"].shape == (16, 24)


def test_odd_sizes_round_up():
    assert Adapter.grid(None, 9 * 12, (65, 93)) == (9, 12)
    with pytest.raises(RuntimeError, match="does not fit"):
        Adapter.grid(None, 7, (16, 16))


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


def test_selection(levels, generate):
    with al.record(levels, layers=16, steps=[1, 3], dtype=torch.float16) as recording:
        generate(pipe=levels)
    assert set(recording.trace.sizes.values()) == {(16, 16)} and recording.trace.steps == [1, 3]
    assert {q.dtype for qs in recording.trace.queries.values() for q in qs} == {torch.float16}
    with al.record(levels) as usual:
        generate(pipe=levels)
    assert len(usual.trace.queries) == 6 and not any("mid_block" in name for name in usual.trace.queries)
    with al.record(levels, layers="all") as everything:
        generate(pipe=levels)
    assert len(everything.trace.queries) == 7
    with al.record(levels, layers=["mid_block", "up_blocks.1"]) as some:
        generate(pipe=levels)
    assert {name.split(".")[0] for name in some.trace.queries} == {"mid_block", "up_blocks"}


def test_half_precision_queries(pipe, generate, recording):
    with al.record(pipe, dtype=torch.float16) as half:
        generate()
    held = [sum(q.nbytes for qs in r.trace.queries.values() for q in qs) for r in (half, recording)]
    assert held[0] * 2 == held[1]
    full = al.daam(recording).values
    assert abs(al.daam(half).values - full).max() <= 2e-3 * full.max()


def test_only_the_kept_half_stays_in_memory(recording):
    kept = [q for queries in recording.trace.queries.values() for q in queries]
    storages = {q.untyped_storage().data_ptr(): q.untyped_storage().nbytes() for q in kept}
    assert sum(storages.values()) == sum(q.nbytes for q in kept)


@pytest.mark.parametrize("keep", ["queries", "sum", "maps", "contributions"])
def test_layers_that_were_not_chosen_do_not_stay_in_memory(levels, generate, keep):
    """All are taken together in the first step, those of one size by the same operations."""
    with al.record(levels, keep=keep, layers="down_blocks.1") as recording:
        generate(pipe=levels, steps=2)
    kept = list(recording.trace.tensors())
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    assert sum(storages.values()) == sum(x.nbytes for x in kept)


@pytest.mark.parametrize("keep", ["queries", "sum", "maps", "contributions"])
def test_layers_that_wait_for_one_another(pipe, generate, monkeypatch, keep):
    """What is taken of all layers at once is what is taken of each."""
    found = []
    for room in (2**40, 0):
        monkeypatch.setattr(current, "_WAITING", room)
        with al.record(pipe, keep=keep, branch="both", texts="a tree" if keep == "maps" else ()) as recording:
            generate()
        found.append(recording)
    for one, other in zip(*(both.traces for both in found), strict=True):
        assert one.queries.keys() == other.queries.keys()
        for name, queries in one.queries.items():
            assert all(map(torch.equal, queries, other.queries[name]))
        for sums, others in zip(one.totals(), other.totals(), strict=True):
            assert sums.keys() == others.keys()
            for name, total in sums.items():
                torch.testing.assert_close(total, others[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("room", "layers"), [(2**40, LAYERS), (0, 1)])
def test_maps_of_as_many_layers_as_there_is_room_for(pipe, generate, recording, monkeypatch, room, layers):
    found, attention = [], stores.attention

    def counted(queries, *others):
        found.append(len(queries))
        return attention(queries, *others)

    monkeypatch.setattr(stores, "attention", counted)
    monkeypatch.setattr(stores, "_SCORES", room)
    with al.record(pipe, keep="maps", steps=[1, 2, 3]) as maps:
        generate()
    assert set(found) == {layers * pipe.unet.config.attention_head_dim}
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    close(al.daam(maps).values, al.daam(recording, steps=[1, 2, 3]).values)


def test_what_was_taken_holds_no_whole_batch(pipe, generate, monkeypatch):
    """Not even until the step ends: with long texts, keys of all layers take hundreds of megabytes."""
    monkeypatch.setattr(current, "_WAITING", 0)
    met, held = [], []
    modules = [m for name, m in pipe.unet.named_modules() if name.endswith(("attn2.to_q", "attn2.to_k"))]

    def meet(module, args, output):
        met.append(StorageWeakRef(output.untyped_storage()))

    keep = [module.register_forward_hook(meet) for module in modules]
    keep.append(pipe.unet.conv_out.register_forward_hook(lambda *_: held.extend(not x.expired() for x in met)))
    try:
        with al.record(pipe, keep="sum"):
            generate(steps=1)
    finally:
        for handle in keep:
            handle.remove()
    assert len(held) == len(modules) == 2 * LAYERS and not any(held)


def test_queries_that_change_in_place(pipe, generate):
    """A processor that scales its queries where they lie would change what was not yet taken.

    It is refused; in inference mode, in which torch does not count changes, nothing waits for its like.
    """
    name = next(name for name, m in pipe.unet.named_modules() if name.endswith("attn2"))
    attention = pipe.unet.get_submodule(name)
    before, given = attention.processor, []

    class Scaled:
        def __call__(self, attn, hidden_states, encoder_hidden_states, **kwargs):
            query, key, value = attn.to_q(hidden_states), *(m(encoder_hidden_states) for m in (attn.to_k, attn.to_v))
            given.append(query.clone())
            query *= 0.5
            scores = attn.get_attention_scores(*(attn.head_to_batch_dim(x) for x in (query, key)))
            return attn.to_out[0](attn.batch_to_head_dim(scores @ attn.head_to_batch_dim(value)))

    attention.set_processor(Scaled())
    try:
        with pytest.raises(RuntimeError, match=f"{name} changes its queries in place"), al.record(pipe):
            generate()
        given.clear()
        with torch.inference_mode(), al.record(pipe) as recording:
            generate(steps=1)
        assert torch.equal(recording.trace.queries[name][0], given[0][1])
    finally:
        attention.set_processor(before)


def test_operations_of_a_step_do_not_grow_with_the_layers(pipe):
    """Where a program waits for nothing, starting operations is what recording costs beside a GPU."""
    unet = type(pipe.unet).from_config({**pipe.unet.config, "layers_per_block": 10})
    deep = StableDiffusionPipeline(**{**pipe.components, "unet": unet.eval()}, requires_safety_checker=False)
    deep.set_progress_bar_config(disable=True)
    assert sum(m.is_cross_attention for m in unet.modules() if isinstance(m, Attention)) == 21

    def operations(steps, mode=contextlib.nullcontext, **kept):
        with mode(), Operations() as found, al.record(deep, **kept) if kept else contextlib.nullcontext():
            deep("a house", num_inference_steps=steps, output_type="latent")
        return found.count

    def of_a_step(**kept):  # the first one has more
        return operations(3, **kept) - operations(2, **kept)

    plain = of_a_step()
    most = {"queries": 20, "sum": 20, "maps": 20, "contributions": 60}
    assert all(0 < of_a_step(keep=keep) - plain <= count for keep, count in most.items())
    assert 0 < of_a_step(mode=torch.inference_mode, keep="maps") - of_a_step(mode=torch.inference_mode) <= most["maps"]


def test_operations_of_a_step_hardly_grow_with_the_images(pipe):
    """Maps of all images are computed together; where texts are of one length, nothing is done for each."""

    def of_a_step(prompts, **kept):
        counts = []
        for steps in (2, 3):
            with Operations() as found, al.record(pipe, **kept) if kept else contextlib.nullcontext():
                pipe(prompts, num_inference_steps=steps, output_type="latent")
            counts.append(found.count)
        return counts[1] - counts[0]

    beyond = {n: of_a_step(["a house"] * n, keep="maps") - of_a_step(["a house"] * n) for n in (1, 8)}
    assert 0 < beyond[8] <= beyond[1] + 8


@pytest.mark.parametrize("keep", ["maps", "contributions"])
def test_maps_of_several_images_are_those_of_each(pipe, keep):
    """Of prompts of different lengths, one of them empty, and of both halves of the batch."""
    prompts = ["a burning house with fire and smoke", "a tree", "", "a red car"]
    call = {"num_inference_steps": 2, "output_type": "latent", "negative_prompt": [*"abcd"]}
    found = []
    for kept in (keep, "queries"):
        with al.record(pipe, keep=kept, branch="both") as recording:
            pipe(prompts, generator=[al.seed(n) for n in range(4)], **call)
        found.append(recording)
    maps = al.daam if keep == "maps" else al.contributions
    for branch in ("conditional", "negative"):
        for i in (0, 1, 3):
            one, other = (maps(both.branch(branch)[i]) for both in found)
            np.testing.assert_allclose(one.values, other.values, rtol=1e-4, atol=1e-6 * other.values.max())


def test_seed_is_noted_only_where_given(pipe, generate):
    with al.record(pipe) as unknown:
        generate()
    with al.record(pipe, generator=al.seed(7)) as known:
        generate()
        generate()  # by now the generator stands elsewhere
    with al.record(pipe, generator=[al.seed(3), al.seed(4)]) as each:
        generate(["a car", "a tree"])
    with al.record(pipe, generator=al.seed(3)) as shared:
        generate(["a car", "a tree"])
    seeds = [[t.generation.seed for t in r.traces] for r in (unknown, known, each, shared)]
    assert seeds == [[None], [7, None], [3, 4], [None, None]]
    assert isinstance(known.traces[0].generation.model, str)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_maps_are_those_of_the_models_queries_in_float32(pipe, generate, tmp_path, dtype):
    """Whatever autocast does to the model, what is computed of it here is float32; also asked for inside the block."""
    kept = {"queries": {}, "maps": {"keep": "maps", "texts": "a tree"}, "sum": {"keep": "sum"}}
    with torch.autocast("cpu", dtype):
        made = {}
        for name, options in kept.items():
            with al.record(pipe, self_attention=16, **options) as made[name]:
                generate(steps=2)
        inside = al.daam(made["queries"]).values, al.linear_daam(made["queries"])["tree"]
        inside += (al.propagate(al.daam(made["queries"]), *made["queries"].self_attention()).values,)
        made["maps"].save(tmp_path / "maps")
    full = al.daam(made["queries"])
    outside = full.values, al.linear_daam(made["queries"])["tree"]
    outside += (al.propagate(full, *made["queries"].self_attention()).values,)
    for found, expected in zip(inside, outside, strict=True):
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected)
    again = al.Recording.load(tmp_path / "maps", made["maps"].encoder)
    np.testing.assert_allclose(al.daam(again).values, full.values, atol=1e-6)
    np.testing.assert_allclose(al.ovam(again, "a tree").values, al.ovam(made["queries"], "a tree").values, atol=1e-6)
    scores = al.linear_daam(made["sum"])["tree"]
    np.testing.assert_allclose(scores, outside[1], atol=1e-3 * abs(scores).max())
    assert made["maps"].self_attention()[0].dtype == torch.float32


def test_what_is_recorded_in_inference_mode_can_be_used_outside(pipe, generate):
    with torch.inference_mode(), al.record(pipe, self_attention=16) as recording:
        generate(steps=2)
    assert not any(tensor.is_inference() for tensor in recording.trace.tensors())
    assert not any(x.is_inference() for layer in recording.trace.layers.values() for x in layer.weights.values())


def test_clip_skip(pipe, generate):
    deep, kind = clone(pipe), type(pipe.text_encoder)
    config = pipe.text_encoder.config.to_dict() | {"num_hidden_layers": 2, "initializer_factor": 10.0}
    deep.text_encoder = kind(kind.config_class.from_dict(config)).eval()
    # diffusers 0.42 looks for `text_model`, which the text encoder of transformers 5.23 no longer has
    deep.text_encoder.__dict__["text_model"] = deep.text_encoder
    with al.record(deep) as recording:
        generate(pipe=deep, clip_skip=1)
    assert recording.prompt == PROMPT
    text, whole = recording.trace.text, recording.encode(PROMPT).embedding
    assert (text - whole).norm() > 0.1 * whole.norm()  # a layer was skipped


def test_lora(pipe, generate):
    """A LoRA on queries and keys, at a scale of its own: bit-exact, and the recorded keys are those the model made."""
    tuned, made = clone(pipe), []
    tuned.unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k"], init_lora_weights="gaussian"))
    for name, parameter in tuned.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=al.seed(1))
    scaled = {"pipe": tuned, "cross_attention_kwargs": {"scale": 0.3}}
    plain = generate(**scaled)
    name = "up_blocks.2.attentions.1.transformer_blocks.0.attn2"
    handle = tuned.unet.get_submodule(name).to_k.register_forward_hook(lambda module, args, output: made.append(output))
    with al.record(tuned) as recording:
        recorded = generate(**scaled)
    handle.remove()
    assert torch.equal(plain, recorded) and not torch.equal(plain, generate())
    layer, text = recording.trace.layers[name], recording.trace.text
    expected = next(keys[1] for keys in made if keys.shape[:2] == (2, len(text)))
    torch.testing.assert_close(layer.keys(text).transpose(0, 1).flatten(1), expected, rtol=1e-4, atol=1e-5)


def test_weights_changed_between_generations(pipe, generate):
    """Each image keeps the keys it was made with; equal ones are held once."""
    changed = clone(pipe)
    name = "up_blocks.2.attentions.1.transformer_blocks.0.attn2"
    with al.record(changed) as recording:
        generate(pipe=changed)
        with torch.no_grad():
            changed.unet.get_submodule(name).to_k.weight.mul_(2)
        generate(pipe=changed)
    first, second = (trace.layers for trace in recording.traces)
    assert torch.equal(first[name].weight * 2, second[name].weight)
    assert all(first[other] is second[other] for other in first if other != name)


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


def test_weights_stored_in_fp8(pipe, generate, tmp_path):
    """Layers that are cast to float32 only while they run: the same image, the model's own keys, also from a file."""
    small = clone(pipe)
    small.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    plain = generate(pipe=small)
    with al.record(small) as recording:
        assert torch.equal(generate(pipe=small), plain) and not torch.equal(plain, generate())
    name, text = next(iter(recording.trace.layers)), recording.trace.text
    with torch.no_grad():
        made = small.unet.get_submodule(name).to_k(text)
    assert torch.equal(recording.trace.layers[name].keys(text).transpose(0, 1).flatten(1), made)
    again = al.Recording.load(recording.save(tmp_path / "fp8.safetensors"))
    assert (al.daam(again).values == al.daam(recording).values).all()


def test_callback_turns_guidance_off(pipe, generate):
    """diffusers' dynamic guidance: from step 2 on the batch has its conditional half alone. Still one image."""

    def stop_guiding(pipe, step, timestep, kwargs):
        if step == 1:
            pipe._guidance_scale = 0.0
            kwargs["prompt_embeds"] = kwargs["prompt_embeds"].chunk(2)[1]
        return kwargs

    call = {"callback_on_step_end": stop_guiding, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    plain = generate(**call)
    with al.record(pipe) as recording:
        assert torch.equal(generate(**call), plain)
    assert len(recording) == 1 and recording.trace.steps == [0, 1, 2, 3] and recording.complete
    for branch in ("negative", "both"):  # the steps that have it
        with al.record(pipe, branch=branch) as recording:
            assert torch.equal(generate(**call), plain)
        assert all(trace.steps == [0, 1] for trace in recording.traces) and recording.complete


@pytest.fixture
def scheduled(pipe, generate):
    """Generate with the prompt exchanged for "two trees" from step 2 on."""

    def swap(pipe, step, timestep, kwargs):
        if step != 1:
            return {}
        other, _ = pipe.encode_prompt("two trees", pipe.device, 1, False)
        return {"prompt_embeds": torch.cat([kwargs["prompt_embeds"][:1], other])}

    return lambda: generate(callback_on_step_end=swap, callback_on_step_end_tensor_inputs=["prompt_embeds"])


def test_a_prompt_that_changes_on_the_way(pipe, scheduled, recording, tmp_path):
    """The image is made and the queries are kept; DAAM answers for steps of one text alone."""
    plain = scheduled()
    with al.record(pipe) as whole:
        assert torch.equal(scheduled(), plain)
    whole.save(tmp_path / "file")
    for found in (whole, al.Recording.load(tmp_path / "file")):
        with pytest.raises(ValueError, match=r"the prompt changes at step 2.* ovam\(recording, text\)"):
            al.daam(found)
        for make in (al.daam, al.contributions):
            before = make(found, steps=[0, 1])
            np.testing.assert_array_equal(before.values, make(recording, steps=[0, 1]).values)
        assert al.ovam(found, "a tree")["tree"].shape == al.linear_daam(found)["tree"].shape == (16, 16)
    assert whole.trace.steps == [0, 1, 2, 3] and whole.complete


def test_steps_of_one_text_are_recorded_as_ever(pipe, scheduled, recording):
    with al.record(pipe, steps=[0, 1]) as first:
        scheduled()
    np.testing.assert_array_equal(al.daam(first).values, al.daam(recording, steps=[0, 1]).values)
    with al.record(pipe, steps=[2, 3]) as last:
        scheduled()
    text = last.encode("two trees")
    assert last.prompt == "two trees" and torch.equal(last.trace.text, text.embedding)
    assert al.daam(last)["trees"].max() > 0


@pytest.mark.parametrize("keep", ["sum", "maps"])
def test_sums_of_a_prompt_that_changes(pipe, scheduled, keep):
    with al.record(pipe, keep=keep, texts=["a tree"]) as recording:
        scheduled()
    with al.record(pipe) as queries:
        scheduled()
    with pytest.raises(ValueError, match="the prompt changes at step 2"):
        al.daam(recording)
    assert None not in recording.trace.streamed, "sums of maps of several texts are no sum"
    np.testing.assert_allclose(al.ovam(recording, "a tree").values, al.ovam(queries, "a tree").values, atol=1e-5)
    if keep == "sum":
        found, expected = (al.linear_daam(one)["tree"] for one in (recording, queries))
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3 * abs(expected).max())


def test_a_number_of_images_that_changes_is_refused(pipe, generate):
    def drop(pipe, step, timestep, kwargs):
        half = {"prompt_embeds": kwargs["prompt_embeds"][1::2], "negative_prompt_embeds": None}
        return {"latents": kwargs["latents"][1:], **half}

    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    with pytest.raises(RuntimeError, match="the number of images changed"), al.record(pipe):
        generate(["a car", "a tree"], callback_on_step_end=drop, callback_on_step_end_tensor_inputs=names)


def test_stopped_and_started_again_with_the_same_embeddings(pipe, generate):
    """`pipe._interrupt` ends a generation quietly; another one with the same text and size is another image."""

    def stop(pipe, step, timestep, kwargs):
        pipe._interrupt = step == 1
        return kwargs

    text, negative = pipe.encode_prompt(PROMPT, pipe.device, 1, True)
    with al.record(pipe) as recording:
        generate(None, prompt_embeds=text, negative_prompt_embeds=negative, callback_on_step_end=stop)
        generate(None, prompt_embeds=text, negative_prompt_embeds=negative)
        generate(None, prompt_embeds=text, negative_prompt_embeds=negative, height=96)
    assert [len(t.steps) for t in recording.traces] == [2, 4, 4] and not recording.complete
    assert recording[1].complete and recording[1:].complete and len(recording[1:]) == 2


def test_another_size_is_another_generation(pipe, generate):
    """Of a denoiser that is called from outside: nothing sets the timesteps anew."""
    with al.record(pipe, parts=["conditional"]) as recording:
        generate(guidance=1.0, steps=2)
        with torch.no_grad():
            pipe.unet(torch.zeros(1, 4, 8, 24), 500, torch.zeros(1, 48, 128))
    assert [t.generation.latent_size for t in recording.traces] == [(16, 16), (8, 24)]
    assert [t.timesteps for t in recording.traces][1] == [500]


@pytest.mark.parametrize(
    "scheduler", [DDIMInverseScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler]
)
def test_other_schedulers(pipe, generate, scheduler):
    """Rising timesteps, repeated ones, several calls a step: one generation all the same, and none of them missed."""
    other = clone(pipe)
    other.scheduler = scheduler(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012)
    with al.record(other) as recording:
        generate(pipe=other)
    assert len(recording) == 1 and recording.complete
    assert recording.trace.timesteps == [round(float(t)) for t in other.scheduler.timesteps]


def test_image_to_image_and_inpainting(pipe):
    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    picture, mask = Image.new("RGB", (64, 64), "red"), Image.new("L", (64, 64), 255)
    call = {"image": picture, "strength": 0.5, "num_inference_steps": 4, "guidance_scale": 4.0, "output_type": "latent"}
    for kind, more in ((StableDiffusionImg2ImgPipeline, {}), (StableDiffusionInpaintPipeline, {"mask_image": mask})):
        other = kind(**parts, requires_safety_checker=False)
        other.set_progress_bar_config(disable=True)
        plain = other(PROMPT, generator=al.seed(7), **call, **more).images
        with al.record(other) as recording:
            assert torch.equal(other(PROMPT, generator=al.seed(7), **call, **more).images, plain)
        assert recording.prompt == PROMPT and recording.complete and len(recording.trace.steps) == 2


def test_three_part_batches_are_told_apart(pipe):
    """InstructPix2Pix orders its batch text, image, negative, unlike the others."""
    other = clone(pipe)
    config = dict(other.unet.config) | {"in_channels": 8}
    other.unet = type(other.unet).from_config(config).eval()
    parts = {name: part for name, part in other.components.items() if name != "image_encoder"}

    class Mine(StableDiffusionInstructPix2PixPipeline):
        """A user's own variant orders its batch alike."""

    pix2pix = Mine(**parts, requires_safety_checker=False)
    pix2pix.set_progress_bar_config(disable=True)
    for branch, prompts in (("conditional", ["two trees", "smoke"]), ("negative", ["a blue car", "a road"])):
        with al.record(pix2pix, branch=branch) as recording:
            pictures = [Image.new("RGB", (64, 64))] * 2
            negative = {"negative_prompt": ["a blue car", "a road"]}
            pix2pix(["two trees", "smoke"], pictures, **negative, num_inference_steps=2, generator=al.seed(0))
        assert [recording[i].prompt for i in range(len(recording))] == prompts


def test_nothing_of_the_generation_is_held_after_the_block(pipe, generate):
    made = []
    handle = pipe.text_encoder.register_forward_hook(lambda module, args, output: made.append(weakref.ref(output[0])))
    with al.record(pipe):
        generate()
    with pytest.raises(RuntimeError) as caught, al.record(pipe):
        generate()
        raise RuntimeError("a notebook keeps the last error, and with it every frame that it passed")
    handle.remove()
    assert caught.tb and made and all(reference() is None for reference in made)


class TestRefusals:
    def test_nothing_generated(self, pipe):
        with pytest.raises(RuntimeError, match="ran no whole step inside"), al.record(pipe):
            pass

    def test_steps_that_never_occur(self, pipe, generate):
        with pytest.raises(ValueError, match=r"none of steps=\[9\] will occur: .* has 4"), al.record(pipe, steps=9):
            generate()
        with pytest.raises(RuntimeError, match=r"steps=\[9\].*ran 1 steps"), torch.no_grad():
            with al.record(pipe, steps=9, parts=["conditional"]):
                pipe.unet(torch.zeros(1, 4, 8, 24), 500, torch.zeros(1, 48, 128))
        for wrong in ([], -1, 1.5, "all", [0, None]):
            with pytest.raises(ValueError, match="give numbers of denoising steps"), al.record(pipe, steps=wrong):
                pass
        with al.record(pipe, steps=[3]) as recording:
            generate(steps=4)
            generate(steps=2)
        with pytest.raises(ValueError, match="no step of this image was recorded"):
            al.daam(recording[1])

    def test_unknown_layer(self, pipe, levels, generate):
        with pytest.raises(ValueError, match=r"no layer fits 'up_block'; layers: down_blocks\.0"):
            al.record(pipe, layers="up_block").__enter__()
        with pytest.raises(ValueError, match="chooses nothing"):
            al.record(pipe, layers=[]).__enter__()
        with pytest.raises(ValueError, match=r"map heights: \[16, 8, 4\]"), al.record(levels, layers=[32]):
            generate(pipe=levels)

    def test_branch(self, pipe, generate):
        with pytest.raises(ValueError, match="conditional, negative, both"), al.record(pipe, branch="left"):
            pass
        with pytest.raises(ValueError, match="needs guidance"), al.record(pipe, branch="negative"):
            generate(guidance=1.0)

    def test_pipelines_that_cannot_be_recorded(self, pipe):
        compiled = clone(pipe)
        compiled.unet = torch.compile(compiled.unet)
        with pytest.raises(TypeError, match="record before compiling"), al.record(compiled):
            pass
        compiled = clone(pipe)
        compiled.unet.mid_block.compile()
        with pytest.raises(TypeError, match="record before compiling"), al.record(compiled):
            pass
        projected = clone(pipe)
        projected.unet.register_to_config(encoder_hid_dim_type="image_proj")
        with pytest.raises(TypeError, match="image_proj"), al.record(projected):
            pass
        projected.text_encoder_3 = pipe.text_encoder
        with pytest.raises(TypeError, match=r"StableDiffusionPipeline .* three text encoders; supported: "):
            al.record(projected).__enter__()
        with pytest.raises(TypeError, match=r"list .* has neither a unet nor a transformer; supported"), al.record([]):
            pass

    def test_attention_that_bypasses_its_queries(self, levels, generate):
        class Bypass:
            def __call__(self, attn, hidden_states, encoder_hidden_states=None, **kwargs):
                return hidden_states

        other = clone(levels)
        other.unet.mid_block.attentions[0].transformer_blocks[0].attn2.set_processor(Bypass())
        with pytest.raises(RuntimeError, match=r"1 of 7 cross-attentions did not meet .* mid_block"), al.record(other):
            generate(pipe=other)

    def test_heights_are_refused_after_one_step(self, pipe, generate):
        """Also where only a late step is to be recorded."""
        ran = []
        handle = pipe.unet.register_forward_hook(lambda *call: ran.append(1))
        for wrong in ({"layers": 32}, {"self_attention": 32}):
            with pytest.raises(ValueError, match=r"\b32\b"), al.record(pipe, steps=[3], **wrong):
                generate()
        handle.remove()
        assert len(ran) == 2

    def test_generators_and_places(self, pipe):
        for wrong in (7, [7], "seed"):
            with pytest.raises(TypeError, match=r"for example al\.seed\(7\)"), al.record(pipe, generator=wrong):
                pass
        with pytest.raises(ValueError, match="device='nosuch'"), al.record(pipe, device="nosuch"):
            pass

    def test_twice_at_once(self, pipe, generate):
        with al.record(pipe):
            with pytest.raises(RuntimeError, match="being recorded already"), al.record(pipe):
                pass
            generate(steps=1)

    def test_dtype(self, pipe):
        for wrong in (torch.int8, "float16"):
            with pytest.raises(ValueError, match="floating-point"), al.record(pipe, dtype=wrong):
                pass

    def test_empty_recording(self, pipe, generate):
        with al.record(pipe) as recording:
            with pytest.raises(ValueError, match="nothing has been generated yet"):
                al.daam(recording)
            generate()


@pytest.mark.parametrize("kept", [partial(torch.nn.Parameter, requires_grad=False), torch.nn.Buffer])
def test_quantized_weights(kept):
    """A layer that keeps integers and works in the type of its input; torch's own has no parameters."""

    class Quantized(torch.nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.in_features, self.scale = weight.shape[1], weight.abs().max() / 127
            self.weight = kept((weight / self.scale).round().to(torch.int8))

        def forward(self, x):
            return (x.float() @ (self.weight.float() * self.scale).T).to(x.dtype)

    attention = Attention(16, cross_attention_dim=8, heads=2, dim_head=4)
    attention.to_k = Quantized(attention.to_k.weight.detach())
    text = torch.randn(5, 8, generator=al.seed(0))
    found = Layer.of("layer", attention).keys(text).transpose(0, 1).flatten(1)
    torch.testing.assert_close(found, attention.to_k(text), rtol=1e-4, atol=1e-5)


class Packed(torch.Tensor):
    """A weight that can be multiplied with, but not copied, as those of torchao."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.clone, torch.Tensor.new_zeros, torch.Tensor.float):
            raise NotImplementedError(function)
        if function is torch.nn.functional.linear:
            x, weight, *bias = (None if value is None else value.as_subclass(torch.Tensor) for value in args)
            return function(x, weight.round(decimals=1), *bias)
        return super().__torch_function__(function, types, args, kwargs or {})


def test_weights_of_a_type_of_their_own():
    attention = Attention(16, cross_attention_dim=8, heads=2, dim_head=4, bias=True)
    weight = attention.to_k.weight.detach()
    attention.to_k.weight = torch.nn.Parameter(weight.as_subclass(Packed), requires_grad=False)
    assert type(attention.to_k.weight) is Packed
    text = torch.randn(5, 8, generator=al.seed(0))
    found = Layer.of("layer", attention).keys(text).transpose(0, 1).flatten(1)
    expected = text @ weight.round(decimals=1).T + attention.to_k.bias
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_torchao(config, pipe, generate):
    """Where it is installed, which the tests do not ask for."""
    quantization = pytest.importorskip("torchao.quantization")
    small = clone(pipe)
    quantization.quantize_(small.unet, getattr(quantization, config)())
    plain = generate(pipe=small)
    with al.record(small) as recording:
        assert torch.equal(generate(pipe=small), plain)
    layers, modules = recording.trace.layers, dict(small.unet.named_modules())
    text = recording.trace.text
    for name, layer in layers.items():
        found, own = layer.keys(text).transpose(0, 1).flatten(1), modules[name].to_k(text)
        assert (found - own).norm() < 0.02 * own.norm()  # a little of it is rounding of what is multiplied
    assert np.isfinite(al.linear_daam(recording)["smoke"]).all() and (al.contributions(recording)["smoke"] > 0).all()


def test_choose_layers():
    sizes = {"down.0": (16, 24), "down.10": (8, 12), "mid_block": (4, 6)}

    def outer(name):
        return name != "mid_block"

    assert choose_layers(sizes, None, outer) == ["down.0", "down.10"]
    assert choose_layers(sizes, "all", outer) == list(sizes)
    assert choose_layers(sizes, "down.10", outer) == ["down.10"]
    assert choose_layers(sizes, ["mid_block", 16], outer) == ["down.0", "mid_block"]
    with pytest.raises(ValueError, match=r"no layer fits 'down\.1'"):
        choose_layers(sizes, "down.1", outer)
