"""Heat maps by softmax: of a prompt's words (`daam`), of any text's (`ovam`), and propagated by self-attention."""

import math
from collections.abc import Collection, Sequence
from numbers import Integral
from typing import NamedTuple

import torch

from ..recording import Recording, words
from ..recording.layers import Layers, attention, choose_heads, contributed, exact, heads_agreed
from ..recording.pieces import split, words_in
from ..recording.trace import Trace
from ..tokens import Token
from .heatmaps import MODES, HeatMaps, as_size, resize

__all__ = ["MAX_POWER", "choose_text", "daam", "heat_maps", "ovam", "prompt_text", "propagate"]

MAX_POWER = 1000  # times that maps are propagated, by then as flat as they get
_NOT_STREAMED = ""  # key for texts whose maps were not accumulated while recording
_SCORES_AT_ONCE = 2**19  # most scores or query values in CPU caches: steps of small layers are computed together
_SHARE = 8  # of a GPU's free memory, for the scores of the steps that are computed together; more are made of them


def daam(
    recording: Recording,
    *,
    layers: Layers = None,
    steps: int | Collection[int] | None = None,
    heads: int | Collection[int] | None = None,
    per: str | None = None,
    mode: str = "bicubic",
) -> HeatMaps | dict[object, HeatMaps]:
    """Compute diffusion attentive attribution maps (DAAM) of every word of the prompt (Tang et al., ACL 2023, eq. 4-7).

    Softmax over the padded prompt as the model saw it; mean over steps; resized per layer and head to the largest
    chosen map and clamped at 0; mean over layers and heads.

    Parameters
    ----------
    recording : Recording
        Of one image; of several images choose one with ``recording[i]``.
    layers : str, int or collection of these, optional
        Recorded layers, by name, beginning of a name, or height of their maps; all unless given.
    steps, heads : int or collection of int, optional
        Recorded steps, by their number in the generation, and heads of each layer; all unless given.
    per : str, optional
        "step", "layer" or "head" for a dict of maps by step number, layer name, or (layer name, head).
    mode : str
        How maps are resized: "bicubic" or "bilinear".

    Returns
    -------
    HeatMaps or dict of HeatMaps
        Values are float32 (token, row, column).

    Raises
    ------
    ValueError
        Several images, a prompt that was given as embeddings or changed on the way, an unknown layer, step, head,
        `per` or `mode`.
    """
    return heat_maps(recording, prompt_text(recording, steps), layers, steps, heads, per, mode)


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
    """Compute open-vocabulary maps: of any text, whatever the prompt was (OVAM, Marcos-Manchón et al., CVPR 2024).

    The recorded queries meet the keys of another text: softmax over its tokens, mean over steps, heads and layers. With
    the prompt as `text`, `padded` and `mode="bicubic"` it is `daam`; what it returns has the same form. In joint
    attention a text has keys only where the model reads it beside the image: of those in ``record(pipe, texts=...)`` or
    ``record_again(pipe, recording, texts=...)``, with their special tokens and without padding.

    Parameters
    ----------
    recording
        As in `daam`.
    text : str, tensor, Token or Sequence[str or Token]
        Any text. Or what replaces the encoded text with its start and end: embeddings (token, text width), whose maps
        are asked for by number, or several tokens and words, `[background, token, "tree"]`, asked for by name. A token
        that was learned together with its background may be given alone.
    context : str
        Phrase with {} in place of `text`, "a car and a {} in an urban environment"; only `text` gets maps.
    padded : bool
        Softmax over the text encoder's whole window, as in training; otherwise up to the first end token, as published.
    special : bool
        Whether start and end token take part in the softmax. Without them a single word is 1 everywhere.
    layers, steps, heads, per, mode
        As in `daam`.

    Raises
    ------
    ValueError
        As `daam`; an empty or too long text, no {} in `context`, embeddings of another width, padded without special;
        in joint attention, a text that the model has not read beside the image.
    """
    chosen = choose_text(recording, text, context, padded, special)
    return heat_maps(recording, chosen, layers, steps, heads, per, mode)


