"""Listening to attention where it is computed, and shares of it: hand-set numbers, and a softmax in float64."""

import math
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
import torch.nn.functional as F
from small_pipelines.checks import function_modes
from torch import nn

from attnlab.recording.adapters import JointCall
from attnlab.recording.adapters.tap import Attended, listen


class Attention(nn.Module):
    """Calls the function as it is asked to."""

    def forward(self, *args, **kwargs):
        return F.scaled_dot_product_attention(*args, **kwargs)


def heard(*args, **kwargs) -> Attended:
    """What is heard of one call; its output is as it was."""
    attention, found = Attention(), []
    handles = listen(attention, found.append)
    output = attention(*args, **kwargs)
    for handle in handles:
        handle.remove()
    assert torch.equal(output, F.scaled_dot_product_attention(*args, **kwargs))
    assert len(found) == 1 and not function_modes()
    return found[0]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(heads=2, key_heads=2, count=7, rows=2):
    """Queries, keys and values of one attention: three tokens of text, then four pixels."""
    return random(rows, heads, count, 8), random(rows, key_heads, count, 8, seed=1), random(rows, key_heads, count, 8)


TEXT, PIXELS = slice(0, 3), slice(3, 7)


def joint(met: Attended) -> JointCall:
    rows = len(met.query)
    return JointCall(met.query, met.key, met.mask, met.scale, [PIXELS] * rows, [TEXT] * rows)


