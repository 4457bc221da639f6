"""From a recording and its words to heat maps.

Axes: step, head, token, pixel (row-major), then row, column.
"""

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch

from ..recording import words
from ..recording.layers import Layers, attention, choose_heads
from ..recording.recording import Recording, Trace
from ..tokens import Token
from .heatmaps import HeatMaps, resize

WHOLE = ""  # the name of no text: what has it is not among the streamed ones
CHUNK = 2**19  # most scores or queries taken at once, what caches hold: small layers' steps are grouped to this size


def daam(
    recording: Recording,
    *,
    layers: Layers = None,
    steps: int | Collection[int] | None = None,
    heads: int | Collection[int] | None = None,
    per: str | None = None,
    mode: str = "bicubic",
) -> HeatMaps | dict[object, HeatMaps]:
    """Diffusion attentive attribution maps of every word of the prompt (Tang et al., ACL 2023, equations 4 to 7).

    Softmax over the padded prompt as the model saw it; mean over steps; resized per layer and head to the largest
    chosen map and clamped at 0; mean over layers and heads.

    Parameters
    ----------
    recording : of one image; choose one with recording[i]
    layers : which recorded layers, by name, beginning of a name or map height; None for all
    steps : which recorded steps, by their number in the generation; None for all
    heads : which heads; None for all
    per : None for one result; "step", "layer" or "head" for a dict of one each, keyed by step number, by layer name
        or by (layer name, head)
    mode : "bicubic" or "bilinear"

    Returns
    -------
    HeatMaps of float32 (token, row, column), or a dict of them

    Raises
    ------
    ValueError : several images, a prompt given as embeddings, an unknown layer, step, head, `per` or `mode`
    """
    trace, text = recording.trace, recording.words
    text = _Text(trace.text, trace.attention_mask, list(range(trace.length)), text, None)  # up to the first end token
    return _maps(recording, text, layers, steps, heads, per, mode)


def ovam(
    recording: Recording,
    text: str | torch.Tensor | Token | Sequence[str | Token],
    *,
    context: str = "{}",
    padded: bool = False,
    special: bool = True,
    layers: Layers = None,
    steps: int | Collection[int] | None = None,
    heads: int | Collection[int] | None = None,
    per: str | None = None,
    mode: str = "bilinear",
) -> HeatMaps | dict[object, HeatMaps]:
    """Open-vocabulary attention maps: of any text, whatever the prompt was (Marcos-Manchón et al., CVPR 2024).

    The recorded queries meet the keys of another text: softmax over its tokens, mean over steps, heads and layers. With
    the prompt as `text`, `padded` and `mode="bicubic"` it is `daam`.

    Parameters
    ----------
    recording : of one image; choose one with recording[i]
    text : any text; or what takes the place of text, start and end: embeddings (token, text width), whose maps are
        asked for by number, or several tokens and words, `[background, token, "tree"]`, asked for by name. A token
        that was learned together with its background may be given alone
    context : a phrase with {} where `text` stands: "a car and a {} in an urban environment"; maps are of `text` alone
    padded : softmax over the whole window of the text encoder, as the model was trained; otherwise up to the first end
        token, as in the paper
    special : whether start and end token take part in the softmax. Without them a single word is 1 everywhere
    layers, steps, heads, per, mode : as for `daam`

    Returns
    -------
    HeatMaps of float32 (token, row, column), or a dict of them

    Raises
    ------
    ValueError : several images, an empty text or one beyond the window, no {} in `context`, embeddings of another
        width, padded without special, an unknown layer, step, head, `per` or `mode`
    """
    attention_mask = recording.trace.attention_mask
    if padded and not special:
        raise ValueError("padding stands behind the end token: padded=True needs special=True")
    if isinstance(text, str):
        chosen = _of_text(recording, text, context, padded, special)
    elif padded or context != "{}" or not special:
        raise ValueError("padded, context and special are about text: embeddings and tokens are all that takes part")
    elif isinstance(text, Token) or not hasattr(text, "shape"):
        chosen = _of_tokens(recording, text)
    else:
        chosen = _of_embedding(recording, torch.as_tensor(text))
    hidden = attention_mask if padded and isinstance(text, str) else None
    return _maps(recording, chosen._replace(attention_mask=hidden), layers, steps, heads, per, mode, special)