class _Text(NamedTuple):
    """A text whose keys the queries meet, and which of its tokens' maps are returned."""

    embedding: torch.Tensor  # (token, text width)
    attention_mask: torch.Tensor | None  # bool (token,), False for tokens that the model masks
    tokens: list[int]  # those whose maps are returned
    words: list[words.Word]  # with positions on the axis of these tokens
    streamed: str | None  # key of its maps where they were accumulated while recording; None for the prompt
    special: bool = True  # whether the first and the last token are those that begin and end a text


def prompt_text(recording: Recording, steps: int | Collection[int] | None) -> _Text:
    """Return the prompt as the model saw it in some steps; ValueError where it is unknown, or changes among them."""
    trace, prompt_words = recording.trace, recording.words
    changed = trace.generation.changed
    if changed is not None and not (trace.queries and max(recording.choose_steps(steps)) < changed):
        raise ValueError(
            f"the prompt changes at step {changed}, and its maps are of one text: give steps= before it, or ask by "
            "ovam(recording, text)"
        )
    special = trace.ends and _begins(prompt_words)
    return _Text(trace.text, trace.attention_mask, list(range(trace.length)), prompt_words, None, special)


def _begins(found) -> bool:
    """Whether a start token, and nothing else, stands before the first word."""
    return bool(found) and found[0].tokens[0] == 1


def choose_text(recording: Recording, text, context: str, padded: bool, special: bool) -> _Text:
    """Return what the queries meet in place of the prompt; arguments and errors are those of `ovam`."""
    if padded and not special:
        raise ValueError("padding stands behind the end token: padded=True needs special=True")
    if isinstance(text, str):
        return _of_text(recording, text, context, padded, special)
    if padded or context != "{}" or not special:
        raise ValueError("padded, context and special are about text: embeddings and tokens are all that takes part")
    if isinstance(text, Token) or not hasattr(text, "shape"):
        return _of_tokens(recording, text)
    return _of_embedding(recording, torch.as_tensor(text))


def _of_text(recording, text, context, padded, special) -> _Text:
    before, hole, after = str(context).partition("{}")
    if not hole or "{}" in after:
        raise ValueError(f"context={context!r}: write {{}} once, where the text stands")
    if not text.strip():
        raise ValueError("text is empty: give at least one word")
    if recording.trace.joint:
        return _of_text_beside(recording.trace, before, text, after, padded or not special)
    whole = recording.encode(before + text + after)
    found = whole.words
    if before.strip() or after.strip():
        tokenizer = recording.encoder.tokenizer
        first, count = (len(split(tokenizer, tokenizer(part).input_ids)) for part in (before, text))
        found = whole.words[first : first + count]
        if not found:
            raise ValueError(f"context={context!r}: put spaces around {{}}, so that the text is a word of its own")
    tokens, marked = list(range(whole.length)), whole.ends and _begins(whole.words)
    if padded:
        mask = recording.trace.attention_mask if whole.attention_mask is None else whole.attention_mask
        return _Text(whole.embedding, mask, tokens, found, _NOT_STREAMED, marked)
    if special:
        return _Text(whole.embedding[tokens], None, tokens, found, whole.text, marked)
    first = whole.words[0].tokens[0]  # no start token, nor a template, before them
    found = [word._replace(tokens=tuple(p - first for p in word.tokens)) for word in found]
    inside = tokens[first : whole.length - whole.ends]
    return _Text(whole.embedding[inside], None, list(range(len(inside))), found, _NOT_STREAMED, False)


def _of_text_beside(trace, before, text, after, changed) -> _Text:
    """Return a text that the model read beside the image, in joint attention."""
    whole = before + text + after
    if whole not in trace.beside or changed:
        known = f"{', '.join(map(repr, trace.beside)) or 'none'} so far, with the special tokens and no padding"
        raise ValueError(
            "in joint attention a text has maps once the model has read it beside the image: ovam of "
            f"record_again(pipe, recording, texts={whole!r}), or of record(pipe, texts=...); here there are {known}"
        )
    beside, first = trace.beside[whole], len(words_in(before))
    found, tokens = beside.words[first : first + len(words_in(text))], list(range(beside.length))
    return _Text(trace.text, None, tokens, found, whole, beside.ends and _begins(beside.words))


