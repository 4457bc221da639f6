"""Concept maps, words and tokens in the space of outputs of joint attention: FLUX and Stable Diffusion 3 in float64."""

from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_pipelines import PROMPT, checks
from small_pipelines.checks import Family, close
from test_pinned import JOINT, Calls, among

import attnlab as al

family_of = cache(Family)
CONCEPTS = ["fox", "a burning house"]
NO_OUTPUTS = ("kandinsky5", "deepfloyd_if")  # whose text asks nothing of the image
ONE_STEP = {"num_inference_steps": 1}


# The reference: pins by hand, attention written out


def pinned_by_hand(denoiser, given, text):
    """What met in every attention of a call, and of another with the other text and the image's tokens of the first."""
    kept, blocks = [], [*denoiser.transformer_blocks, *getattr(denoiser, "single_transformer_blocks", [])]

    def keep(module, args, kwargs):
        kept.append(kwargs["hidden_states"])

    def give(module, args, kwargs):
        return args, kwargs | {"hidden_states": kept.pop(0)}

    found = []
    for hook, arguments in ((keep, given), (give, given | text)):
        handles = [block.register_forward_pre_hook(hook, with_kwargs=True) for block in blocks]
        found.append(checks.again(denoiser, arguments).met)
        for handle in handles:
            handle.remove()
    assert not kept
    return found


def outputs(met, row, tokens):
    """Softmax times value in float64, heads side by side: (token, channel)."""
    found = met.probabilities(row, tokens) @ met.value[row].double()
    return found.transpose(0, 1).flatten(1)


@cache
def reference(name):
    """[(layer, concept, o(p) (pixel, channel), o' (token, channel))] of every step, layer and concept."""
    family = family_of(name)
    calls, row = family.plain[1][:: 2 if name == "flux" else 1], 0 if name == "flux" else 1
    texts = {text: family.first_call(prompt=text).given for text in CONCEPTS}
    found = []
    for call in calls:
        size = 96
        for text, given in texts.items():
            other = {key: value for key, value in given.items() if key in ("encoder_hidden_states", "txt_ids")}
            met, beside = pinned_by_hand(family.denoiser, call.given, other)
            for layer in met:
                if not layer.endswith(".attn"):  # Stable Diffusion 3.5 has some of the image alone
                    continue
                tokens = met[layer].query.shape[2]
                pixels, words = slice(tokens - size, tokens), slice(0, tokens - size)
                if name == "sd3":
                    pixels, words = slice(0, size), slice(size, tokens)
                found.append((layer, text, outputs(met[layer], row, pixels), outputs(beside[layer], row, words)))
    return found


@cache
def recorded(name):
    return family_of(name).record(texts=CONCEPTS, outputs=True, layers="all")[0]


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_concept_maps_are_products_of_outputs_in_float64(name):
    recording, scores, pixels, words = recorded(name), {}, [], {}
    layers = list(recording.trace.sizes)
    for _, text, o, beside in reference(name):
        beside = beside[sorted({token for word in recording.trace.beside[text].words for token in word.tokens})].mean(0)
        scores.setdefault(text, []).append(o @ beside)
        words.setdefault(text, []).append(beside)
        pixels.append(o)
    assert len(scores["fox"]) == 2 * len(layers)  # steps
    assert len(recording.trace.beside["fox"].words[0].tokens) > 1
    expected = torch.stack([torch.stack(scores[text]).mean(0) for text in CONCEPTS])
    found = al.concept_maps(recording, softmax=False)
    assert list(found) == CONCEPTS and found["fox"].shape == (8, 12)
    close(found.values, expected)
    shares = al.concept_maps(recording, CONCEPTS[::-1])
    close(shares.values, expected.softmax(0).flip(0), 1e-5)  # of scores that differ by a millionth of the largest

    linear = al.linear_daam(recording)
    close(linear.matrix.T, torch.stack(pixels).mean(0).T)
    for text in CONCEPTS:
        vector = torch.stack(words[text]).mean(0)
        close(linear.embed(text)[None], vector[None])
        close(linear[text][None], (torch.stack(pixels).mean(0) @ vector)[None])


