"""Other texts beside an image while it is drawn, in joint attention: maps of their words, and the image as it was."""

from functools import cache

import numpy as np
import pytest
import torch
from diffusers import FirstBlockCacheConfig
from small_pipelines import OTHER, PROMPT, checks
from small_pipelines.checks import Family, close
from test_pinned import ANOTHER, JOINT, Calls, among

import attnlab as al

family_of = cache(Family)
HALVES = ("sd3", "z_image", "aura_flow", "hidream", "deepfloyd_if")  # guided by two halves of one batch
ONE_STEP = {"num_inference_steps": 1}


@pytest.fixture(params=JOINT)
def family(request):
    """A small pipeline with joint attention, or with texts that change from step to step."""
    return family_of(request.param)


def heard_with(family, text, change, names):
    """Record a step with a text; return the recording, and queries and keys of each layer, of the prompt and the text.

    They are (token, ...), each a pair of those of the prompt's call and of the text's.
    """
    found = []
    with Calls(family.denoiser, names) as calls, al.record(family.pipe, texts=[text], layers="all") as recording:
        family.generate(**change)
    met = calls.met[: 2 * len(names)]  # behind them may be those of guidance
    for one, two in zip(met[: len(names)], met[len(names) :], strict=True):
        found.append([[x[0].transpose(0, 1).flatten(1) for x in pair] for pair in zip(one, two, strict=True)])
    return recording[0], found


def test_the_prompt_beside_its_own_image_and_another_text(family):
    """All is the same to the last bit; with another text no pixel asks otherwise, and every layer meets other keys.

    Without guidance by halves of a batch: one half alone is rounded otherwise than both.
    """
    change = ONE_STEP | ({"guidance_scale": 0.0} if family.name in HALVES else {})
    plain, before = family.generate(**change), checks.count_hooks(family.pipe)
    with al.record(family.pipe, texts=[PROMPT], layers="all") as same:
        assert torch.equal(family.generate(**change), plain)
    assert checks.count_hooks(family.pipe) == before and not checks.function_modes()
    trace = same[0].trace
    names = list(trace.sizes)
    _, heard = heard_with(family, PROMPT, change, names)
    assert all(torch.equal(*queries) and torch.equal(*keys) for queries, keys in heard)
    assert trace.beside[PROMPT].words == trace.words

    recording, heard = heard_with(family, ANOTHER, change, names)
    rows, columns = trace.sizes[names[0]]
    for queries, keys in heard:
        assert among(*queries) >= rows * columns
        assert among(*keys) < min(map(len, keys))
    found = al.ovam(recording, ANOTHER)
    assert [word.text for word in found.words] == ANOTHER.split()
    assert found["car"].shape == (rows, columns) and np.ptp(found["car"]) > 0


def test_a_text_has_the_same_maps_beside_the_image_as_in_the_prompts_place(family):
    """With guidance, where one half of a batch is asked again, and several texts at once."""
    recording = family.record(ONE_STEP, texts=["fox", OTHER], share="joint", layers="all")[0]
    alone = al.record_again(family.pipe, recording, text=OTHER)
    for name in recording.trace.sizes:
        found = al.ovam(recording, OTHER, layers=name, mode="bicubic")
        close(found.values, al.daam(alone, layers=name).values[: len(found.values)])
    assert found.words == alone.words and found.special == al.daam(alone).special


@pytest.mark.parametrize("name", ["flux", "sd3", "z_image"])
def test_words_share_all_attention_to_the_text(name):
    """The softmax over the prompt's tokens without padding, in float64."""
    family, found = family_of(name), []
    answer, row = family.answer, family.answer.rows[0][0]
    recording = family.record(ONE_STEP, texts=[PROMPT], layers="all")[0]
    for name in answer.layers():
        part, met = answer.parts(0, row)[name], answer.calls[0].met[name]
        values = al.ovam(recording, PROMPT, layers=[name]).values
        first = range(met.key.shape[2])[part.text][0]
        close(values, met.probabilities(row, part.pixels, slice(first, first + len(values))).mean(0).T)
        found.append(values)
    np.testing.assert_allclose(np.mean(found, 0).sum(0), 1, rtol=1e-5)


