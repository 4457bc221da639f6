"""GoCA's maps: against heads, layers and self-attention written out in float64, in small pipelines of each kind."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from conftest import PROMPT as SHORT
from diffusers import UNet2DConditionModel
from small_pipelines import OTHER, PROMPT
from small_pipelines.checks import Family, again, close, count_hooks

import attnlab as al
from attnlab.recording.adapters import adapter_of
from attnlab.recording.agreement import AgreementStore
from attnlab.recording.layers import head_weights, heads_agreed
from experiments.bundled.localize import agreeing_maps

family_of = cache(Family)
BESIDE = ["pag", "pixart_alpha", "hunyuan_dit", "animate_diff", "kolors"]  # the image's own attention is apart
JOINT = ["flux", "sd3", "z_image", "flux2", "lumina2", "hunyuan_image", "hidream"]
GRID = 4, 6  # on which layers are compared; those of small pipelines have 8 x 12 pixels, or half as many
WORDS = ["house", "smoke", "car"]


# The reference: every head, pixel and layer in turn


def line(pixels, cells):
    """The weights (cell, pixel) of bilinear resizing along one side."""
    weights = torch.zeros(cells, pixels, dtype=torch.float64)
    for cell in range(cells):
        place = min(max((cell + 0.5) * pixels / cells - 0.5, 0), pixels - 1)
        first = min(int(place), max(pixels - 2, 0))
        weights[cell, first] = 1 - (place - first)
        if pixels > 1:
            weights[cell, first + 1] = place - first
    return weights


def resizing(size, grid):
    return torch.kron(line(size[0], grid[0]), line(size[1], grid[1]))


def mean_of_heads(probabilities, added):
    """The map (token, pixel) of probabilities (head, pixel, token), and what heads add (head, pixel, channel)."""
    heads, pixels, tokens = probabilities.shape
    found = torch.zeros(tokens, pixels, dtype=torch.float64)
    for pixel in range(pixels):
        whole = sum(added[head, pixel] for head in range(heads))
        products = [float(added[head, pixel] @ whole) for head in range(heads)]
        weights = [product / sum(products) for product in products]
        assert abs(sum(weights) - 1) < 1e-9
        for head in range(heads):
            found[:, pixel] += weights[head] * probabilities[head, pixel]
    return found


def global_map(steps, sizes, grid):
    """The weighted mean of layers (token, row, column), clamped.

    `steps` hold, by layer in order, (map (token, pixel), self-attention (pixel, pixel), features (pixel, channel)).
    """
    largest = max(sizes.values(), key=lambda size: size[0] * size[1])
    agreement, maps = dict.fromkeys(sizes, 0.0), dict.fromkeys(sizes, 0)
    for step in steps:
        middle = list(sizes)[len(sizes) // 2]
        features = resizing(sizes[middle], grid) @ step[middle][2]
        reference = (features @ features.T / features.shape[1] ** 0.5).softmax(-1)
        for name, (found, looks, _) in step.items():
            cells = resizing(sizes[name], grid)
            agreement[name] += max(0, float((reference * (cells @ looks @ cells.T)).sum()))
            maps[name] = maps[name] + found / len(steps)
    total = sum(agreement.values())
    values = sum(agreement[n] / total * maps[n] @ resizing(size, largest).T for n, size in sizes.items())
    return values.clamp(min=0).unflatten(-1, largest)


def rescaled(values, words, chosen):
    """The words' maps: mean over tokens, divided by their sum, stretched to 0..1."""
    tokens = {word.text: list(word.tokens) for word in words}
    kept = torch.stack([values[tokens[word]].mean(0) for word in chosen])
    kept = kept / kept.sum(0)
    return torch.stack([(one - one.min()) / (one.max() - one.min()) for one in kept])