class _Text(NamedTuple):
    """What queries meet: embeddings (token, width), visible bool (token,) or None; and what is kept of the result."""

    embedding: torch.Tensor
    attention_mask: torch.Tensor | None
    tokens: list[int]  # those whose maps are kept
    words: list[words.Word]  # with positions on the axis of the tokens that are kept
    streamed: str | None  # the text's name among those whose maps were summed up while recording; None: the prompt


def _of_text(recording, text, context, padded, special) -> _Text:
    before, hole, after = context.partition("{}")
    if not hole or "{}" in after:
        raise ValueError(f"context={context!r}: write {{}} once, where the text stands")
    if not text.strip():
        raise ValueError("text is empty: give at least one word")
    whole = recording.encode(before + text + after)
    asked = whole.words
    if before.strip() or after.strip():
        tokenizer = recording.encoder.tokenizer
        first, count = (len(words.split(tokenizer, tokenizer(part).input_ids)) for part in (before, text))
        asked = whole.words[first : first + count]
        if not asked:
            raise ValueError(f"context={context!r}: put spaces around {{}}, so that the text is a word of its own")
    tokens = list(range(whole.length)) if special else list(range(1, whole.length - 1))
    if not special:
        asked = [word._replace(tokens=tuple(p - 1 for p in word.tokens)) for word in asked]
        return _Text(whole.embedding[tokens], None, list(range(len(tokens))), asked, WHOLE)
    return _Text(
        whole.embedding if padded else whole.embedding[tokens], None, tokens, asked, WHOLE if padded else whole.text
    )


def _of_embedding(recording, embedding) -> _Text:
    width = recording.trace.text.shape[-1]
    if embedding.ndim != 2 or embedding.shape[1] != width:
        raise ValueError(f"embeddings are (token, {width}) for this model, not {tuple(embedding.shape)}")
    if not embedding.isfinite().all():
        raise ValueError("the embeddings hold NaN or infinity")
    tokens = list(range(len(embedding)))
    return _Text(embedding.detach().cpu(), None, tokens, [words.Word(str(i), (i,)) for i in tokens], WHOLE)


def _of_tokens(recording, tokens) -> _Text:
    if isinstance(tokens, Token):
        tokens = [token for token in (tokens.background, tokens) if token is not None]
    if len(tokens) < 2:
        raise ValueError(
            "a softmax over one token is 1 everywhere: give a background beside it, ovam(recording, [background, "
            "token]), or take linear_daam(recording)[token]"
        )
    values, names = [], []
    for token in tokens:
        if isinstance(token, Token):
            token.check(recording.trace.text.shape[-1], recording.trace.generation.model)
        elif recording.encoder is None:
            raise ValueError(
                f"the recording has no text encoder to turn {token!r} into an embedding: give tokens alone"
            )
        values.append(token.value if isinstance(token, Token) else recording.encoder.embed(token))
        names.append(token.name if isinstance(token, Token) else token)
    chosen = _of_embedding(recording, torch.stack(values))
    return chosen._replace(words=[words.Word(name, (i,)) for i, name in enumerate(names)])


def _not_kept(trace):
    kept = ["its prompt (daam)" if text is None else repr(text) for text in trace.streamed]
    found = f"maps of {', '.join(kept)} alone" if kept else "the sum of its queries alone, for linear_daam"
    return f"this recording kept {found}: record with keep='queries' for maps of any text, padded or not"