class Counted:
    """The sizes of the batches that the first attention of a denoiser meets."""

    def __init__(self, pipe):
        self.module, self.rows = pipe.transformer.transformer_blocks[0].attn, []

    def __enter__(self):
        self.handle = self.module.register_forward_hook(lambda module, args, output: self.rows.append(len(output[0])))
        return self

    def __exit__(self, *error):
        self.handle.remove()


@pytest.mark.parametrize(("name", "rows"), [("flux", [1, 4, 1, 1]), ("sd3", [2, 4, 1])])
def test_texts_of_one_length_are_read_at_once_and_not_for_what_guides(name, rows):
    """FLUX guides by a call of its own, Stable Diffusion 3 by half a batch."""
    family, texts = family_of(name), ["fox", "snow", "fox", "a red tree", "tree", "car"]
    with Counted(family.pipe) as counted, al.record(family.pipe, texts=texts) as recording:
        family.generate(**ONE_STEP)
    assert counted.rows == rows
    alone = family.record(ONE_STEP, texts="car")
    close(al.ovam(recording[0], "car").values, al.ovam(alone[0], "car").values)


def test_several_images_and_texts_of_several_lengths():
    """Z-Image's texts are as long as they are."""
    family, texts = family_of("z_image"), ["fox", "a red fox in the snow beside a house and a tree" * 2, "car"]
    change = {"prompt": [PROMPT, OTHER], "negative_prompt": [OTHER, PROMPT], "num_images_per_prompt": 2}
    recording = family.record(change | ONE_STEP, texts=texts)
    assert len(recording) == 4
    for image in (0, 3):
        again = al.record_again(family.pipe, recording[image], texts=texts)
        for text in texts:
            close(al.ovam(recording[image], text).values, al.ovam(again, text).values)
    first, last = (al.ovam(recording[i], "fox").values for i in (0, 3))
    assert not np.allclose(first, last)


def test_steps_add_up_and_words_stand_in_their_context():
    family, text = family_of("flux"), "a fox and a red tree"
    recording = family.record(texts=text)[0]
    steps = [al.record_again(family.pipe, recording, steps=step, texts=text) for step in range(2)]
    whole = al.ovam(recording, text)
    close(np.mean([al.ovam(step, text).values for step in steps], 0), whole.values)
    part = al.ovam(recording, "red tree", context="a fox and a {}")
    assert list(part) == ["red", "tree"]
    np.testing.assert_array_equal(part["tree"], whole["tree"])


def test_half_precision_of_the_callers_choice():
    """Autocast holds for the other texts as for the prompt."""
    family = family_of("flux_distilled")
    with torch.autocast("cpu", torch.bfloat16), al.record(family.pipe, texts=PROMPT, share="joint") as recording:
        family.generate(**ONE_STEP)
    close(al.ovam(recording[0], PROMPT, mode="bicubic").values, al.daam(recording[0]).values)


def test_a_compiled_denoiser_reads_texts_after_its_recording():
    """As it is to be compiled inside the block, which is when it has begun to listen."""
    family = Family("pixart_sigma")
    recording = family.record(ONE_STEP)[0]
    expected = al.ovam(recording, "a red fox").values
    family.denoiser.compile(backend="eager")
    np.testing.assert_array_equal(al.ovam(recording, "a red fox").values, expected)


def test_a_denoiser_that_is_compiled_while_it_is_recorded():
    family = Family("flux_distilled")
    expected = family.record(ONE_STEP, texts=["fox"], outputs=True, layers=["transformer_blocks.0.attn"])[0]
    with al.record(family.pipe, texts=["fox"], outputs=True, layers=["transformer_blocks.0.attn"]) as recording:
        family.denoiser.proj_out.compile(backend="eager")
        family.generate(**ONE_STEP)
    close(al.ovam(recording[0], "fox").values, al.ovam(expected, "fox").values)
    close(al.linear_daam(recording[0])["fox"], al.linear_daam(expected)["fox"])


