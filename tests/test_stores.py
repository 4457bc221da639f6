"""What recordings keep that does not grow with the steps: equal to what kept queries give, also from a file."""

import copy

import numpy as np
import pytest
import torch
from conftest import PROMPT

import attnlab as al
from attnlab.recording.texts import TextEncoder

TEXTS = ["fire and a tree", "smoke"]


@pytest.fixture(scope="module")
def recording(levels, generate):
    """As the fixture that all tests share, of a model whose maps have three sizes."""
    with al.record(levels) as recording:
        generate(pipe=levels)
    return recording


@pytest.fixture(scope="module")
def sums(levels, generate):
    with al.record(levels, keep="sum", texts=TEXTS) as recording:
        generate(pipe=levels)
    return recording


@pytest.fixture(scope="module")
def maps(levels, generate):
    with al.record(levels, keep="maps", self_attention=[16, 8]) as recording:
        generate(pipe=levels)
    return recording


def test_streamed_maps_are_those_of_kept_queries(recording, sums):
    for text in TEXTS:
        for choice in ({}, {"layers": 8, "heads": 1}, {"mode": "bicubic"}):
            expected = al.ovam(recording, text, **choice)
            found = al.ovam(sums, text, **choice)
            assert list(found) == list(expected)
            np.testing.assert_allclose(found.values, expected.values, atol=1e-5 * expected.values.max())


def test_streamed_prompt_is_daam(recording, maps):
    np.testing.assert_allclose(al.daam(maps).values, al.daam(recording).values, atol=1e-5)
    for name, layer in al.daam(recording, per="layer").items():
        np.testing.assert_allclose(al.daam(maps, per="layer")[name].values, layer.values, atol=1e-5)


def test_a_sum_is_all_that_linear_daam_needs(recording, sums):
    for choice in ({}, {"layers": 16, "heads": [0, 2]}):
        expected = al.linear_daam(recording, **choice)
        np.testing.assert_allclose(al.linear_daam(sums, **choice).matrix, expected.matrix, atol=1e-5)


@pytest.mark.parametrize("keep", [{"keep": "sum"}, {"keep": "maps"}, {"texts": TEXTS}, {"self_attention": 16}])
def test_nothing_grows_with_the_steps_and_the_image_is_the_same(pipe, generate, keep):
    held = {}
    for steps in (2, 5):
        with al.record(pipe, **keep) as recording:
            image = generate(steps=steps)
        held[steps] = recording.nbytes - sum(q.nbytes for qs in recording.trace.queries.values() for q in qs)
        assert torch.equal(image, generate(steps=steps))
    assert held[2] == held[5] > 0


