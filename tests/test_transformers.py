"""Diffusion transformers, and other denoisers, recorded: small pipelines of the real classes, with exact answers.

What they really compute is heard and written out in float64 by `small_pipelines.checks`, without attnlab.
"""

import inspect
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import cache

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel, FirstBlockCacheConfig
from small_pipelines import OTHER, PROMPT, SMALL, autoencoders, checks, joint
from small_pipelines.checks import NEGATIVE, STEPS, Answer, Family, close, compare
from small_pipelines.encoders import random_weights
from torch import nn

import attnlab as al
from attnlab.recording.adapters.base import arguments_of
from attnlab.recording.checks import check_generation

# keys are a function of the text alone, so that recorded queries tell of any other text
OWN_TEXT = (
    "pixart_alpha",
    "pixart_sigma",
    "sana",
    "sana_sprint",
    "hunyuan_dit",
    "kandinsky3",
    "animate_diff",
    "kolors",
)
OWN_TEXT += ("pag", "pixart_pag")
BESIDE = [
    "pixart_alpha",
    "pixart_sigma",
    "pixart_pag",
    "hunyuan_dit",
    "animate_diff",
    "kolors",
]  # the image's own attention is apart
NORMALIZED = ("sana_sprint", "hunyuan_dit")  # of these, those that normalize keys
TIMED = ("lumina_next", "kandinsky5")  # the text goes through blocks that are told the time
JOINT = [name for name in SMALL if name not in OWN_TEXT + TIMED]
GUIDED = [name for name in SMALL if name not in ("flux_distilled", "flux_fill", "flux2", "sana_sprint")]

LARGE = ("flux2", "hidream", "pixart_alpha", "pixart_sigma", "sana_sprint")
"""What their pipelines do unless told otherwise asks for more than a small model has."""

family_of = cache(Family)


@pytest.fixture(params=SMALL)
def family(request):
    """A small pipeline, and what it computes."""
    return family_of(request.param)


def every(names):
    """Run a test for the pipelines of some names."""
    return pytest.mark.parametrize("family", names, indirect=True)


# Maps


def test_the_image_is_bit_exact_and_every_layer_seen(family):
    checks.check_image(family)


def test_maps_are_what_the_model_computed(family):
    checks.check_maps(family)