def _of_embedding(recording, embedding, names=None) -> _Text:
    """Return the rows of an embedding (token, text width) as words of these names; of their numbers unless given."""
    width = recording.trace.text.shape[-1]
    if embedding.ndim != 2 or embedding.shape[1] != width:
        raise ValueError(f"embeddings are (token, {width}) for this model, not {tuple(embedding.shape)}")
    if not embedding.isfinite().all():
        raise ValueError("the embeddings hold NaN or infinity")
    tokens = list(range(len(embedding)))
    found = [words.Word(name, (i,)) for i, name in enumerate(names or map(str, tokens))]
    return _Text(embedding.detach().cpu(), None, tokens, found, _NOT_STREAMED)


def _of_tokens(recording, tokens) -> _Text:
    if isinstance(tokens, Token):
        tokens = [token for token in (tokens.background, tokens) if token is not None]
    if not isinstance(tokens, list | tuple) or not all(isinstance(token, Token | str) for token in tokens):
        raise ValueError(f"text={tokens!r}: give a text, embeddings, or a list of tokens and words")
    if len(tokens) < 2:
        raise ValueError("one token alone is 1 everywhere: give a background, [background, token], or use linear_daam")
    values, names = [], []
    for token in tokens:
        if isinstance(token, Token):
            token.check(recording.trace.text.shape[-1], recording.trace.generation.model)
        elif recording.encoder is None:
            raise ValueError(f"the recording has no text encoder to embed {token!r}: give tokens alone")
        values.append(token.value if isinstance(token, Token) else recording.encoder.embed(token))
        names.append(token.name if isinstance(token, Token) else token)
    return _of_embedding(recording, torch.stack(values), names)


@exact()
def heat_maps(
    recording: Recording, text: _Text, layers, steps, heads, per, mode, kind: str | None = None
) -> HeatMaps | dict[object, HeatMaps]:
    """Return the heat maps of a text: the mean over everything but tokens and what `per` names.

    Of attention, or of contributions of some `kind`, which are summed over heads; kind="agreement" is attention again,
    of all heads by their weights (`goca`), which may be negative. Errors are those of `daam`.
    """
    trace = recording.trace
    known = trace.streamed if trace.contributed == (kind is not None) else {}
    if not trace.queries and text.streamed not in known:
        what, prompt = ("contributions", "prompt") if trace.contributed else ("maps", "prompt (daam)")
        kept = [f"its {prompt}" if name is None else repr(name) for name in trace.streamed]
        if trace.joint:
            raise ValueError("in joint attention there are maps of texts that the model has read, and no contributions")
        if trace.calls:
            raise ValueError("this recording kept calls of the denoiser: record_again(pipe, recording) asks them")
        kept = f"{what} of {', '.join(kept)} alone" if kept else "the sum of its queries alone, for linear_daam"
        raise ValueError(f"this recording kept {kept}: record with keep='queries' for maps of any text, padded or not")
    if per not in (None, "step", "layer", "head") or mode not in MODES:
        raise ValueError(f"per={per!r}, mode={mode!r}: per is 'step', 'layer' or 'head', mode one of {MODES}")
    if trace.joint and (heads is not None or per == "head"):
        raise ValueError("maps of joint attention are recorded as the mean over heads: leave heads= and per='head' out")
    if per == "step" and not trace.queries:
        how = "record_again(pipe, recording, steps=[0])" if trace.calls else "record(pipe, keep='queries')"
        raise ValueError(f"this recording kept sums over its steps: for one of them {how}")
    names, steps = recording.choose_layers(layers), recording.choose_steps(steps)
    largest = max((trace.sizes[name] for name in names), key=math.prod)

    def of_layer(name, steps, summed=False):
        """Return groups of chosen heads, and their maps (group, token, row, column); `summed` may add them up."""
        numbers = choose_heads(heads, trace.layers[name].heads, name)
        groups = [numbers] if kind and per != "head" else [[head] for head in numbers]
        values = _mean_over_steps(trace, name, steps, text, kind, groups)
        if summed and mode == "bilinear":  # resizing is linear, so once is enough; bicubic maps are clamped each
            values = values.sum(0, keepdim=True)
        return groups, resize(values.unflatten(-1, trace.sizes[name]), largest, mode, clamp=kind is None)

    def checked(values):
        if not values.isfinite().all():
            raise ValueError("the recorded queries hold NaN or infinity: generate in float32 or bfloat16")
        return HeatMaps(values.cpu().numpy(), text.words, text.special)

    def mean(names, steps):
        total, count = 0, 0
        for name in names:
            groups, maps = of_layer(name, steps, summed=True)
            total, count = total + maps.sum(0).cpu(), count + len(groups)
        return checked(total / count)

    if per is None:
        return mean(names, steps)
    if per == "step":
        return {step: mean(names, [step]) for step in steps}
    if per == "layer":
        return {name: mean([name], steps) for name in names}
    by_layer = ((name, zip(*of_layer(name, steps), strict=True)) for name in names)
    return {(name, head): checked(values) for name, found in by_layer for (head,), values in found}


