"""Contribution maps: against attention, values and outputs written out in float64, in real U-Nets of each family."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import PROMPT
from peft import LoraConfig
from test_families import KINDS, build, run

import attnlab as al
from attnlab.recording.layers import Layer, attention, contributed

FAMILIES = ["tiny", *KINDS]
LAYER = "up_blocks.2.attentions.0.transformer_blocks.0.attn2"


class PlainContributions:
    """Attention written out in float64, as the model generates; what its tokens add is kept, one call after another.

    Of the last image of the batch, in the layer's unit: projections (head, token, pixel) and norms (token, pixel).
    """

    def __init__(self, store):
        self.store = store

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        text, out, heads = encoder_hidden_states, attn.to_out[0], attn.heads
        q, k, v = (f(x).double() for f, x in ((attn.to_q, hidden_states), (attn.to_k, text), (attn.to_v, text)))
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        probabilities = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        mixed = (probabilities @ v).transpose(1, 2).flatten(2)
        self.store.append(self.measure(probabilities[-1], v[-1], out.weight.double(), mixed[-1]))
        return out(mixed.to(hidden_states.dtype))

    def measure(self, probabilities, values, weight, mixed):
        """Add up over heads; `mixed` @ weight is the layer's output, what all of them must add up to."""
        whole = mixed @ weight.T  # (pixel, channel)
        direction, width = whole / whole.norm(dim=-1, keepdim=True), values.shape[-1]
        projections, vectors = [], 0
        for head, (p, v) in enumerate(zip(probabilities, values, strict=True)):
            part = weight[:, head * width : (head + 1) * width]
            added = p.T[:, :, None] * (v @ part.T)[:, None]  # (token, pixel, channel)
            projections.append((added * direction).sum(-1))
            vectors = vectors + added
        torch.testing.assert_close(vectors.sum(0), whole)
        unit = whole.norm(dim=-1).mean()
        return torch.stack(projections) / unit, vectors.norm(dim=-1) / unit


@pytest.fixture(scope="module")
def pipes(pipe):
    """pipes(name): the bundled model, or a small one of Stable Diffusion's real classes."""
    made = {"tiny": pipe} | {name: kinds[0](**build(name, pipe.tokenizer)) for name, kinds in KINDS.items()}
    return made.__getitem__


def cross_attentions(pipe):
    return {n: m for n, m in pipe.unet.named_modules() if n.endswith("attn2") and "mid" not in n}