def weight_after(family, name, channels):
    """What follows a layer's attention: its own weight, or in single blocks the block's, which joins more to it."""
    module, block = family.denoiser.get_submodule(name), family.denoiser.get_submodule(name.rpartition(".")[0])
    out = getattr(module, "to_out", None)
    out = block.proj_out if out is None else out if isinstance(out, torch.nn.Linear) else out[0]
    return out.weight.double()[:, :channels]


def layer_of(family, call, row, part, name, share):
    """The map, self-attention and features of a layer in one call of the denoiser."""
    met, same = call.met[name], part.pixels
    whole = met.probabilities(row, same)
    value = met.value[row].double().repeat_interleave(len(whole) // met.value.shape[1], 0)
    given = whole @ value  # (head, pixel, width)
    parts = weight_after(family, name, given.shape[0] * given.shape[2]).split(given.shape[2], 1)
    added = torch.stack([one @ part.T for one, part in zip(given, parts, strict=True)])
    seen = met.probabilities(row, same, part.text) if share == "text" else whole[..., part.text]
    maps = mean_of_heads(seen, added)
    if not name.endswith("attn2"):
        return maps, met.probabilities(row, same, same).mean(0), added.sum(0)
    own = name.replace("attn2", "attn1")
    return maps, call.met[own].probabilities(row).mean(0), call.outputs[own][row].double()


@torch.no_grad()
def expected(family, sizes, answer=None, share="text"):
    answer = family.answer if answer is None else answer
    steps = []
    for number in answer.steps:
        row, call = answer.rows[number][0], answer.calls[number]
        parts = answer.parts(number, row)
        steps.append({name: layer_of(family, call, row, parts[name], name, share) for name in sizes})
    return global_map(steps, sizes, GRID)


@cache
def recorded(name, share="text"):
    return family_of(name).record(agreement=GRID[0], layers="all", share=share)[0]


@pytest.mark.parametrize(("name", "share"), [*((n, "text") for n in (*BESIDE, *JOINT)), ("flux", "joint")])
def test_maps_are_those_of_the_reference(name, share):
    recording = recorded(name, share)
    values = expected(family_of(name), recording.trace.sizes, share=share)
    found = al.goca(recording, rescaled=False)
    close(found.values, values[: len(found.values)])
    assert found.special == al.daam(recording).special and found.words == recording.words
    found = al.goca(recording, words=WORDS)
    assert list(found) == WORDS and found.values.min() == 0 and (found.values.max((1, 2)) == 1).all()
    close(found.values, rescaled(values, recording.words, WORDS), 1e-4)  # differences are stretched, and rounding too
    assert np.abs(found.values - al.goca(recording)[WORDS[0]]).max() > 1e-3  # other words share out pixels otherwise


@pytest.mark.parametrize("name", JOINT)
@torch.no_grad()
def test_what_attention_gives_meets_these_weights_first(name):
    """What follows a joint attention is asked for its heads side by side, the image's alone or of all tokens."""
    family, asked = family_of(name), {}
    adapter, (number, *_) = adapter_of(family.pipe), family.answer.steps
    row, call = family.answer.rows[number][0], family.answer.calls[number]
    handles = []
    for layer, module in adapter.attentions.items():
        out = getattr(module, "to_out", None)
        out = family.denoiser.get_submodule(layer.rpartition(".")[0]).proj_out if out is None else out
        out = out[0] if isinstance(out, torch.nn.ModuleList) else out
        handles.append(out.register_forward_pre_hook(lambda _, args, layer=layer: asked.update({layer: args[0]})))
        width = call.met[layer].output.shape[1] * call.met[layer].output.shape[3]
        assert torch.equal(adapter.output_weight(layer, width), out.weight[:, :width])
    again(family.denoiser, call.given)
    for handle in handles:
        handle.remove()
    for layer, part in family.answer.parts(number, row).items():
        given = call.met[layer].output[row, :, part.pixels].transpose(0, 1).flatten(1)
        found = asked[layer][row, :, : given.shape[1]]
        close(found if len(found) == len(given) else found[part.pixels], given, 1e-5)


@pytest.mark.parametrize("name", ["pag", "flux"])
def test_chosen_layers_weigh_by_themselves(name):
    """Also where they were chosen while recording: then the reference is the middle one of these."""
    recording, family = recorded(name), family_of(name)
    layers = list(recording.trace.sizes)[-2:]
    weights = torch.stack([recording.trace.agreement[n] for n in layers])
    weights = weights / weights.sum()
    maps = [al.goca(recording, rescaled=False, layers=[n]).values for n in layers]
    if maps[0].shape == maps[1].shape:
        found = al.goca(recording, rescaled=False, layers=layers).values
        np.testing.assert_allclose(found, float(weights[0]) * maps[0] + float(weights[1]) * maps[1], atol=1e-6)
    fewer = family.record(agreement=GRID[0], layers=layers)[0]
    values = expected(family, fewer.trace.sizes)
    close(al.goca(fewer, rescaled=False).values, values[: fewer.trace.length])


def test_recording_it_changes_nothing_else():
    for name in ("pag", "flux"):
        family, recording = family_of(name), recorded(name)
        with al.record(family.pipe, agreement=8):
            image = family.generate()
        assert torch.equal(image, family.plain[0]) and not count_hooks(family.pipe)
        np.testing.assert_array_equal(al.daam(recording).values, al.daam(family.recording[0]).values)


def test_another_text():
    """In cross-attention any; in joint attention what the model read in the prompt's place."""
    pag, flux = family_of("pag"), family_of("flux")
    padded = recorded("pag").encode(PROMPT).embedding
    found = al.goca(recorded("pag"), padded, rescaled=False).values  # the prompt's own embeddings, every token
    close(found, expected(pag, recorded("pag").trace.sizes))
    assert list(al.goca(recorded("pag"), OTHER)) == list(al.ovam(recorded("pag"), OTHER))
    same = al.record_again(flux.pipe, flux.recording[0], agreement=GRID[0])
    np.testing.assert_allclose(al.goca(same).values, al.goca(recorded("flux")).values, atol=1e-6)
    other = al.record_again(flux.pipe, flux.recording[0], text=OTHER, agreement=GRID[0])
    maps = al.goca(other)
    assert list(maps) == list(al.daam(other)) and len(maps) != len(al.goca(same))
    with pytest.raises(ValueError, match=r"record_again\(pipe, recording, text='a red car', agreement=16\)"):
        al.goca(same, "a red car")


@pytest.mark.parametrize("name", ["pag", "flux"])
def test_a_file_has_the_same(name, tmp_path):
    recording = recorded(name)
    loaded = al.Recording.load(recording.save(tmp_path / name), recording.encoder)
    np.testing.assert_array_equal(al.goca(loaded).values, al.goca(recording).values)
    less = {name: x for name, x in list(recording.trace.agreement.items())[1:]}
    path = al.Recording(None, [replace(recording.trace, agreement=less)]).save(tmp_path / "less")
    with pytest.raises(ValueError, match="agreement do not fit"):
        al.Recording.load(path)


# By hand


def test_heads_by_hand():
    """One pixel, two heads, two tokens; the second head works against the first, and would push shares below 0."""
    probabilities = torch.tensor([[[1.0], [0.0]], [[0.5], [0.5]]])  # (head, token, pixel)
    outputs = torch.tensor([[[3.0, 0], [7, 7]], [[-2, 0], [0, 0]]])  # (head, token, channel)
    # the heads add (3, 0) and (-1, 0), all add (2, 0): products 6 and -2, weights 1.5 and -0.5
    torch.testing.assert_close(head_weights(torch.tensor([[6.0], [-2]])), torch.tensor([[1.5], [-0.5]]))
    torch.testing.assert_close(heads_agreed(probabilities, outputs), torch.tensor([[[1.25], [-0.25]]]))
    assert head_weights(torch.zeros(2, 1)).eq(0).all()  # where nothing is added


def test_weights_of_heads_add_up_to_one():
    given = torch.randn(3, 4, 5, generator=al.seed(0))  # (head, pixel, channel)
    weights = head_weights((given * given.sum(0)).sum(-1))
    torch.testing.assert_close(weights.sum(0), torch.ones(4))


def test_layers_by_hand():
    """Two cells whose features have nothing in common, so that each is like itself alone."""
    trace = replace(recorded("flux").trace, agreement={}, agreed={})
    features = torch.eye(2) * 100
    looks = {"a": torch.tensor([[0.5, 0.5], [0.5, 0.5]]), "b": torch.eye(2), "c": torch.tensor([[0.25, 0.75], [0, 1]])}
    taken = {name: (None, one, features if name == "b" else torch.ones(2, 2)) for name, one in looks.items()}
    store = AgreementStore(adapter_of(family_of("flux").pipe), 1, "text")
    for _ in range(2):
        store.put(trace, taken)
    assert {name: float(x) for name, x in trace.agreement.items()} == {"a": 2, "b": 4, "c": 2.5} and not trace.agreed


def test_words_by_hand():
    """Two layers of two pixels: weights 3/4 and 1/4, of which one gives a share below 0."""
    trace = recorded("flux").trace
    names, length = list(trace.sizes)[:2], trace.length
    tokens = {word.text: word.tokens[0] for word in trace.words}
    maps = {name: torch.zeros(length, 2) for name in names}
    maps[names[0]][tokens["house"]] = torch.tensor([0.8, 0.4])
    maps[names[0]][tokens["smoke"]] = torch.tensor([0.0, 0.4])
    maps[names[1]][tokens["smoke"]] = torch.tensor([-0.4, 1.2])
    agreement = dict(zip(names, map(torch.tensor, (0.3, 0.1)), strict=True))
    given = {"sizes": dict.fromkeys(names, (1, 2)), "agreement": agreement, "agreed": maps, "steps": [0], "calls": []}
    recording = al.Recording(None, [replace(trace, **given)])
    found = al.goca(recording, rescaled=False)
    np.testing.assert_allclose(found["house"], [[0.6, 0.3]], atol=1e-7)
    np.testing.assert_allclose(found["smoke"], [[0.0, 0.6]], atol=1e-7)  # not -0.1
    found = al.goca(recording, words=["smoke", "house"])  # shares 0 and 2/3 of smoke, 1 and 1/3 of the house
    np.testing.assert_allclose(found.values, [[[0, 1]], [[1, 0]]], atol=1e-6)


# The bundled model's kind, and what is refused


def test_a_photo_and_several_images(pipe, levels, generate):
    with al.record(levels, agreement=8) as recording:
        generate(["a house", SHORT], pipe=levels, steps=2, height=64, width=96)
    with al.record(levels, agreement=8) as single:
        generate([SHORT, SHORT], pipe=levels, steps=2, height=64, width=96)
    assert al.goca(recording[1]).values.shape == (5, 16, 24)
    np.testing.assert_allclose(al.goca(recording[1]).values, al.goca(single[1]).values, atol=1e-3)
    photo = al.record_image(pipe, np.zeros((64, 64, 3), np.uint8), SHORT, agreement=8, generator=al.seed(0))
    assert list(al.goca(photo)) == SHORT.split()


@pytest.mark.parametrize("height", [0, -1, True, 1.5, "16", [16], float("nan")])
def test_a_grid_has_a_height(pipe, height):
    with pytest.raises(ValueError, match="give the height of a grid"), al.record(pipe, agreement=height):
        pass


@pytest.mark.parametrize("kept", [{"keep": "sum"}, {"keep": "contributions"}, {"texts": "a tree"}])
def test_queries_are_needed(pipe, kept):
    with pytest.raises(ValueError, match="add keep='queries'"), al.record(pipe, agreement=8, **kept):
        pass


@pytest.mark.parametrize("name", ["sana", "kandinsky5", "deepfloyd_if"])
def test_self_attention_that_is_not_seen(name):
    pipe = family_of(name).pipe
    with pytest.raises(TypeError, match="agreement= out"), al.record(pipe, agreement=8):
        pass


def test_blocks_without_self_attention(pipe):
    unet = UNet2DConditionModel.from_config(pipe.unet.config, only_cross_attention=True)
    other = type(pipe)(**{**pipe.components, "unet": unet}, requires_safety_checker=False)
    with pytest.raises(TypeError, match="has no self-attention before it"), al.record(other, agreement=8):
        pass


class ByItself:
    """Attention that does not ask `to_k`."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        return attn.to_q(hidden_states)


def test_self_attention_that_another_processor_makes(levels, generate):
    module = levels.unet.get_submodule("up_blocks.2.attentions.0.transformer_blocks.0.attn1")
    before = module.processor
    module.set_processor(ByItself())
    try:
        with pytest.raises(RuntimeError, match="without agreement="), al.record(levels, agreement=8):
            generate(pipe=levels, steps=1)
    finally:
        module.set_processor(before)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"words": []}, ValueError, "0 words: give two or more"),
        ({"words": "smoke"}, ValueError, "1 words: give two or more"),
        ({"words": ("smoke", 0)}, ValueError, "1 words: give two or more"),  # the first one of that word
        ({"words": ["smoke", "zebra"]}, KeyError, "zebra"),
        ({"layers": "nowhere"}, ValueError, "no layer fits"),
        ({"mode": "nearest"}, ValueError, "bilinear"),
    ],
)
@pytest.mark.parametrize("name", ["pag", "flux"])
def test_wrong_input(name, call, error, message):
    with pytest.raises(error, match=message):
        al.goca(recorded(name), **call)


def test_recordings_without_agreement(recording):
    for one in (recording, family_of("flux").recording[0]):
        with pytest.raises(ValueError, match=r"record\(pipe, agreement=16\)"):
            al.goca(one)
    two = al.Recording(None, [recorded("flux").trace] * 2)
    with pytest.raises(ValueError, match="choose one"):
        al.goca(two)


def test_what_is_not_finite():
    trace = recorded("flux").trace
    broken = {name: x * np.nan for name, x in trace.agreed.items()}
    with pytest.raises(ValueError, match="NaN or infinity"):
        al.goca(al.Recording(None, [replace(trace, agreed=broken)]))


def test_asked_by_number_and_occurrence():
    recording = recorded("flux")
    first = recording.words[0].text
    found = al.goca(recording, words=[0, (first, 1), "burning house"])
    assert list(found) == [(first, 0), (first, 1), "burning house"]
    expected = al.goca(recording, rescaled=False)
    kept = np.stack([expected[0], expected[first, 1], expected["burning house"]])
    kept = kept / kept.sum(0)
    low, high = kept.min((1, 2), keepdims=True), kept.max((1, 2), keepdims=True)
    np.testing.assert_allclose(found.values, (kept - low) / (high - low), atol=1e-5)


def test_agreeing_maps(pipe):
    """GoCA's maps of the words that are asked for, and of the only word of a caption, which shares out no pixel."""
    image = np.zeros((64, 64, 3), np.uint8)
    for caption, words in (("a red car beside a house", ["car", "house"]), ("smoke", ["smoke"])):
        recording = al.record_image(pipe, image, caption, timesteps=300, agreement=16, generator=al.seed(0))
        found = agreeing_maps(recording, words)
        expected = al.goca(recording, **({"words": words} if len(words) > 1 else {"rescaled": False}))
        assert list(found) == words and all(np.array_equal(found[word], expected[word]) for word in words)