def test_texts_take_no_prompt_out_of_memory():
    """What was encoded before the first image is still told in the second one, after many other texts."""
    family, texts = family_of("flux"), [f"{number} {word}" for number in range(8) for word in ("fox", "tree", "snow")]
    with al.record(family.pipe, texts=texts, layers="transformer_blocks.0.attn") as recording:
        embeddings, summary, _ = family.pipe.encode_prompt(PROMPT, None)
        given = {"prompt": None, "prompt_embeds": embeddings, "pooled_prompt_embeds": summary}
        family.generate(**given, **ONE_STEP)
        family.generate(**given, **ONE_STEP)
    assert [[word.text for word in one.words] for one in recording] == [PROMPT.split()] * 2


def test_a_file_has_the_texts(tmp_path):
    recording = family_of("sd3").record(ONE_STEP, texts=["a red fox", "snow"])
    again = al.Recording.load(recording.save(tmp_path / "sd3"))[0]
    for text in ("a red fox", "snow"):
        one, other = al.ovam(recording[0], text), al.ovam(again, text)
        np.testing.assert_array_equal(one.values, other.values)
        assert one.words == other.words and one.special == other.special


def test_an_existing_image():
    family = family_of("flux")
    image = np.random.default_rng(0).random((32, 48, 3), dtype=np.float32)
    recording = al.record_image(
        family.pipe, image, PROMPT, timesteps=400, texts=PROMPT, share="joint", generator=al.seed(3)
    )
    close(al.ovam(recording[0], PROMPT, mode="bicubic").values, al.daam(recording[0]).values)


def failing(at, error=RuntimeError):
    """Return a hook that fails when it is called for the n-th time."""
    calls = []

    def fail(*_):
        calls.append(len(calls))
        if len(calls) == at:
            raise error("no more")

    return fail


def test_an_error_leaves_nothing_behind_and_no_half_step():
    """A block fails as the second step's other text is read: what is recorded of the first step stays."""
    family = family_of("flux")
    plain, before = family.generate(), checks.count_hooks(family.pipe)
    # the prompt, the text, guidance, the prompt, the text
    handle = family.denoiser.single_transformer_blocks[0].register_forward_hook(failing(5))
    with pytest.raises(RuntimeError, match="no more"), al.record(family.pipe, texts="fox") as recording:
        family.generate()
    handle.remove()
    assert checks.count_hooks(family.pipe) == before and not checks.function_modes()
    trace = recording[0].trace
    assert trace.steps == [0] and trace.beside["fox"].words[0].text == "fox"
    assert torch.equal(family.generate(), plain)
    expected = al.record_again(family.pipe, recording[0], texts="fox")
    np.testing.assert_array_equal(al.ovam(recording[0], "fox").values, al.ovam(expected, "fox").values)


def test_a_generation_after_one_that_failed_in_the_same_block():
    family = family_of("flux")
    handle = family.denoiser.transformer_blocks[0].register_forward_hook(failing(1))
    with al.record(family.pipe, texts="fox") as recording:
        with pytest.raises(RuntimeError, match="no more"):
            family.generate(**ONE_STEP)
        family.generate(**ONE_STEP)
    handle.remove()
    expected = family.record(ONE_STEP, texts="fox")
    np.testing.assert_array_equal(al.ovam(recording[-1], "fox").values, al.ovam(expected[0], "fox").values)


def test_a_call_that_is_not_recorded_is_not_taken_for_one_that_failed():
    """Of the branch that guides, the second call of each step: nothing is asked beside the first one."""
    family = family_of("flux")
    handle = family.denoiser.transformer_blocks[0].register_forward_hook(failing(2))
    with al.record(family.pipe, texts="fox", branch="negative"):
        with pytest.raises(RuntimeError, match="no more"):
            family.generate(**ONE_STEP)
        with Counted(family.pipe) as counted:
            family.generate(**ONE_STEP)
    handle.remove()
    assert counted.rows == [1, 1, 1]