class Outputs(Calls):
    """What comes of every attention of some modules, in order."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention and self.inside:
            self.met.append(output.clone())
        return output


@pytest.mark.parametrize("name", [name for name in JOINT if name not in NO_OUTPUTS])
def test_outputs_are_those_of_the_two_calls(name):
    """Of one step: of the prompt's call those of the pixels, of the text's those of its words."""
    family = family_of(name)
    plain, names = family.generate(**ONE_STEP), None
    with al.record(family.pipe, layers="all") as first:
        family.generate(**ONE_STEP)
    names = list(first[0].trace.sizes)
    with Outputs(family.denoiser, names) as heard, al.record(family.pipe, texts="fox", outputs=True, layers="all") as r:
        assert torch.equal(family.generate(**ONE_STEP), plain)
    trace = r[0].trace
    for layer, real, beside in zip(names, heard.met[: len(names)], heard.met[len(names) :], strict=False):
        rows = [x.transpose(1, 2).flatten(2).flatten(0, 1) for x in (real, beside)]  # of all images of the batch
        assert among(trace.outputs[layer], rows[0]) == len(trace.outputs[layer])
        text = trace.beside["fox"]
        assert among(text.outputs[layer], rows[1]) == len(text.outputs[layer]) == text.length
        alone = al.linear_daam(r[0], layers=layer)
        close(al.concept_maps(r[0], layers=layer, softmax=False).values, alone["fox"][None], 1e-5)


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_outputs_are_the_same_where_shares_of_all_attention_are_counted(name):
    """Those are counted by an attention of their own, of which nothing is kept."""
    family, plain = family_of(name), recorded(name)
    recording = family.record(texts=CONCEPTS, outputs=True, layers="all", share="joint")[0]
    for found in (recording, al.record_again(family.pipe, recording, texts=CONCEPTS, outputs=True)):
        close(al.linear_daam(found).matrix, al.linear_daam(plain).matrix)
        close(al.concept_maps(found, softmax=False).values, al.concept_maps(plain, softmax=False).values)


@pytest.mark.parametrize("name", ["sd3", "z_image"])  # whose prompt is behind what guides, and before it
def test_a_prompt_that_changes_on_the_way_changes_no_other_text(name):
    """Sums are of all steps and of the conditional part, in a recording that is asked again, too."""
    family = family_of(name)

    def change(pipe, number, time, tensors):
        found = tensors["prompt_embeds"]
        return {"prompt_embeds": [0.9 * x for x in found] if isinstance(found, list) else 0.9 * found}

    report = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    recording = family.record(report, texts=CONCEPTS, outputs=True)[0]
    assert recording.trace.steps == [0, 1] and recording.trace.generation.changed == 1
    whole = al.record_again(family.pipe, recording, texts=CONCEPTS, outputs=True)
    close(al.concept_maps(whole, softmax=False).values, al.concept_maps(recording, softmax=False).values)
    steps = [al.record_again(family.pipe, recording, steps=i, texts=CONCEPTS, outputs=True) for i in range(2)]
    maps = [al.concept_maps(one, softmax=False).values for one in steps]
    close(np.mean(maps, 0), al.concept_maps(recording, softmax=False).values)
    other = al.record_again(family.pipe, recording, text="fox", share="joint")
    beside = al.record_again(family.pipe, recording, texts="fox", share="joint")
    found = al.ovam(beside, "fox", mode="bicubic").values
    close(al.daam(other).values[: len(found)], found)


# Tokens


def images(name, count=2):
    return [family_of(name).record({"seed": seed} | ONE_STEP, texts=CONCEPTS, outputs=True)[0] for seed in range(count)]


@cache
def fitted():
    """Two images, masks, and the token that was fitted to them."""
    maps = [al.linear_daam(one) for one in images("flux")]
    masks = [one["fox"] > np.median(one["fox"]) for one in maps]
    return maps, masks, al.fit_token(maps, masks, init="fox", ridge=0.01)


def test_a_token_is_fitted_to_outputs():
    maps, masks, token = fitted()
    assert token.space == "output" and token.metadata["layers"] == maps[0].metadata["layers"]
    assert token.metadata["gradient"] < 1e-6  # of a convex loss: no other token has less
    assert np.mean([((one[token] > 0) == mask).mean() for one, mask in zip(maps, masks, strict=True)]) > 0.85
    stack = al.LinearMap.stack(maps)
    assert stack.size == (2, 8, 12) and stack.space == "output"
    np.testing.assert_allclose(stack["fox"], [one["fox"] for one in maps], rtol=1e-5)  # each image by its own
    close(stack.embed("fox")[None], torch.stack([one.embed("fox") for one in maps]).mean(0)[None])
    near = al.fit_token(maps, masks, init=token, ridge=0.01)
    assert near.space == "output"


def test_files_keep_the_space(tmp_path):
    maps, _, token = fitted()
    again = al.LinearMap.load(maps[0].save(tmp_path / "map"))
    assert again.space == "output" and list(again.vectors) == CONCEPTS
    np.testing.assert_allclose(again["fox"], maps[0]["fox"], atol=2e-3 * np.abs(maps[0]["fox"]).max())
    library = al.TokenLibrary.load(al.TokenLibrary([token]).save(tmp_path / "tokens"))
    assert library["fox"].space == "output" and library["fox"].metadata["layers"] == token.metadata["layers"]
    np.testing.assert_array_equal(maps[0][library["fox"]], maps[0][token])
    recording = recorded("sd3")
    other = al.Recording.load(recording.save(tmp_path / "sd3"))[0]
    np.testing.assert_array_equal(al.concept_maps(other).values, al.concept_maps(recording).values)
    np.testing.assert_array_equal(al.linear_daam(other)["fox"], al.linear_daam(recording)["fox"])
    assert other.nbytes == recording.nbytes


def test_a_token_of_another_space_is_refused():
    maps, _, token = fitted()
    made = token.metadata | {"space": "text"}
    text = al.Token("tree", token.value, metadata=made)
    with pytest.raises(ValueError, match=r"token 'tree' lies in text space, .* does not fit output space"):
        _ = maps[0][text]
    flat = al.LinearMap(maps[0].matrix, maps[0].bias, maps[0].size, None, maps[0].metadata | {"space": "text"})
    with pytest.raises(ValueError, match=r"token 'fox' lies in output space, of layers \['transformer_blocks.0.attn'"):
        _ = flat[token]
    with pytest.raises(ValueError, match="output space"):
        al.TokenLibrary([text, token])
    with pytest.raises(ValueError, match="scale, space"):
        al.LinearMap.stack([maps[0], flat])
    assert al.Token("old", token.value).space == "text"
    static = family_of("pixart_sigma").record(ONE_STEP)[0]
    with pytest.raises(ValueError, match="lies in output space"):
        al.ovam(static, [token, "tree"])
    linear = al.linear_daam(static)
    old = al.LinearMap(linear.matrix, linear.bias, linear.size, None, linear.metadata.copy())
    del old.metadata["space"]  # as in files of earlier versions
    assert linear.space == old.space == al.LinearMap.stack([linear, old]).space == "text"


# Refusals


def test_maps_without_outputs_or_texts():
    family = family_of("flux")
    recording = family.record(ONE_STEP, texts="fox")[0]
    with pytest.raises(ValueError, match=r"kept no outputs of attention: record_again\(pipe, recording, texts="):
        al.concept_maps(recording)
    with pytest.raises(ValueError, match="has no linear map of texts"):
        al.linear_daam(recording)
    again = al.record_again(family.pipe, recording, texts="fox", outputs=True)
    with pytest.raises(ValueError, match=r"has not read \['tree'\] beside the image, only 'fox'"):
        al.concept_maps(again, ["fox", "tree"])
    for asked in (None, ["fox", "fox"]):
        with pytest.raises(ValueError, match="1 concepts: give two or more"):
            al.concept_maps(again, asked)
    linear = al.linear_daam(again)
    with pytest.raises(ValueError, match=r"it has read 'fox', and not 'tree': record_again"):
        _ = linear["tree"]
    with pytest.raises(ValueError, match="leave heads= out"):
        al.linear_daam(again, heads=0)
    with pytest.raises(ValueError, match="fit_token finds the best"):
        al.optimize_token([linear], [linear["fox"] > 0], init="fox", preset="thesis")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("kandinsky5", "the text asks nothing of the image"),
        ("deepfloyd_if", "the text asks nothing of the image"),
        ("pixart_sigma", "words lie in the space of text embeddings"),
        ("pag", "words lie in the space of text embeddings"),
    ],
)
def test_what_has_no_outputs(name, message):
    with pytest.raises(ValueError, match=message):
        family_of(name).record(ONE_STEP, outputs=True)


def test_concept_maps_of_cross_attention():
    with pytest.raises(ValueError, match="take ovam, or linear_daam"):
        al.concept_maps(family_of("pixart_sigma").record(ONE_STEP)[0], ["fox", "snow"])


def test_words_of_the_prompt_can_be_concepts():
    """The prompt is a text as any other; without texts outputs make a linear map alone."""
    recording = family_of("flux").record(ONE_STEP, outputs=True)[0]
    assert not recording.trace.beside and al.linear_daam(recording).vectors == {}
    with pytest.raises(ValueError, match="0 concepts"):
        al.concept_maps(recording)
    assert PROMPT in family_of("flux").record(ONE_STEP, texts=PROMPT, outputs=True)[0].trace.beside