def test_the_answer_is_the_models_own_attention(family):
    """Softmax times value in float64 is what came of the attention: so scale, mask and heads are right."""
    for call in family.plain[1]:
        for name in family.answer.layers():
            met = call.met[name]
            for row in range(len(met.query)):
                value = met.value[row].repeat_interleave(met.query.shape[1] // met.value.shape[1], 0).double()
                expected = met.probabilities(row) @ value
                close(
                    met.output[row].flatten(1), expected.flatten(1), 1e-5
                )  # the CPU's fast kernel rounds exp() so much


REST = {"flux_kontext": 60, "qwen_image_edit": 60, "hidream": 160}
"""Keys that are neither the image's nor the text's: tokens of a reference image, padding of the image."""


@every(JOINT)
def test_every_key_is_the_images_or_the_texts(family):
    """Another seed and another text change all keys of the first attention between them, and none both."""
    number, answer = family.answer.steps[0], family.answer
    row, call = answer.rows[number][0], answer.calls[number]
    part = answer.parts(number, row)[answer.layers()[0]]
    keys = range(call.met[answer.layers()[0]].key.shape[2])
    rows, columns = family.recording[0].trace.sizes[answer.layers()[0]]
    assert len(range(*part.pixels.indices(len(keys)))) == rows * columns
    assert len(keys) - rows * columns - len(keys[part.text]) == REST.get(family.name, 0)


@every([name for name in JOINT if name != "deepfloyd_if"] + BESIDE)
def test_self_attention_is_that_of_pixels_among_themselves(family):
    """Mean over heads, layers and steps of a softmax over pixels alone; reading another text beside changes nothing."""
    answer, own = family.answer, family.name in BESIDE
    texts = {"texts": OTHER} if family.name in ("flux", "sd3") else {}
    size = family.recording[0].trace.sizes[answer.layers()[0]]
    recording = family.record(self_attention=size[0], layers="all", **texts)[0]
    looks = []
    for number in answer.steps:
        row, met = answer.rows[number][0], answer.calls[number].met
        for name, part in answer.parts(number, row).items():
            pixels = slice(None) if own else part.pixels
            one = met[name.replace("attn2", "attn1") if own else name]
            if len(one.query[row, 0, pixels]) == size[0] * size[1]:  # in a U-Net there are other sizes
                looks.append(one.probabilities(row, pixels, pixels).mean(0))
    found, found_size = recording.self_attention()
    assert found_size == size and len(looks) > 1
    close(found, torch.stack(looks).mean(0), 1e-6)


def test_two_sizes_in_one_block():
    """What the first block computes where a text is read is of no step, neither of this size nor of the one before."""
    family = family_of("pixart_alpha")
    pictures = [{}, {"width": family.call["width"] * 2, "prompt": OTHER}]
    apart = [family.record(change, self_attention=8)[0].self_attention() for change in pictures]
    with al.record(family.pipe, self_attention=8) as recording:
        for change in pictures:
            family.generate(**change)
    for one, (looks, size) in zip(recording, apart, strict=True):
        assert one.self_attention()[1] == size and torch.equal(one.self_attention()[0], looks)
    assert apart[0][1] != apart[1][1]


@pytest.mark.parametrize("kept", [{"self_attention": 8}, {"agreement": 8}], ids=str)
def test_what_another_thread_reads_is_of_no_step(kept):
    """A text is read by the first block, here while the last one runs."""
    family = family_of("pixart_alpha")
    expected = family.record(**kept)[0]
    given = family.answer.calls[0].given
    given = {name: value[:1] if torch.is_tensor(value) else value for name, value in given.items()}
    first, last = (family.denoiser.get_submodule(family.answer.layers()[k]) for k in (0, -1))

    def read(module, args):
        with ThreadPoolExecutor(1) as pool:
            pool.submit(arguments_of, first, lambda: family.denoiser.forward(**given)).result()

    handle = last.register_forward_pre_hook(read)
    try:
        found = family.record(**kept)[0]
    finally:
        handle.remove()
    if "agreement" in kept:
        assert found.trace.agreement == expected.trace.agreement
    else:
        assert torch.equal(found.self_attention()[0], expected.self_attention()[0])


class Joined:
    """Self-attention whose keys are those of the whole batch, as in StyleAligned."""

    def __call__(self, attn, hidden_states, *args, **given):
        query, key = (part(hidden_states)[:, None] for part in (attn.to_q, attn.to_k))
        key = key.flatten(0, 2)[None, None].expand(len(query), -1, -1, -1)
        return nn.functional.scaled_dot_product_attention(query, key, key)[:, 0]


def test_keys_of_other_images_are_not_taken_for_the_images_own():
    family = Family("pixart_alpha")
    family.denoiser.transformer_blocks[1].attn1.set_processor(Joined())
    with pytest.raises(RuntimeError, match="1 of 3 self-attentions were not seen"):
        family.record(self_attention=8)
    with pytest.raises(RuntimeError, match="attn2 was not seen"):
        family.record(agreement=8)
    assert not checks.count_hooks(family.pipe)


class Beside:
    """A processor that also asks keys of an image prompt, beside those of the image."""

    def __init__(self, processor):
        self.processor = processor

    def __call__(self, attn, hidden_states, *args, **given):
        found = self.processor(attn, hidden_states, *args, **given)
        query = hidden_states[:, None]
        keys = torch.cat([query, torch.ones_like(query[:, :, :5])], 2)
        nn.functional.scaled_dot_product_attention(query, keys, keys)
        return found


def test_keys_of_an_image_prompt_beside_the_images_own():
    """As Stable Diffusion 3 with an IP-Adapter: what is recorded is the attention in which image and text meet."""
    family = Family("sd3")
    expected = family.recording[0]
    for name in family.answer.layers():
        module = family.denoiser.get_submodule(name)
        module.processor = Beside(module.processor)  # set_processor would take it for a module
    found = family.record(layers="all", self_attention=8)[0]
    assert torch.equal(torch.from_numpy(al.daam(found).values), torch.from_numpy(al.daam(expected).values))
    assert found.self_attention()[0].shape == (96, 96)


def test_attention_that_is_not_seen_is_named_before_its_maps():
    """Without the function that taps hear there is no self-attention of any height, but that is not the reason."""
    family = Family("sd3")
    for name in family.answer.layers():
        family.denoiser.get_submodule(name).processor = _by_hand
    with pytest.raises(RuntimeError, match="set_attention_backend"):
        family.record(self_attention=16)


def _by_hand(attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
    return attn.to_q(hidden_states), attn.add_q_proj(encoder_hidden_states)


# What is left behind


class Broken(Exception):
    """What goes wrong in these tests."""


def test_nothing_is_left_after_an_error(family):
    """The error comes from inside an attention, where its function mode listens."""
    image, _ = family.plain
    before = checks.count_hooks(family.pipe)
    attention = family.denoiser.get_submodule(family.answer.layers()[-1])

    def fail(module, args):
        assert checks.function_modes() == (
            family.name != "pag"
        )  # Stable Diffusion's U-Net has hooks on its projections
        raise Broken

    linear = next(module for module in attention.modules() if isinstance(module, nn.Linear))
    handle = linear.register_forward_pre_hook(fail)
    try:
        with pytest.raises(Broken), al.record(family.pipe):
            family.generate()
    finally:
        handle.remove()
    assert checks.count_hooks(family.pipe) == before and not checks.function_modes()
    assert torch.equal(family.generate(), image)


def test_an_interrupted_generation_keeps_whole_steps(family):
    """Its maps are those of the steps that ran; nothing is left behind."""
    _ = family.plain
    before = checks.count_hooks(family.pipe)

    def interrupt(*args):
        raise KeyboardInterrupt

    parameters = inspect.signature(family.pipe.__call__).parameters
    name = next(name for name in ("callback_on_step_end", "callback") if name in parameters)
    with pytest.raises(KeyboardInterrupt), al.record(family.pipe, layers="all") as recording:
        family.generate(**{name: interrupt})
    assert checks.count_hooks(family.pipe) == before and not checks.function_modes()
    assert all(trace.steps == [0] for trace in recording.traces)
    compare(recording[0], family.answer, steps=[0])
    planned = recording[0].trace.generation.planned
    assert recording.complete == (planned is None) and planned in (None, STEPS)


# Guidance


@every(GUIDED)
def test_another_negative_prompt_leaves_the_maps_alone(family):
    """Of the first step: what comes of it is another image."""
    one, other = (family.record({"negative_prompt": text}, steps=0) for text in (OTHER, NEGATIVE))
    np.testing.assert_array_equal(al.daam(one[0]).values, al.daam(other[0]).values)


@every(GUIDED)
def test_the_negative_branch(family):
    recording = family.record(branch="negative", layers="all")
    assert [one.prompt for one in recording] == [OTHER] * len(family.recording)
    compare(recording[0], Answer(family, branch="negative"))


TWO_CALLS = ("flux", "qwen_image", "flux_kontext", "qwen_image_edit", "chroma", "cogview4", "lumina2", "hunyuan_image")
TWO_CALLS += ("kandinsky5",)  # a step, with guidance


@every([name for name in GUIDED if name not in TWO_CALLS])
def test_both_branches(family):
    recording = family.record(branch="both", layers="all")
    alone = {"conditional": family.recording, "negative": family.record(branch="negative", layers="all")}
    for branch, expected in alone.items():
        assert len(recording.branch(branch)) == len(expected)
        np.testing.assert_array_equal(al.daam(recording.branch(branch)[0]).values, al.daam(expected[0]).values)


@every(TWO_CALLS)
def test_both_branches_need_one_call(family):
    with pytest.raises(ValueError, match="record branch='conditional'"), al.record(family.pipe, branch="both"):
        family.generate()
    assert not checks.function_modes()


SEVERAL = [name for name in SMALL if name != "qwen_image_edit"]  # which takes one prompt


def several(family):
    """Arguments for two prompts, and two images of each."""
    change = {"prompt": [PROMPT, OTHER]}
    if family.name not in ("sana_sprint", "pixart_alpha"):  # one step is another thing to them
        change["num_inference_steps"] = 1
    change |= {"negative_prompt": [OTHER, "a red house"]} if family.guided else {}
    names = inspect.signature(family.pipe.__call__).parameters
    return change | ({"num_images_per_prompt": 2} if "num_images_per_prompt" in names else {})


@every(SEVERAL)
def test_several_prompts_and_images(family):
    with al.record(family.pipe, layers="all") as recording:
        family.generate(**several(family))
    images = 3 if family.name == "animate_diff" else 2  # frames
    assert [one.prompt for one in recording] == [PROMPT] * images + [OTHER] * images
    answer = Answer(family, **several(family))
    for image in (0, len(recording) - 1):
        compare(recording[image], answer, image=image)


def test_skip_layer_guidance_makes_no_steps():
    """Stable Diffusion 3.5 calls the denoiser once more in some steps, without a layer."""
    family = family_of("sd3")
    change = {"num_inference_steps": 4, "skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0}
    change["skip_layer_guidance_stop"] = 0.6
    _, calls = family.watched(**change)
    assert sorted(len(call.met) for call in calls) == [3, 3, 4, 4, 4, 4]
    recording = family.record(change)
    assert recording.trace.steps == [0, 1, 2, 3] and len(set(recording.trace.timesteps)) == 4
    answer = Answer(family, **change)
    whole = [len(call.met) == 4 for call in answer.calls]
    answer.rows = [rows if seen else [] for rows, seen in zip(answer.rows, whole, strict=True)]
    compare(recording, answer)


def end_guidance(pipe, step, timestep, kept):
    """Turn guidance off, as a callback of the user's does."""
    pipe._guidance_scale = 1.0
    return {name: value.chunk(2)[-1] for name, value in kept.items()}


ENDS = {
    "lumina2": {"cfg_trunc_ratio": 0.5},
    "z_image": {"cfg_truncation": 0.4},
    "sd3": {
        "callback_on_step_end": end_guidance,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds", "pooled_prompt_embeds"],
    },
}


@pytest.mark.parametrize("name", ENDS)
def test_guidance_that_ends_early(name):
    family, change = family_of(name), ENDS[name] | {"num_inference_steps": 4}
    answer = Answer(family, **change)
    texts = [call.rows for call in answer.calls]
    assert sum(texts) < 8 and len(answer.steps) == 4
    recording = family.record(change)
    assert recording.trace.steps == [0, 1, 2, 3]
    compare(recording, answer)
    negative = family.record(change, branch="negative")
    assert 0 < len(negative.trace.steps) < 4  # those without guidance have no such part
    compare(negative, Answer(family, branch="negative", **change))


# Words


MIXES = ("*.out_proj", "*.o_proj", "*.SelfAttention.o", "*.attention.output.dense", "*.self_attention.dense")
MIXES += (
    "context_*.to_out.0",
    "context_*.text_embedder.linear_2",
    "text_transformer_blocks.*.self_attention.out_layer",
)
"""What brings other tokens into a token, in text encoders and where denoisers refine texts: ends of attention."""


@contextmanager
def each_token_alone(pipe):
    """Let the text be read without context, by weights of 0: then a word has changed where its own tokens have."""
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    mixing = [m for part in parts for name, m in part.named_modules() if any(fnmatch(name, end) for end in MIXES)]
    before = [(module, module.weight.data) for module in mixing]
    for module, weight in before:
        module.weight.data = torch.zeros_like(weight)
    yield
    for module, weight in before:
        module.weight.data = weight


def changed_tokens(family, prompt, others):
    """List the tokens of the text whose keys are others with each other prompt, of as many words as the prompt."""
    row, name = family.answer.rows[0][0], family.answer.layers()[0]
    text = family.answer.parts(0, row)[name].text

    def keys(other):
        if family.name == "deepfloyd_if":  # a norm over all tokens makes each key depend on all of them
            return other.texts[0][row][None]
        texts = {name: value for name, value in other.given.items() if name.startswith(checks.TEXTS)}
        return checks.again(family.denoiser, call.given | texts).met[name].key[row, :, text]

    with each_token_alone(family.pipe):
        call, *calls = (family.first_call(prompt=text) for text in (prompt, *others))
        own = keys(call)
        changed = [(own != keys(other)).any(-1).any(0) for other in calls]
    return [tuple(found.nonzero().flatten().tolist()) for found in changed]


def test_words_are_those_of_the_prompt(family):
    """A word stands at the tokens that change with it, of each encoder; one of several pieces between its neighbors."""
    words = family.recording[0].words
    assert [word.text for word in words] == PROMPT.split()
    others = {0: "the", 2: "tree", 7: "with", 9: "tree"}  # by the place of the word instead of which they stand
    prompts = [" ".join([*PROMPT.split()[:n], word, *PROMPT.split()[n + 1 :]]) for n, word in others.items()]
    assert [words[n].tokens for n in others] == changed_tokens(family, PROMPT, prompts)
    places = zip(words[0].tokens, words[2].tokens, strict=True)
    assert words[1].tokens == tuple(n for before, behind in places for n in range(before + 1, behind))


def test_words_in_quotation_marks_are_read_by_a_second_encoder():
    """HunyuanImage: their bytes stand before the text, and are no words; maps are of the text alone behind them."""
    family = family_of("hunyuan_image")
    plain, change = family.recording, {"prompt": PROMPT.replace("fire", '"fire"')}
    recording, answer = family.record(change), Answer(family, **change)
    number, row = answer.steps[0], answer.rows[answer.steps[0]][0]
    length = int(answer.calls[number].given["encoder_attention_mask_2"][row].sum())
    assert length > 0
    found = recording[0].words
    assert "".join(word.text for word in found) == change["prompt"].replace(" ", "")
    for n in (0, 2):
        assert found[n].tokens == tuple(length + token for token in plain[0].words[n].tokens)
    compare(recording, answer)


TEMPLATED = ("qwen_image", "qwen_image_edit", "z_image", "flux2", "lumina2", "hunyuan_image", "sana", "sana_sprint")


@every([*TEMPLATED, "lumina_next", "kandinsky5"])
def test_words_of_a_template_are_no_words(family):
    """Templates speak of images, users and colors, too."""
    prompt, other = "image of the color system user", "image of the color system car"
    words = family.record({"prompt": prompt}, steps=0)[0].words
    assert [word.text for word in words] == prompt.split()
    assert [words[-1].tokens] == changed_tokens(family, prompt, [other])


# Questions asked afterwards


@every(OWN_TEXT)
def test_maps_of_other_texts(family):
    checks.check_other_texts(family)


WANT_IMAGE = ("flux_fill", "qwen_image_edit")  # pipelines that are not called without one


@every([name for name in (*JOINT, "kandinsky5") if name not in WANT_IMAGE])
def test_texts_beside_the_image(family):
    checks.check_text_beside(family)


@every([*WANT_IMAGE, "lumina_next", "sana"])
def test_texts_that_cannot_be_read_beside_the_image(family):
    said = {"lumina_next": "tells the time by the text", "sana": r"ovam\(recording, text\)"}
    said = said.get(family.name, "reads no text without an image")
    recording = family.record(keep="calls")
    with pytest.raises((TypeError, ValueError), match=said):
        al.record_again(family.pipe, recording, text=OTHER)
    assert not checks.function_modes()


@every([name for name in OWN_TEXT if name not in NORMALIZED])
def test_linear_maps_and_tokens(family):
    checks.check_linear(family)


@every(NORMALIZED)
def test_normalized_keys_have_no_linear_map(family):
    recording = family.recording[0]
    with pytest.raises(ValueError, match="normalizes its keys, which is not linear: use ovam"):
        al.linear_daam(recording)


@every(OWN_TEXT)
def test_another_text_meets_the_queries_of_the_first_layer(family):
    """In the first layer of the first step nothing has read the text yet: another prompt has the same queries."""
    layer = family.answer.layers()[0]
    other = family.record({"prompt": OTHER}, layers=layer, steps=0)
    queries = [one[0].trace.queries[layer][0] for one in (family.recording, other)]
    pooled = family.name in ("hunyuan_dit", "kandinsky3", "kolors")  # whose time embedding is of the text, too
    assert torch.equal(*queries) != pooled
    if not pooled:
        found = al.ovam(family.recording[0], OTHER, padded=True, layers=layer, steps=0, mode="bicubic")
        close(found.values, al.daam(other[0]).values)


@every(OWN_TEXT)
def test_what_is_kept_gives_the_same_maps(family):
    """Sums of maps and of contributions, made while generating; a text that was asked for before."""
    recording, texts = family.recording[0], [OTHER] * (family.name not in LARGE)
    maps = family.record(keep="maps", texts=texts, layers="all")[0]
    assert not maps.trace.queries
    close(al.daam(maps).values, al.daam(recording).values)
    for text in texts:
        close(al.ovam(maps, text).values, al.ovam(recording, text).values)
    contributions = family.record(keep="contributions", layers="all")[0]
    for kind in ("norm", "projection"):
        expected = al.contributions(recording, kind=kind)
        close(al.contributions(contributions, kind=kind).values, expected.values, 1e-5)


@every(OWN_TEXT)
def test_tokens_add_up_to_what_the_layer_gives(family):
    """Attention times value, through the output weights, is the layer's own output without its bias."""
    trace, answer = family.recording[0].trace, family.answer
    for name in answer.layers():
        number, row = answer.steps[0], answer.rows[answer.steps[0]][0]
        call, layer = answer.calls[number], trace.layers[name]
        probabilities = call.met[name].probabilities(row)  # (head, pixel, token)
        added = torch.einsum("hpt,htc->pc", probabilities, layer.outputs(trace.text).double())
        bias = family.denoiser.get_submodule(name).to_out[0].bias
        close(added + (0 if bias is None else bias), call.outputs[name][row], 1e-5)


def test_a_file_gives_the_same_maps(family, tmp_path):
    checks.check_file(family, tmp_path)


def test_single_steps(family):
    checks.check_steps(family)


@every([*JOINT, *TIMED])
def test_steps_once_more_have_another_share(family):
    again = al.record_again(family.pipe, family.recording[0], steps=1, share="joint", layers="all")
    assert again.trace.steps == [1]
    compare(again, family.answer, "joint", steps=[1])


# Sizes


@pytest.mark.parametrize("size", [(24, 40), (40, 24), (48, 48)])
def test_a_reference_of_any_size_takes_no_part(size):
    """FLUX.1 Kontext: maps have the size of the image, and shares of text, image and reference add up to 1."""
    family = family_of("flux_kontext")
    change = {"image": joint.picture(*size)}
    recording, answer = family.record(change, share="joint", layers="all"), Answer(family, **change)
    assert set(recording.trace.sizes.values()) == {(8, 12)}
    compare(recording, answer, "joint")
    name, met = answer.layers()[0], answer.calls[0].met[answer.layers()[0]]
    part, reference = answer.parts(0, 0)[name], slice(-size[0] * size[1] // 16, None)
    shares = met.probabilities(0, part.pixels)
    parts = [shares[..., keys].sum(-1) for keys in (part.text, part.pixels, reference)]
    torch.testing.assert_close(sum(parts), torch.ones_like(parts[0]))


@pytest.mark.parametrize("name", ["flux", "sd3", "qwen_image", "z_image", "lumina2", "pixart_sigma", "hunyuan_image"])
def test_an_image_of_another_size(name):
    """Rows and columns are no matter of a square root."""
    family = family_of(name)
    side = {"lumina2": 16}.get(name, 4)  # pixels of an image token
    change = {"height": 18 * side, "width": 6 * side}
    recording = family.record(change, layers="all")
    assert set(recording.trace.sizes.values()) == {(18, 6)}
    compare(recording, Answer(family, **change))


# Refusals


def test_another_kind_of_transformer_is_refused_by_name():
    transformer = random_weights(
        DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=1, sample_size=8)
    )
    pipe = DiTPipeline(transformer, autoencoders.kl(), DDIMScheduler())
    with (
        pytest.raises(TypeError, match="DiTPipeline cannot be recorded, it has DiTTransformer2DModel"),
        al.record(pipe),
    ):
        pass


@pytest.mark.parametrize("asked", [{"keep": "queries"}, {"keep": "sum"}, {"keep": "contributions"}])
def test_what_queries_do_not_tell_is_refused(asked):
    pipe = family_of("flux").pipe
    with pytest.raises(ValueError, match=r"record maps of the prompt, record\(pipe\)"), al.record(pipe, **asked):
        pass


@pytest.mark.parametrize("name", ["sana", "lumina_next", "deepfloyd_if"])
def test_self_attention_that_is_not_seen_is_refused(name):
    family = family_of(name)
    before = checks.count_hooks(family.pipe)
    match = (
        f"self-attention of {type(family.denoiser).__name__} is not recorded: leave self_attention= and agreement= out"
    )
    with pytest.raises(TypeError, match=match), al.record(family.pipe, self_attention=8):
        pass
    assert checks.count_hooks(family.pipe) == before


@every(["flux", "qwen_image", "hidream", "lumina_next"])
def test_another_text_needs_another_image(family):
    with pytest.raises(ValueError, match=r"record_again\(pipe, recording, texts='a red tree'\)"):
        al.ovam(family.recording[0], OTHER)


def test_a_prompt_of_embeddings_has_no_words():
    family, given = family_of("flux_distilled"), family_of("flux_distilled").answer.calls[0].given
    change = {"prompt_embeds": given["encoder_hidden_states"], "pooled_prompt_embeds": given["pooled_projections"]}
    with pytest.raises(ValueError, match="give the prompt as text"), al.record(family.pipe):
        family.generate(prompt=None, **change)
    assert not checks.function_modes()


def test_embeddings_of_cross_attention_answer_by_other_texts():
    """The prompt's words are not known, those of any text are; which half of a batch is the prompt's is known."""
    family = family_of("sana")
    given, rows = family.answer.calls[0].given, {"": 1, "negative_": 0}
    change = {f"{each}prompt_embeds": given["encoder_hidden_states"][row][None] for each, row in rows.items()}
    masks = given["encoder_attention_mask"]
    change |= {f"{each}prompt_attention_mask": masks[row][None] for each, row in rows.items()}
    recording = family.record({"prompt": None, "negative_prompt": None, **change}, layers="all")
    with pytest.raises(ValueError, match="words are unknown"):
        al.daam(recording)
    np.testing.assert_array_equal(al.ovam(recording, PROMPT).values, al.ovam(family.recording, PROMPT).values)


def test_a_compiled_denoiser_is_refused():
    family = Family("flux_distilled")
    family.denoiser.compile()
    with pytest.raises(TypeError, match=r"pipe\.transformer\.compile\(\)"), al.record(family.pipe):
        pass
    family.pipe.transformer = torch.compile(Family("flux_distilled").denoiser)
    with pytest.raises(TypeError, match=r"pipe\.transformer\.compile\(\)"), al.record(family.pipe):
        pass


def test_compiled_blocks_are_refused():
    family = Family("flux_distilled")
    family.denoiser.compile_repeated_blocks()
    with pytest.raises((TypeError, RuntimeError), match="record before compiling it"), al.record(family.pipe):
        pass


def test_another_kernel_is_told_how_to_be_seen():
    family = Family("flux_distilled")
    family.denoiser.set_attention_backend("flex")
    with pytest.raises(RuntimeError, match=r"set_attention_backend\('native'\)"), al.record(family.pipe):
        family.generate()
    assert not checks.function_modes()
    family.denoiser.set_attention_backend("native")
    assert len(family.record().trace.steps) == STEPS


def test_a_cache_of_steps_is_told_how_to_end():
    family = Family("flux_distilled")
    family.denoiser.enable_cache(FirstBlockCacheConfig(threshold=100.0))
    with pytest.raises(RuntimeError, match=r"disable_cache\(\)"), al.record(family.pipe):
        family.generate()
    assert not checks.function_modes()
    family.denoiser.disable_cache()
    assert len(family.record().trace.steps) == STEPS


def test_recording_twice_at_once_is_refused():
    family = family_of("flux")
    with al.record(family.pipe):
        with pytest.raises(RuntimeError, match="being recorded already"), al.record(family.pipe):
            pass
        family.generate()


# Before any step


@every([name for name in SMALL if name not in LARGE])
def test_a_wrong_word_is_named_before_any_step(family):
    image, _ = family.plain
    before, whole = checks.count_hooks(family.pipe), []
    handle = family.denoiser.register_forward_hook(lambda *call: whole.append(call))
    try:
        check_generation(family.pipe, PROMPT, ["smoke", ("and", 1), "burning house"])
        with pytest.raises(ValueError, match="- word: 'river' is not in the text; its words are 'a', 'burning'"):
            check_generation(family.pipe, PROMPT, ["river", "smoke"])
    finally:
        handle.remove()
    assert not whole and checks.count_hooks(family.pipe) == before
    assert torch.equal(family.generate(), image)