def close(found, expected, rtol=1e-4):
    """Maps of the first tokens, of one layer in its own size, with the reference (token, pixel)."""
    found = torch.from_numpy(found.values).flatten(1).double()
    torch.testing.assert_close(found, expected[: len(found)], atol=rtol * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_are_what_the_model_adds(pipes, name):
    """Each layer, head and kind, with guidance, in a batch and an image that is not square."""
    pipe, prompts = pipes(name), ["a red car", PROMPT]
    layers = cross_attentions(pipe)
    before, stores = {n: m.processor for n, m in layers.items()}, {n: [] for n in layers}
    for layer, module in layers.items():
        module.set_processor(PlainContributions(stores[layer]))
    with al.record(pipe) as recording:
        run(pipe, steps=2, prompt=prompts, height=64, width=96)
    for layer, module in layers.items():
        module.set_processor(before[layer])
    recording = recording[1]
    for layer, store in stores.items():
        projections, norms = (sum(part) / len(store) for part in zip(*store, strict=True))
        close(al.contributions(recording, kind="norm", layers=layer), norms)
        close(al.contributions(recording, kind="projection", layers=layer), projections.sum(0))
        heads = al.contributions(recording, kind="projection", layers=layer, per="head")
        assert len(heads) == len(projections)
        for (_, head), maps in heads.items():
            close(maps, projections[head])
        last = al.contributions(recording, kind="projection", layers=layer, per="step")[1]
        close(last, store[1][0].sum(0))


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_add_up_to_the_layers_output(pipes, name):
    """A hook on the layer, whatever kernel it runs: its output without the bias."""
    pipe = pipes(name)
    layers = cross_attentions(pipe)
    outputs = {n: [] for n in layers}
    handles = [m.register_forward_hook(lambda m, args, out, n=n: outputs[n].append(out)) for n, m in layers.items()]
    with al.record(pipe, steps=1) as recording:
        run(pipe, steps=2)
    for handle in handles:
        handle.remove()
    trace = recording.trace
    for n, module in layers.items():
        layer = trace.layers[n]
        p = attention(layer.queries(trace.queries[n][0]), layer.keys(trace.text) * layer.scale)
        added = torch.einsum("htp,htc->pc", p, layer.outputs(trace.text)) + module.to_out[0].bias
        expected = outputs[n][1][-1]
        torch.testing.assert_close(added, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)


def test_by_hand():
    """One pixel, two heads; three tokens, of which the second is looked at and adds nothing."""
    probabilities = torch.tensor([[[0.5], [0.5], [0.0]], [[0.25], [0.5], [0.25]]])  # (head, token, pixel)
    outputs = torch.tensor([[[8.0, 0], [0, 0], [5, 5]], [[0, 12], [0, 0], [-4, 0]]])  # (head, token, channel)
    # the first token adds (4, 0) and (0, 3), the last (-1, 0): o is (3, 3)
    length, both = 18**0.5, [[0, 1]]
    found = contributed(probabilities, outputs, "norm", both)[0, :, 0]
    torch.testing.assert_close(found, torch.tensor([5.0, 0, 1]) / length)
    found = contributed(probabilities, outputs, "projection", both)[0, :, 0]
    torch.testing.assert_close(found, torch.tensor([7.0, 0, -1]) / 2**0.5 / length)
    found = contributed(probabilities, outputs, "projection", [[0], [1]])[:, 0, 0]
    torch.testing.assert_close(found, torch.tensor([4.0, 3]) / 2**0.5 / length)
    found = contributed(probabilities, outputs, "norm", [[1]])[0, :, 0]
    torch.testing.assert_close(found, torch.tensor([3.0, 0, 1]) / length)
    assert contributed(probabilities, 0 * outputs, "norm", both).eq(0).all()


def test_the_unit_is_the_mean_length_over_pixels():
    """Projections of all tokens add up to the length of o, which is 1 on the mean; a layer's scale does not count."""
    generator = al.seed(3)
    probabilities = torch.rand(2, 4, 5, 9, generator=generator).softmax(-2)  # two steps, four heads
    outputs = torch.randn(4, 5, 6, generator=generator)
    found = contributed(probabilities, outputs, "projection", [[0, 1, 2, 3]])
    torch.testing.assert_close(found.sum(-2).mean(-1), torch.ones(2, 1))
    for kind in ("norm", "projection"):
        other = contributed(probabilities, 100 * outputs, kind, [[0, 2]])
        torch.testing.assert_close(other, contributed(probabilities, outputs, kind, [[0, 2]]))


def reference(pipe, recording, embedding, layer):
    """Projections and norms of a text (token, text width) that meets a layer's recorded queries, mean over steps."""
    module = cross_attentions(pipe)[layer]
    k, v = (f(embedding).double().unflatten(-1, (module.heads, -1)).transpose(0, 1) for f in (module.to_k, module.to_v))
    weight, found = module.to_out[0].weight.double(), []
    for queries in recording.trace.queries[layer]:
        q = queries.double().unflatten(-1, (module.heads, -1)).transpose(0, 1)
        p = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        found.append(PlainContributions([]).measure(p, v, weight, (p @ v).transpose(0, 1).flatten(1)))
    return [sum(part) / len(found) for part in zip(*found, strict=True)]


@torch.no_grad()
def test_any_text(pipe, recording):
    layer, text = LAYER, recording.encode("fire and a tree")
    for padded, embedding in ((True, text.embedding), (False, text.embedding[: text.length])):
        projections, norms = reference(pipe, recording, embedding, layer)
        choice = {"layers": layer, "padded": padded}
        close(al.contributions(recording, text.text, kind="norm", **choice), norms)
        close(al.contributions(recording, text.text, kind="projection", **choice), projections.sum(0))
        chosen = al.contributions(recording, text.text, kind="projection", heads=[0, 2], **choice)
        close(chosen, projections[[0, 2]].sum(0))
    projections, norms = reference(pipe, recording, text.embedding[1:4], layer)
    close(al.contributions(recording, text.embedding[1:4], kind="norm", layers=layer), norms)
    close(al.contributions(recording, "fire and a tree", special=False, layers=layer, kind="norm"),
          reference(pipe, recording, text.embedding[1 : text.length - 1], layer)[1])  # fmt: skip


def test_the_padded_prompt_as_text_is_the_prompt(recording):
    for kind in ("norm", "projection"):
        expected = al.contributions(recording, kind=kind)
        np.testing.assert_array_equal(
            al.contributions(recording, PROMPT, padded=True, kind=kind).values, expected.values
        )
    whole = al.contributions(recording, "a car and a red house in an urban environment")
    part = al.contributions(recording, "red house", context="a car and a {} in an urban environment")
    np.testing.assert_array_equal(part["red house"], whole["red house"])


@pytest.fixture(scope="module")
def of_levels(levels, generate):
    """A generation of PROMPT, whose maps are of two sizes."""
    with al.record(levels) as recording:
        generate(pipe=levels)
    return recording


@pytest.mark.parametrize("kind", ["norm", "projection"])
def test_layers_and_steps_count_the_same(of_levels, kind):
    """All is the mean of what `per` tells apart; projections add up over heads."""
    recording = of_levels
    everything = al.contributions(recording, kind=kind).values
    for per in ("layer", "step"):
        parts = al.contributions(recording, kind=kind, per=per).values()
        np.testing.assert_allclose(np.mean([maps.values for maps in parts], 0), everything, atol=1e-5)
    if kind == "projection":
        heads = al.contributions(recording, kind=kind, per="head")
        layers = len({layer for layer, _ in heads})
        np.testing.assert_allclose(sum(maps.values for maps in heads.values()) / layers, everything, atol=1e-5)


def test_are_propagated_and_upscaled(recording):
    flat = np.full((256, 256), 1 / 256, np.float32)
    maps = al.contributions(recording)
    found = al.propagate(maps, torch.from_numpy(flat), (16, 16))["smoke"]
    np.testing.assert_allclose(found, maps["smoke"].mean(), atol=1e-5)
    assert maps.upscale(64)["smoke"].shape == (64, 64)


def test_bicubic_projections_keep_their_sign(of_levels):
    """Also where a layer's maps are enlarged, which clamps those of attention."""
    layers = al.contributions(of_levels, kind="projection", mode="bicubic", per="layer")
    sizes = of_levels.trace.sizes
    assert {sizes[name][0] for name, maps in layers.items() if maps.values.min() < 0} == {16, 8}


@pytest.fixture(scope="module")
def streamed(levels, generate):
    with al.record(levels, keep="contributions", texts="fire and a tree") as streamed:
        generate(pipe=levels)
    return streamed


@pytest.mark.parametrize("text", [None, "fire and a tree"])
def test_streamed_are_those_of_kept_queries(of_levels, streamed, text, tmp_path):
    assert not streamed.trace.queries
    for found in (streamed, al.Recording.load(streamed.save(tmp_path / "file"), streamed.encoder)):
        for choice in (
            {},
            {"kind": "projection"},
            {"kind": "projection", "heads": [1, 3], "layers": 8},
            {"per": "layer"},
        ):
            expected = al.contributions(of_levels, text, **choice)
            again = al.contributions(found, text, **choice)
            for a, b in zip(again.values(), expected.values(), strict=True) if "per" in choice else [(again, expected)]:
                np.testing.assert_allclose(a.values, b.values, atol=2e-5 * np.abs(b.values).max())
        with pytest.raises(ValueError, match="norms of all heads together"):
            al.contributions(found, text, kind="norm", heads=0)
        with pytest.raises(ValueError, match=r"kept contributions of its prompt, 'fire and a tree' alone"):
            al.daam(found)


def test_a_file_keeps_what_is_needed(recording, tmp_path):
    again = al.Recording.load(recording.save(tmp_path / "file"))
    for text in (None, "a river"):
        found = al.contributions(again, text)
        np.testing.assert_array_equal(found.values, al.contributions(recording, text).values)


@pytest.mark.parametrize("keep", [{"keep": "sum"}, {"keep": "maps"}, {"texts": "smoke"}])
def test_values_are_kept_where_they_can_be_used(pipe, generate, recording, keep):
    with al.record(pipe, **keep) as other:
        generate(steps=1)
    assert all(layer.value is None and layer.out is None for layer in other.trace.layers.values())
    with pytest.raises(ValueError, match="record with keep='queries'"):
        al.contributions(other)
    held = [layer.nbytes for layer in recording.trace.layers.values()]
    assert sum(held) > 2 * sum(layer.nbytes for layer in other.trace.layers.values())


def test_a_file_of_an_earlier_version_has_none(recording, tmp_path, monkeypatch):
    weights = Layer.weights
    only = property(lambda layer: {name: x for name, x in weights.fget(layer).items() if name in ("weight", "bias")})
    monkeypatch.setattr(Layer, "weights", only)
    recording.save(tmp_path / "file")
    monkeypatch.undo()
    again = al.Recording.load(tmp_path / "file")
    np.testing.assert_array_equal(al.daam(again).values, al.daam(recording).values)
    with pytest.raises(ValueError, match=r"no values of .*record again with keep='queries'"):
        al.contributions(again)


@torch.no_grad()
def test_half_precision(pipe, generate, recording):
    """Queries kept in half precision, and a model that computes in it."""
    with al.record(pipe, dtype=torch.float16) as half:
        generate()
    parts = {**pipe.components, "unet": copy.deepcopy(pipe.unet).to(torch.bfloat16)}
    other = type(pipe)(**parts, requires_safety_checker=False)
    with al.record(other, parts=["conditional"]) as coarse:
        text, _ = pipe.encode_prompt(PROMPT, "cpu", 1, False)
        noise = torch.randn(1, 4, 16, 16, generator=al.seed(0)).bfloat16()
        other.unet(noise, 500, text.bfloat16())
    for kind in ("norm", "projection"):
        expected = al.contributions(recording, kind=kind).values
        assert abs(al.contributions(half, kind=kind).values - expected).max() <= 2e-3 * expected.max()
        maps = al.contributions(coarse, kind=kind, layers=LAYER)
        double = SimpleNamespace(unet=copy.deepcopy(other.unet).double())
        projections, norms = reference(double, coarse, coarse.trace.text.double(), LAYER)
        close(maps, norms if kind == "norm" else projections.sum(0))


def changed_copy(pipe):
    other = type(pipe)(**{**pipe.components, "unet": copy.deepcopy(pipe.unet)}, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    return other


def add_lora(unet):
    unet.add_adapter(LoraConfig(r=4, target_modules=["to_v", "to_out.0"], init_lora_weights="gaussian"))
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=al.seed(2))


def add_bias(unet):
    to_v = unet.get_submodule(LAYER).to_v
    to_v.bias = torch.nn.Parameter(torch.randn(to_v.out_features, generator=al.seed(2)))


@pytest.mark.parametrize("change", [add_lora, add_bias])
def test_changed_values(pipe, generate, change):
    """A LoRA at a scale of its own, which only a running layer has, or a bias: tokens add up to the output still."""
    other, outputs = changed_copy(pipe), []
    change(other.unet)
    module = other.unet.get_submodule(LAYER)
    handle = module.register_forward_hook(lambda m, args, output: outputs.append(output))
    with al.record(other) as recording:
        generate(pipe=other, steps=1, cross_attention_kwargs={"scale": 0.5})
    handle.remove()
    trace, layer = recording.trace, recording.trace.layers[LAYER]
    p = attention(layer.queries(trace.queries[LAYER][0]), layer.keys(trace.text) * layer.scale)
    bias = getattr(module.to_out[0], "base_layer", module.to_out[0]).bias
    added = torch.einsum("htp,htc->pc", p, layer.outputs(trace.text)) + bias
    torch.testing.assert_close(added, outputs[0][-1], atol=1e-4 * float(outputs[0].abs().max()), rtol=0)


def test_hidden_tokens_add_nothing(pipe):
    """A model that masks padding, summed up and from kept queries: as if the text ended there."""
    found = []
    for keep in ("queries", "contributions"):
        with al.record(pipe, keep=keep, parts=["conditional"]) as recording, torch.no_grad():
            text, _ = pipe.encode_prompt(PROMPT, pipe.device, 1, False)
            shown = torch.arange(text.shape[1])[None] < 7
            pipe.unet(torch.randn(1, 4, 16, 16, generator=al.seed(0)), 500, text, encoder_attention_mask=shown)
        found.append(recording)
    for kind in ("norm", "projection"):
        expected = al.contributions(found[0], text[0, :7], kind=kind).values
        for recording in found:
            np.testing.assert_allclose(al.contributions(recording, kind=kind).values, expected, atol=1e-5)


def test_other_values_are_other_layers(pipe, generate):
    """Weights of values that change between two images: each keeps its own."""
    other = changed_copy(pipe)
    with al.record(other) as recording, torch.no_grad():
        generate(pipe=other, steps=1)
        other.unet.get_submodule(LAYER).to_v.weight.mul_(2)
        generate(pipe=other, steps=1)
    first, second = (trace.layers[LAYER] for trace in recording.traces)
    torch.testing.assert_close(2 * first.value, second.value)
    pairs = zip(*(trace.layers.values() for trace in recording.traces), strict=True)
    assert sum(one is not other for one, other in pairs) == 1


def test_a_layer_without_values_is_another(recording):
    layer = recording.trace.layers[LAYER]
    less = replace(layer, value=None, value_bias=None, out=None)
    assert layer.same(layer) and less.same(less) and not layer.same(less) and not less.same(layer)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"kind": "length"}, "choose one of projection, norm"),
        ({"padded": True}, "give text=, or leave them out"),
        ({"context": "a {}"}, "give text=, or leave them out"),
        ({"text": "a house", "context": "no hole"}, "write {} once"),
        ({"text": torch.zeros(2, 64)}, r"embeddings are \(token, 128\) for this model"),
        ({"heads": 99}, "cannot be chosen"),
        ({"steps": 77}, r"recorded: \[0, 1, 2, 3\]"),
        ({"per": "word"}, "per is 'step', 'layer' or 'head'"),
    ],
)
def test_wrong_input(recording, call, message):
    with pytest.raises(ValueError, match=message):
        al.contributions(recording, **call)