@pytest.mark.parametrize("keep", [{"keep": "sum"}, {"keep": "maps"}, {"texts": TEXTS}, {"self_attention": 16}])
def test_a_half_step_leaves_nothing_behind(pipe, generate, keep):
    """An error in the second step, then a whole generation of another size in the same block."""

    def fail(module, args):
        if len(recording) and len(recording.traces[-1].steps) == 1 and not failed:
            failed.append(True)
            raise RuntimeError("out of memory")

    failed = []
    late = pipe.unet.up_blocks[-1].register_forward_pre_hook(fail)
    with al.record(pipe, **keep) as recording:
        with pytest.raises(RuntimeError, match="out of memory"):
            generate()
        generate(height=64, width=96)
    late.remove()
    with al.record(pipe, **keep, steps=0) as first:
        generate()
    with al.record(pipe, **keep) as whole:
        generate(height=64, width=96)
    for found, expected in ((recording[0], first), (recording[1], whole)):
        assert found.trace.steps == expected.trace.steps
        pairs = zip(found.trace.tensors(), expected.trace.tensors(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_hidden_tokens_take_no_part_in_streamed_maps(pipe):
    """A model that masks padding: what is summed up is what kept queries give."""
    found = []
    for keep in ("queries", "maps"):
        with al.record(pipe, keep=keep, parts=["conditional"]) as recording, torch.no_grad():
            text, _ = pipe.encode_prompt(PROMPT, pipe.device, 1, False)
            shown = torch.arange(text.shape[1])[None] < 6
            pipe.unet(torch.randn(1, 4, 16, 16, generator=al.seed(0)), 500, text, encoder_attention_mask=shown)
        found.append(al.daam(recording).values)
    np.testing.assert_allclose(found[1], found[0], atol=1e-6)


def test_a_sum_is_of_what_meets_the_keys(pipe):
    """A model that normalizes its queries: each step's, before they are summed up."""
    unet, found = copy.deepcopy(pipe.unet), []
    for name, module in unet.named_modules():
        if name.endswith("attn2"):
            module.norm_q = torch.nn.LayerNorm(module.to_q.out_features // module.heads)
            torch.nn.init.uniform_(module.norm_q.weight, 0.5, 2)
    other = type(pipe)(**{**pipe.components, "unet": unet}, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    for keep in ("queries", "sum"):
        with al.record(other, keep=keep) as recording:
            other(PROMPT, num_inference_steps=2, generator=al.seed(7), output_type="latent")
        found.append(al.linear_daam(recording).matrix)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_a_text_given_twice_counts_once(pipe, generate):
    with al.record(pipe, texts=["smoke", "smoke"]) as recording:
        generate(steps=2)
    np.testing.assert_allclose(al.ovam(recording, "smoke").values.sum(0), 1, atol=1e-5)


def test_maps_of_a_prompt_that_is_not_known(pipe):
    embedding, _ = pipe.encode_prompt("a house", "cpu", 1, False)
    call = {"guidance_scale": 1.0, "output_type": "latent"}
    with pytest.raises(ValueError, match="give the prompt as text"), al.record(pipe, keep="maps"):
        pipe(prompt_embeds=embedding, num_inference_steps=1, **call)


def test_images_of_a_batch_are_kept_apart(pipe, generate):
    with al.record(pipe, keep="maps", texts=TEXTS) as both:
        generate(["a house", "a tree near a car"], steps=2)
    with al.record(pipe, layers=16) as queries:
        generate(["a house", "a tree near a car"], steps=2)
    for i in range(2):
        found, expected = al.daam(both[i], layers=16), al.daam(queries[i])
        assert list(found) == list(expected)
        np.testing.assert_allclose(found.values, expected.values, atol=1e-5)
        np.testing.assert_allclose(
            al.ovam(both[i], "smoke", layers=16).values, al.ovam(queries[i], "smoke").values, atol=1e-5
        )


def test_both_branches(pipe, generate):
    """Conditional and negative part of the same generation, as each is recorded by itself."""
    call = {"negative_prompt": "a red car", "steps": 2}
    with al.record(pipe, branch="both", generator=al.seed(7)) as both:
        generate(**call)
    assert len(both) == 2 and {t.generation.seed for t in both.traces} == {7}
    for branch, prompt in (("conditional", PROMPT), ("negative", "a red car")):
        with al.record(pipe, branch=branch) as alone:
            generate(**call)
        assert both.branch(branch).prompt == prompt == alone.prompt
        np.testing.assert_array_equal(al.daam(both.branch(branch)).values, al.daam(alone).values)
    with pytest.raises(ValueError, match="only negative"):
        both.branch("negative").branch("conditional")


def test_self_attention_is_the_models_own(levels, generate, maps):
    """Mean over heads, layers and steps of the probabilities that attention written out in float64 has."""
    expected, processors = {}, dict(levels.unet.attn_processors)

    class Written:
        def __call__(self, attn, x, encoder_hidden_states=None, attention_mask=None, temb=None):
            text = x if encoder_hidden_states is None else encoder_hidden_states
            q, k, v = (f(y).double().unflatten(-1, (attn.heads, -1)).transpose(1, 2)
                       for f, y in ((attn.to_q, x), (attn.to_k, text), (attn.to_v, text)))  # fmt: skip
            p = (q @ k.mT * attn.scale + (0 if attention_mask is None else attention_mask[:, None].double())).softmax(
                -1
            )
            if encoder_hidden_states is None:
                expected.setdefault(p.shape[-1], []).append(p[1].mean(0))
            return attn.to_out[0]((p @ v).transpose(1, 2).flatten(2).to(x.dtype))

    levels.unet.set_attn_processor(Written())
    generate(pipe=levels)
    levels.unet.set_attn_processor(processors)
    for height in (16, 8):
        found, size = maps.self_attention(height)
        assert size == (height, height)
        torch.testing.assert_close(found.sum(-1), torch.ones(height**2), atol=1e-4, rtol=0)
        torch.testing.assert_close(found.double(), torch.stack(expected[height**2]).mean(0), atol=1e-4, rtol=1e-3)
        assert found.std(0).mean() > 1e-4  # not constant: pixels look at different places
    assert maps.self_attention()[1] == (16, 16)


def test_propagation():
    """Three pixels, hand-set: the first looks at the second, the second at all, the third at itself."""
    looks = torch.tensor([[0, 1, 0], [1 / 3, 1 / 3, 1 / 3], [0, 0, 1]])
    maps = al.HeatMaps(np.float32([[[0.3, 0.6, 0.9]]]), [], special=False)
    once = al.propagate(maps, looks, (1, 3)).values[0, 0]
    np.testing.assert_allclose(once, [0.6, 0.6, 0.9], atol=1e-6)
    twice = al.propagate(maps, looks, (1, 3), power=2).values[0, 0]
    np.testing.assert_allclose(twice, [0.6, 0.7, 0.9], atol=1e-6)
    np.testing.assert_array_equal(al.propagate(maps, looks, (1, 3), power=0).values, maps.values)
    with pytest.raises(ValueError, match=r"\(4, 4\) for \(2, 2\).*not \(3, 3\)"):
        al.propagate(maps, looks, (2, 2))


def test_files(levels, sums, maps, tmp_path):
    again = al.Recording.load(sums.save(tmp_path / "sums"), TextEncoder.of(levels))
    np.testing.assert_array_equal(al.ovam(again, TEXTS[0]).values, al.ovam(sums, TEXTS[0]).values)
    np.testing.assert_array_equal(al.linear_daam(again).matrix, al.linear_daam(sums).matrix)
    again = al.Recording.load(maps.save(tmp_path / "maps"))
    np.testing.assert_array_equal(al.daam(again).values, al.daam(maps).values)
    torch.testing.assert_close(again.self_attention(8), maps.self_attention(8))


def test_what_was_not_kept_is_said(pipe, recording, sums, maps):
    for call, message in (
        (lambda: al.daam(sums), "maps of 'fire and a tree', 'smoke' alone: record with keep='queries'"),
        (lambda: al.ovam(sums, "a river"), "maps of 'fire and a tree', 'smoke' alone"),
        (lambda: al.ovam(sums, "smoke", padded=True), "maps of 'fire and a tree', 'smoke' alone"),
        (lambda: al.ovam(sums, "smoke", steps=1), "sums over its steps"),
        (lambda: al.ovam(sums, "smoke", per="step"), "sums over its steps"),
        (lambda: al.ovam(maps, "smoke"), r"maps of its prompt \(daam\) alone"),
        (lambda: al.linear_daam(maps), "no queries and no sum"),
        (lambda: recording.self_attention(), "no self-attention was recorded"),
        (lambda: maps.self_attention(32), r"height 32 was not recorded, only of \[8, 16\]"),
        (lambda: al.record(pipe, keep="all").__enter__(), "choose one of queries, sum, maps"),
        (lambda: al.record(pipe, texts=[""]).__enter__(), "at least one word"),
        (lambda: al.record(pipe, texts="a " * 60).__enter__(), "would fall outside"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_self_attention_of_no_such_size(levels, generate):
    with pytest.raises(ValueError, match=r"no self-attention has maps of height \[32\]; there are \[4, 8, 16\]"):
        with al.record(levels, self_attention=32):
            generate(steps=1, pipe=levels)