def _mean_over_steps(trace: Trace, name: str, steps, text: _Text, kind: str | None, groups) -> torch.Tensor:
    """Return a layer's maps for groups of heads, mean over steps, on the device of what was recorded.

    float32 (group, token, pixel), row-major.
    """
    if not trace.queries:
        return _of_sum(trace.streamed[text.streamed][name], kind, groups) / len(trace.steps)
    recorded, index = trace.queries[name], [trace.steps.index(step) for step in steps]
    device = trace.device(name)
    layer, embedding = trace.layers[name].to(device), text.embedding.to(device)
    mask = None if text.attention_mask is None else text.attention_mask.to(device)
    keys = layer.keys(embedding) * layer.scale  # (head, token, width)
    outputs = layer.outputs(embedding) if kind else None
    scores, channels = len(keys) * keys.shape[1], len(layer.weight)  # per pixel and step
    group = max(1, _at_once(device) // (max(scores, channels) * math.prod(trace.sizes[name])))
    total = None
    for i in range(0, len(index), group):
        queries = [recorded[k] for k in index[i : i + group]]
        queries = torch.stack(queries) if len(queries) > 1 else queries[0][None]  # one step needs no copy
        found = attention(layer.queries(queries), keys, mask)  # (step, head, token, pixel)
        if kind:
            by_heads = kind == "agreement"
            found = heads_agreed(found, outputs) if by_heads else contributed(found, outputs, kind, groups)
        summed = found.sum(0) if len(found) > 1 else found[0]
        total = summed if total is None else total.add_(summed)
    chosen = total if kind else total[[head for (head,) in groups]]  # maps of attention are of one head each
    return chosen[:, text.tokens] / len(index)


def _at_once(device):
    """Return how many scores a device computes at a time."""
    if device.type != "cuda":
        return _SCORES_AT_ONCE
    return torch.cuda.mem_get_info(device)[0] // (_SHARE * torch.float32.itemsize)


def _of_sum(total, kind, groups):
    """Choose groups of heads of what a store summed up, (head, token, pixel); contributions have the norm behind."""
    if kind != "norm":
        return torch.stack([total[heads].sum(0) for heads in groups])
    if groups != [list(range(len(total) - 1))]:
        raise ValueError("this recording kept norms of all heads together: record with keep='queries' to choose heads")
    return total[-1:]


@exact()
def propagate(maps: HeatMaps, self_attention: torch.Tensor, size: tuple[int, int], power: int = 1) -> HeatMaps:
    """Propagate maps along self-attention: each pixel becomes the mean of the pixels it attends to, `power` times.

    DiffSegmenter (Wang et al., 2023) refines maps like this. Values stay in 0..1, and a constant map does not change.
    ValueError for a self-attention that does not fit its size, or a power below 0 or above 1000.

    Parameters
    ----------
    maps : HeatMaps
        Of any size; they are resized to `size`.
    self_attention : (pixel, pixel) tensor of float32
        What `recording.self_attention()` gives: a row per attending pixel, which adds up to 1.
    size : (int, int)
        (height, width) of the self-attention, as `recording.self_attention()` gives it too.
    power : int
        How often maps are propagated, 0 or more.
    """
    size = as_size(size)
    pixels, shape = math.prod(size), tuple(self_attention.shape)
    if shape != (pixels, pixels) or not (isinstance(power, Integral) and 0 <= power <= MAX_POWER):
        raise ValueError(
            f"propagate wants {(pixels, pixels)} for {size}, power 0..{MAX_POWER}; not {shape}, power={power}"
        )
    values = resize(torch.from_numpy(maps.values)[None], size, "bilinear")[0].flatten(1).T
    for _ in range(power):
        values = self_attention @ values
    return HeatMaps(values.T.unflatten(-1, size).numpy(), maps.words, maps.special)