def in_float64(met: Attended, row: int, share: str) -> torch.Tensor:
    """Shares of each head, mean over heads: (token of the text, pixel)."""
    query, key = met.query[row].double(), met.key[row].double()
    scores = query @ key.repeat_interleave(len(query) // len(key), 0).mT * met.scale
    if met.mask is not None:
        mask = met.mask.expand(len(met.query), len(query), *scores.shape[1:])[row]
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.double()
    if share == "text":
        return scores[:, PIXELS, TEXT].softmax(-1).mean(0).T
    return scores.softmax(-1)[:, PIXELS, TEXT].mean(0).T


def check(met: Attended) -> None:
    for row in range(len(met.query)):
        for share in ("text", "joint"):
            found = joint(met).shares(row, share).double()
            torch.testing.assert_close(found, in_float64(met, row, share), atol=1e-6, rtol=0)


def test_shares_that_are_set_by_hand():
    """A pixel's query of (1, 0) gives the text's keys scores of log 1 and log 3, those of the image log 2."""
    scores = torch.tensor([1.0, 3.0, 2.0, 2.0]).log()
    key = torch.stack([scores, random(4)], -1)[None, None]
    query = torch.tensor([1.0, 0.0]).expand(1, 1, 4, 2)
    met = heard(query, key, random(1, 1, 4, 2), scale=1.0)
    call = JointCall(met.query, met.key, None, met.scale, [slice(2, 4)], [slice(0, 2)])
    assert call.count == 2
    text, all_of_it = call.shares(0, "text"), call.shares(0, "joint")
    for share, found in (("text", text), ("joint", all_of_it)):  # of few tokens, by another way
        for kept in (1, len(found) - 1):
            torch.testing.assert_close(call.shares(0, share, kept=kept), found[:kept], atol=1e-6, rtol=0)
    torch.testing.assert_close(text, torch.tensor([[0.25, 0.25], [0.75, 0.75]]))
    torch.testing.assert_close(all_of_it, torch.tensor([[1 / 8, 1 / 8], [3 / 8, 3 / 8]]))


def test_scale_is_the_functions_own_unless_given():
    query, key, value = tokens()
    assert heard(query, key, value).scale == pytest.approx(8**-0.5)
    assert heard(query, key, value, scale=0.7).scale == 0.7
    assert heard(query, key, value, None, 0.0, False, scale=0.5).scale == 0.5


@pytest.mark.parametrize("scale", [None, 0.1, 2.0])
@pytest.mark.parametrize("heads", [(1, 1), (2, 2), (4, 2), (6, 1)], ids=str)
def test_shares_are_those_of_float64(heads, scale):
    """Heads of queries may share those of keys; a scale may be any."""
    query, key, value = tokens(*heads)
    met = heard(query, key, value, scale=scale, enable_gqa=heads[0] != heads[1])
    check(met)


@pytest.mark.parametrize(
    "shape", [(2, 1, 1, 7), (2, 2, 7, 7), (1, 1, 7, 7), (2, 1, 7, 7), (1, 2, 1, 7), (7, 7)], ids=str
)
@pytest.mark.parametrize("kind", ["additive", "bool"])
def test_masks_of_any_shape(shape, kind):
    """A mask of some rows, heads or queries alone, or of all of them."""
    mask = random(*shape, seed=2)
    if kind == "bool":
        mask = mask > -0.5
        mask[..., [0, 6]] = True  # something has to take part
    met = heard(*tokens(), attn_mask=mask)
    assert met.mask is mask
    check(met)


def test_a_masked_token_has_no_share():
    mask = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    mask[1, ..., 1] = False
    met = heard(*tokens(), mask)
    for share in ("text", "joint"):
        assert joint(met).shares(1, share)[1].max() == 0 < joint(met).shares(0, share)[1].min()


def test_each_row_has_places_of_its_own():
    """As where texts of one batch are of several lengths, and are not padded."""
    met = heard(*tokens())
    places = [slice(3, 7), slice(1, 5)], [slice(0, 3), slice(5, 7)]
    call = JointCall(met.query, met.key, None, met.scale, *places)
    probabilities = (met.query.double() @ met.key.double().mT * met.scale).softmax(-1).mean(1)
    for row, (pixels, text) in enumerate(zip(*places, strict=True)):
        torch.testing.assert_close(
            call.shares(row, "joint").double(), probabilities[row, pixels, text].T, atol=1e-6, rtol=0
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_float32(dtype):
    """Queries and keys as the model has them; shares come rounded to what they are computed in."""
    met = heard(*(x.to(dtype) for x in tokens(rows=1)))
    assert met.query.dtype == dtype
    for share, tolerance in (("text", 1e-6), ("joint", 1e-2)):
        found = joint(met).shares(0, share)
        exact = joint(met._replace(query=met.query.double(), key=met.key.double())).shares(0, share)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, exact.float(), atol=tolerance, rtol=0)


# Who is heard


def test_every_call_inside_is_heard_and_none_outside():
    attention, found = nn.Sequential(Attention()), []
    handles = listen(attention, found.append)
    query, key, value = tokens()
    F.scaled_dot_product_attention(query, key, value)
    assert not found
    attention.forward = lambda x: attention[0](attention[0](x, key, value), key, value)
    attention(query)
    assert len(found) == 2 and found[0].query is query
    for handle in handles:
        handle.remove()
    attention(query)
    assert len(found) == 2


def test_one_inside_another_is_heard_by_both():
    outer, found = nn.Sequential(Attention()), {"outer": [], "inner": []}
    outer.forward = lambda *args: outer[0](*args)
    handles = listen(outer, found["outer"].append) + listen(outer[0], found["inner"].append)
    outer(*tokens())
    assert [len(calls) for calls in found.values()] == [1, 1] and not function_modes()
    for handle in handles:
        handle.remove()


class Broken(Exception):
    """What goes wrong in these tests."""


@pytest.mark.parametrize("where", ["forward", "receive", "hook before", "hook behind"])
def test_nothing_listens_on_after_an_error(where):
    attention = Attention()

    def fail(*args):
        assert function_modes() or where == "receive"  # a mode does not listen while it hands on
        raise Broken

    listen(attention, fail if where == "receive" else lambda met: None)
    if where == "forward":
        attention.forward = fail
    elif where == "hook before":
        attention.register_forward_pre_hook(fail)
    elif where == "hook behind":
        attention.register_forward_hook(lambda *args: fail(), prepend=True)
    with pytest.raises(Broken):
        attention(*tokens())
    assert not function_modes()


def test_what_was_interrupted_ends_with_its_handles():
    """Ctrl-C, after which PyTorch calls no hooks."""
    attention, found = Attention(), []
    handles = listen(attention, found.append)
    handle = attention.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt), prepend=True)
    with pytest.raises(KeyboardInterrupt):
        attention(*tokens())
    assert len(found) == function_modes() == 1
    for each in (handle, *handles):
        each.remove()
    assert not function_modes()


def test_threads_do_not_hear_each_other():
    """Two threads that are inside at once: each call is heard once."""
    attention, found, both = Attention(), [], Barrier(2, timeout=10)
    listen(attention, found.append)
    attention.forward = lambda *args: (both.wait(), F.scaled_dot_product_attention(*args), both.wait())[1]
    given = [tokens(), tokens(count=9)]
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda args: attention(*args), given))
    assert sorted(met.key.shape[2] for met in found) == [7, 9]
    assert not function_modes()