@pytest.mark.parametrize("at", [1, 2])  # the call of the prompt, and that of the text
def test_an_interrupt_inside_an_attention_leaves_nothing_behind(at):
    """After Ctrl-C PyTorch calls no hooks; the block may go on with another generation, or end."""
    family = family_of("flux")
    expected, layer = family.record(ONE_STEP, texts="fox")[0], family.denoiser.transformer_blocks[0].attn.to_q
    before = checks.count_hooks(family.pipe)
    handle = layer.register_forward_hook(failing(at, KeyboardInterrupt))
    with al.record(family.pipe, texts="fox") as recording:
        with pytest.raises(KeyboardInterrupt):
            family.generate(**ONE_STEP)
        family.generate(**ONE_STEP)
    handle.remove()
    np.testing.assert_array_equal(al.ovam(recording[-1], "fox").values, al.ovam(expected, "fox").values)
    handle = layer.register_forward_hook(failing(at, KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt), al.record(family.pipe, texts="fox"):
        family.generate(**ONE_STEP)
    handle.remove()
    assert checks.count_hooks(family.pipe) == before and not checks.function_modes()


def test_a_call_that_is_not_recorded_is_not_taken_for_one_that_was_interrupted():
    family = family_of("flux")
    handle = family.denoiser.transformer_blocks[0].register_forward_hook(failing(2, KeyboardInterrupt))
    with al.record(family.pipe, texts="fox", branch="negative"):
        with pytest.raises(KeyboardInterrupt):
            family.generate(**ONE_STEP)
        with Counted(family.pipe) as counted:
            family.generate(**ONE_STEP)
    handle.remove()
    assert counted.rows == [1, 1, 1]


# Refusals


@cache
def fox():
    return family_of("flux").record(ONE_STEP, texts="fox")[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"texts": ["fox", " "]}, r"texts=\[' '\]: each is a text"),
        ({"texts": ["fox", 3]}, r"texts=\[3\]: each is a text"),
        ({"texts": "a red tree and smoke " * 30}, "the model reads no word from 'and' on"),
        # of which the window cuts off the end
        ({"texts": "extraordinarily photosynthesis"}, "reads no word from 'photosynthesis' on: 1 of"),
        ({"text": "extraordinarily photosynthesis"}, "reads no word from 'photosynthesis' on: 1 of"),
        ({"outputs": "transformer_blocks"}, "outputs='transformer_blocks': True or False"),
        ({"text": "fox", "texts": "snow"}, "give one of them"),
        ({"text": "fox", "outputs": True}, "give one of them"),
    ],
)
def test_what_cannot_be_read_beside_an_image(change, message):
    family, recording = family_of("flux"), fox()
    before = checks.count_hooks(family.pipe)
    with pytest.raises(ValueError, match=message):
        al.record_again(family.pipe, recording, **change)
    assert checks.count_hooks(family.pipe) == before and not checks.function_modes()


def test_what_reads_no_text_beside_an_image():
    with pytest.raises(TypeError, match="LuminaNextDiT2DModel tells the time by the text"):
        family_of("lumina_next").record(texts="fox")
    with pytest.raises(ValueError, match="FluxFillPipeline reads no text without an image"):
        family_of("flux_fill").record(texts="fox")


def test_a_cache_of_steps_is_told_before_any_step():
    family = Family("flux_distilled")
    family.denoiser.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    with pytest.raises(ValueError, match=r"disable_cache\(\) first"), al.record(family.pipe, texts="fox"):
        pass


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"text": "tree"}, r"record_again\(pipe, recording, texts='tree'\).* here there are 'fox' so far"),
        ({"text": "fox", "padded": True}, "no padding"),
        ({"text": "fox", "special": False}, "special tokens"),
        ({"text": "fox", "context": "a {}"}, r"texts='a fox'"),
        ({"text": torch.zeros(2, 32)}, "maps of texts that the model has read"),
    ],
)
def test_texts_without_maps(asked, message):
    with pytest.raises(ValueError, match=message):
        al.ovam(fox(), **asked)