def _maps(recording, text: _Text, layers, steps, heads, per, mode, special=True):
    """Softmax maps of a text, reduced over everything but tokens and what `per` names."""
    trace = recording.trace
    if not trace.queries and text.streamed not in trace.streamed:
        raise ValueError(_not_kept(trace))
    if per == "step" and not trace.queries:
        raise ValueError("this recording kept sums over its steps: per='step' needs record(pipe, keep='queries')")
    names, steps = recording.choose_layers(layers), recording.choose_steps(steps)
    size = max((trace.sizes[name] for name in names), key=lambda s: s[0] * s[1])

    def shares(name, steps):
        share = _softmax_share(trace, name, steps, text)
        return share[choose_heads(heads, len(share), name)]

    def resized(name, share):
        return resize(share.unflatten(-1, trace.sizes[name]), size, mode)

    def made(values):
        if not values.isfinite().all():
            raise ValueError("the recorded queries hold NaN or infinity: generate in float32 or bfloat16")
        return HeatMaps(values.numpy(), text.words, special)

    def reduced(names, steps):
        total, count = 0, 0
        for name in names:
            share = shares(name, steps)
            count += len(share)
            if mode == "bilinear":  # the sum of resized maps is the resized sum; clamped ones have to be resized each
                share = share.sum(0, keepdim=True)
            total = total + resized(name, share).sum(0)
        return made(total / count)

    if per is None:
        return reduced(names, steps)
    if per == "step":
        return {step: reduced(names, [step]) for step in steps}
    if per == "layer":
        return {name: reduced([name], steps) for name in names}
    if per == "head":
        numbers = {name: choose_heads(heads, trace.layers[name].heads, name) for name in names}
        return {
            (name, head): made(values)
            for name in names
            for head, values in zip(numbers[name], resized(name, shares(name, steps)), strict=True)
        }
    raise ValueError(f"per={per!r}: choose 'step', 'layer' or 'head', or leave it out")


@torch.no_grad()
def _softmax_share(trace: Trace, name: str, steps, text: _Text) -> torch.Tensor:
    """Share of attention that each kept token of `text` gets, mean over steps: float32 (head, token, pixel)."""
    if not trace.queries:
        return trace.streamed[text.streamed][name].cpu() / len(trace.steps)
    layer, recorded = trace.layers[name], trace.queries[name]
    keys = layer.keys(text.embedding) * layer.scale  # (head, token, width)
    index = [trace.steps.index(step) for step in steps]
    wide = max(len(keys) * keys.shape[1], len(layer.weight))  # scores or query channels of a pixel
    group = max(1, CHUNK // (wide * math.prod(trace.sizes[name])))
    total = None
    for i in range(0, len(index), group):
        queries = [recorded[k] for k in index[i : i + group]]
        queries = torch.stack(queries) if len(queries) > 1 else queries[0][None]
        shares = attention(layer.queries(queries.cpu()), keys, text.attention_mask)  # (step, head, token, pixel)
        share = shares.sum(0) if len(shares) > 1 else shares[0]
        total = share if total is None else total.add_(share)
    return total[:, text.tokens] / len(index)


def propagate(maps: HeatMaps, self_attention: torch.Tensor, size: tuple[int, int], power: int = 1) -> HeatMaps:
    """Maps spread along self-attention: each pixel takes the mean of what it looks at, `power` times over.

    DiffSegmenter (Wang et al., 2023) and OVAM's follow-ups refine cross-attention like this. Values remain shares of
    attention in 0..1, and a map that is constant stays so.

    Parameters
    ----------
    maps : of any size; resized to `size`
    self_attention, size : `recording.self_attention()`: float32 (pixel that looks, pixel looked at), (height, width)
    power : how often, 0 or above

    Raises
    ------
    ValueError : a self-attention that does not fit its size, or a power below 0
    """
    pixels = size[0] * size[1]
    if tuple(self_attention.shape) != (pixels, pixels) or power < 0:
        raise ValueError(
            f"propagate wants ({pixels}, {pixels}) for {size} and power >= 0, not "
            f"{tuple(self_attention.shape)} and power={power}"
        )
    values = resize(torch.from_numpy(maps.values)[None], size, "bilinear")[0].flatten(1).T
    for _ in range(power):
        values = self_attention @ values
    return HeatMaps(values.T.unflatten(-1, size).numpy(), maps.words, maps.special)
