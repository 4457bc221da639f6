"""Other texts beside an image, in joint attention: with the prompt nothing changes, with another text no pixel does."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import FirstBlockCacheConfig
from small_pipelines import PROMPT, SMALL
from torch.overrides import TorchFunctionMode

import attnlab as al
from attnlab.recording.adapters import JointCall

JOINT = [
    "flux", "sd3", "qwen_image", "z_image", "flux_kontext", "flux2", "chroma",
    "aura_flow", "cogview4", "lumina2", "hunyuan_image", "hidream", "kandinsky5", "deepfloyd_if",
]  # fmt: skip

ANOTHER = "a car with fire and smoke and a burning house"  # as many tokens, so that the image stands at the same places


def drawn(family, steps=2):
    pipe, call = SMALL[family]()
    pipe.set_progress_bar_config(disable=True)
    with al.record(pipe) as recording:
        pipe(**call, num_inference_steps=steps, output_type="latent", generator=al.seed(7))
    return pipe, recording[0]


class Calls(TorchFunctionMode):
    """Queries and keys of every attention of some modules, in the order in which they were computed."""

    def __init__(self, denoiser, names):
        super().__init__()
        self.denoiser, self.names = denoiser, names
        self.inside, self.met = False, []

    def __enter__(self):
        def switch(on):
            def hook(*_):
                self.inside = on

            return hook

        modules = [self.denoiser.get_submodule(name) for name in self.names]
        self.handles = [m.register_forward_pre_hook(switch(True)) for m in modules]
        self.handles += [m.register_forward_hook(switch(False)) for m in modules]
        return super().__enter__()

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()
        return super().__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention and self.inside:
            given = {**dict(zip(("query", "key"), args, strict=False)), **(kwargs or {})}
            self.met.append((given["query"].clone(), given["key"].clone()))
        return output


def among(rows, tokens):
    """Number of rows (token, ...) of one tensor that stand, the same to the last bit, among those of another."""
    known = {row.numpy().tobytes() for row in tokens}
    return sum(row.numpy().tobytes() in known for row in rows)


@pytest.mark.parametrize("family", JOINT)
def test_the_prompt_itself_has_the_same_maps_and_another_text_leaves_every_pixel(family):
    pipe, recording = drawn(family)
    again = al.record_again(pipe, recording, text=PROMPT)
    np.testing.assert_array_equal(al.daam(again).values, al.daam(recording).values)
    assert again.words == recording.words

    names = list(recording.trace.sizes)
    denoiser = getattr(pipe, "transformer", None) or pipe.unet
    with Calls(denoiser, names) as calls:
        other = al.record_again(pipe, recording, text=ANOTHER, steps=[1], layers="all")
    assert [word.text for word in other.words] == ANOTHER.split() and other.trace.steps == [1]
    half = len(calls.met) // 2  # the real call, then the one with the other text
    assert len(calls.met) == 2 * half >= 2
    pixels = recording.trace.sizes[names[0]][0] * recording.trace.sizes[names[0]][1]
    for (query, key), (query_2, key_2) in zip(calls.met[:half], calls.met[half:], strict=True):
        row = len(query) - 1
        one, two = (x[row].transpose(0, 1).flatten(1) for x in (query, query_2))
        assert among(one, two) >= pixels  # every pixel asks as it did
        one, two = (x[row].transpose(0, 1).flatten(1) for x in (key, key_2))
        assert among(one, two) < min(len(one), len(two))  # and some of what it meets is new
    found = al.daam(other)["smoke"]
    assert found.shape == recording.trace.sizes[names[0]] and np.ptp(found) > 0


def test_a_text_of_cross_attention_is_asked_by_ovam():
    pipe, call = SMALL["pixart_sigma"]()
    pipe.set_progress_bar_config(disable=True)
    with al.record(pipe, keep="calls") as recording:
        pipe(**call, num_inference_steps=1, output_type="latent", generator=al.seed(7))
    with pytest.raises(ValueError, match=r"answers for any text: ovam\(recording, text\)"):
        al.record_again(pipe, recording, text=ANOTHER)


def test_a_pipeline_that_reads_no_text_without_an_image():
    pipe, recording = drawn("flux_fill", steps=1)
    with pytest.raises(ValueError, match="FluxFillPipeline reads no text without an image"):
        al.record_again(pipe, recording, text=ANOTHER)


def test_where_the_image_hears_of_the_text_by_its_time():
    pipe, recording = drawn("lumina_next", steps=1)
    with pytest.raises(TypeError, match="LuminaNextDiT2DModel tells the time by the text"):
        al.record_again(pipe, recording, text=ANOTHER)


def test_no_hook_is_left_where_a_block_fails():
    pipe, recording = drawn("flux")

    def fail(*_):
        raise RuntimeError("no more")

    handle = pipe.transformer.single_transformer_blocks[0].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="no more"):
        al.record_again(pipe, recording, text=ANOTHER)
    handle.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipe.transformer.modules())
    assert torch.overrides._get_current_function_mode_stack() == []


def test_each_of_several_images_and_branches_is_asked_again_for_itself():
    pipe, call = SMALL["sd3"]()
    pipe.set_progress_bar_config(disable=True)
    prompts = {"prompt": ["a red tree", "smoke"], "negative_prompt": ["a car", "fire"]}
    with al.record(pipe, branch="both") as recording:
        pipe(**{**call, **prompts}, num_inference_steps=2, output_type="latent", generator=al.seed(7))
    assert [one.prompt for one in recording] == ["a red tree", "smoke", "a car", "fire"]
    for one in recording:
        again = al.record_again(pipe, one, text=one.prompt)
        np.testing.assert_array_equal(al.daam(again).values, al.daam(one).values)
        assert again.metadata["branch"] == one.metadata["branch"]


@pytest.fixture(scope="module")
def flux():
    return drawn("flux")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": ["a", "b"]}, r"text=\['a', 'b'\]: give one text"),
        ({"text": " "}, "text=' ': give one text"),
        ({"text": "a red tree and smoke " * 30}, "the model reads no word from 'and' on: 127 of this text are lost"),
        ({"steps": [5]}, r"steps=\[5\] cannot be chosen; recorded: \[0, 1\]"),
        ({"steps": []}, r"steps=\[\] cannot be chosen"),
    ],
)
def test_what_cannot_be_asked_again(flux, change, message):
    pipe, recording = flux
    with pytest.raises(ValueError, match=message):
        al.record_again(pipe, recording, **change)


def test_another_pipeline_is_told(flux):
    with pytest.raises(ValueError, match=r"from a FluxTransformer2DModel in .*, the pipeline has a SD3Transformer2D"):
        al.record_again(SMALL["sd3"]()[0], flux[1])


def test_another_type_of_weights_is_told():
    pipe, recording = drawn("sd3", steps=1)
    with pytest.raises(
        ValueError, match=r"in torch.float32, the pipeline has a SD3Transformer2DModel in torch.bfloat16"
    ):
        al.record_again(pipe.to(torch.bfloat16), recording)


def test_a_cache_of_steps_is_told():
    pipe, recording = drawn("flux", steps=1)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    with pytest.raises(ValueError, match=r"pipe.transformer.disable_cache\(\) first"):
        al.record_again(pipe, recording)


def test_a_prompt_of_embeddings_is_recorded_by_its_calls():
    """Their words are not known, but what the denoiser was called with answers for any text."""
    pipe, call = SMALL["flux_distilled"]()
    pipe.set_progress_bar_config(disable=True)
    said, text = call.pop("prompt"), {"max_sequence_length": call["max_sequence_length"]}
    embeddings, pooled, _ = pipe.encode_prompt(said, None, **text)
    call |= {"prompt_embeds": embeddings, "pooled_prompt_embeds": pooled, "num_inference_steps": 2}
    with pytest.raises(ValueError, match=r"give the prompt as text, or record\(pipe, keep='calls'"), al.record(pipe):
        pipe(**call, output_type="latent", generator=al.seed(7))
    with al.record(pipe, keep="calls") as recording:
        pipe(**call, output_type="latent", generator=al.seed(7))
    again = al.record_again(pipe, recording, text=said)
    with al.record(pipe) as whole:
        call = {name: value for name, value in call.items() if "embeds" not in name}
        pipe(said, **call, output_type="latent", generator=al.seed(7))
    np.testing.assert_array_equal(al.daam(again).values, al.daam(whole).values)


def test_an_existing_image_by_either_share():
    pipe, _ = SMALL["flux"]()
    pipe.set_progress_bar_config(disable=True)
    image = np.random.default_rng(0).random((32, 48, 3), dtype=np.float32)
    maps = [
        al.daam(al.record_image(pipe, image, PROMPT, timesteps=400, share=share, generator=al.seed(3))).values
        for share in ("text", "joint")
    ]
    assert (maps[1] < maps[0]).all() and maps[1].min() > 0, "of all attention less than of that to the text"


def test_a_template_has_no_word_of_a_text():
    pipe, recording = drawn("qwen_image", steps=1)
    with pytest.raises(ValueError, match="the tokenizer finds no word in it"):
        al.record_again(pipe, recording, text="<|im_end|>")


@pytest.mark.parametrize("asked", [{"heads": 0}, {"heads": [0]}, {"per": "head"}])
def test_heads_are_averaged_and_not_to_be_had(flux, asked):
    with pytest.raises(ValueError, match="the mean over heads: leave heads= and per='head' out"):
        al.daam(flux[1], **asked)


def test_layers_that_were_recorded_are_asked_again():
    pipe, call = SMALL["flux"]()
    pipe.set_progress_bar_config(disable=True)
    with al.record(pipe, layers="single_transformer_blocks") as recording:
        pipe(**call, num_inference_steps=2, output_type="latent", generator=al.seed(7))
    again = al.record_again(pipe, recording)
    assert list(again.trace.sizes) == list(recording.trace.sizes)
    np.testing.assert_array_equal(al.daam(again).values, al.daam(recording).values)


def test_a_file_says_how_another_text_is_asked(flux, tmp_path):
    again = al.Recording.load(flux[1].save(tmp_path / "flux"))
    again.encoder = None  # as of a pipeline without a name
    with pytest.raises(ValueError, match=r"record_again\(pipe, recording, texts='tree'\)"):
        al.ovam(again, "tree")


def test_a_prompt_that_does_not_fit_is_told():
    pipe, call = SMALL["flux"]()
    pipe.set_progress_bar_config(disable=True)
    call["prompt"] = "a red tree and smoke " * 9
    with (
        pytest.warns(UserWarning, match="does not fit the model's window: it was read up to"),
        al.record(pipe) as found,
    ):
        pipe(**call, num_inference_steps=1, output_type="latent", generator=al.seed(7))
    assert 0 < len(found.words) < 45


def test_shares_in_half_precision_are_means_in_float32():
    """Each head's share is rounded to eight bits, their mean is not."""
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 64, 40, 16, generator=generator).bfloat16()
    call = JointCall(query, key, None, 0.25, [slice(10, 40)], [slice(0, 10)])
    exact = (query[0].double() @ key[0].double().mT * 0.25).softmax(-1)[:, 10:, :10].mean(0).mT
    assert ((call.shares(0, "joint").double() - exact).abs() / exact).max() < 2e-3
