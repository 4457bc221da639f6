"""Compute and draw what `explore` shows, in plain functions that need no notebook.

image, recording = generate(pipe, "a burning house with smoke", seed=11)
maps = word_maps(recording, ["smoke", "house"], "DAAM")            # float32 (row, column) each
pixels = side_by_side(image, maps, opacity=0.6, scale="together")  # uint8 (row, column, rgb) each
rank_words(recording, 0.5, 0.2)                                    # [("smoke", 0.31), ...], strongest first
"""

import inspect
import io
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from .. import plots
from ..maps.heatmaps import HeatMaps
from ..maps.linear import linear_daam
from ..maps.softmax import daam, ovam
from ..pipelines import seed as seeded
from ..recording import Recording, record, record_again
from ..recording.checks import generation_arguments
from ..recording.trace import Trace
from ..recording.words import Query, matches
from ..tokens import Token

__all__ = [
    "COLORMAPS", "MAP_METHODS", "SCALES", "Stopped", "check_mapped", "choices_of", "curves_at",
    "generate", "is_mapped", "is_said", "methods_of", "pixel_figure", "rank_words", "record_steps", "side_by_side",
    "spelled", "strongest", "word_maps", "words_of",
]  # fmt: skip

MAP_METHODS = ("DAAM", "OVAM", "linear")
SCALES = ("together", "each", "0 to 1")
COLORMAPS = ("inferno", "viridis", "cividis", "gray")  # even in lightness, so that color-blind readers see their order


class Stopped(Exception):
    """A generation was stopped on the way; the message says by whom."""


def generate(
    pipe,
    prompt: str,
    *,
    seed: int = 0,
    steps: int = 20,
    guidance: float = 4.0,
    size: int = 0,
    each: Callable[[int], None] = int,
) -> tuple[Image.Image, Recording]:
    """Generate an image and record it. `each(steps done)` is called on the way, and may raise `Stopped`.

    `size` is the image's side in pixels, 0 for the model's own. TypeError for a pipeline of films.
    """
    if not prompt.strip():
        raise ValueError("the prompt is empty: write what the image shows")
    if steps < 1:
        raise ValueError(f"{steps} steps: give one or more")
    arguments = generation_arguments(pipe, prompt, steps=steps, guidance=guidance, size=size)
    known = inspect.signature(pipe.__call__).parameters
    if "num_frames" in known:
        raise TypeError(f"{type(pipe).__name__} makes films, of which none is shown here: take one that makes images")
    generator = seeded(seed)

    def after(pipe, number, time, tensors):
        each(number + 1)
        return tensors

    report = {"callback_on_step_end": after}
    if "callback_on_step_end" not in known:  # PixArt, DeepFloyd IF
        report = {"callback": lambda number, time, latents: each(number + 1)} if "callback" in known else {}
    bar = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(disable=True)  # `each` says how far it is
    try:
        with record(pipe, generator=generator) as recording:
            image = pipe(**arguments, generator=generator, **report)[0][0]
    finally:
        pipe.set_progress_bar_config(**bar)
    return image, recording


def methods_of(trace: Trace) -> tuple[str, ...]:
    """Return those of `MAP_METHODS` for which a recording has kept what they need."""
    if trace.queries:
        return MAP_METHODS
    kept = {"DAAM": None in trace.streamed, "OVAM": trace.beside, "linear": trace.sums or trace.outputs}
    return tuple(name for name in MAP_METHODS if kept[name])


def choices_of(trace: Trace) -> dict[str, list]:
    """Return the "layers", "steps" and "heads" of which some can be chosen; none where all are in one sum."""
    steps = trace.steps if trace.queries or trace.calls else []
    heads = [] if trace.joint else range(min(layer.heads for layer in trace.layers.values()))
    return {"layers": list(trace.sizes), "steps": list(steps), "heads": list(heads)}


def record_steps(pipe, recording: Recording, steps: Sequence[int]) -> Recording:
    """Return a recording that tells of some steps: itself, or what the kept calls of the denoiser say of them."""
    trace = recording.trace
    whole = trace.queries or list(steps) == trace.steps
    beside = {"texts": list(trace.beside), "outputs": bool(trace.outputs)}
    return recording if whole else record_again(pipe, recording, steps=list(steps), **beside)


def word_maps(
    recording: Recording, words: Sequence[Query | Token], method: str = "DAAM", **chosen
) -> dict[str, np.ndarray]:
    """Return the map, float32 (row, column), of each word, phrase or learned token.

    The method is "DAAM" for the prompt's own words, "OVAM" for any text, "linear" for any word or token by itself;
    `chosen` are layers, steps and heads, as in `daam`.
    """
    if method not in MAP_METHODS:
        raise ValueError(f"method={method!r}: choose one of {', '.join(MAP_METHODS)}")
    texts = {spelled(word): word[0] if isinstance(word, tuple) else word for word in words}
    if method == "linear":
        linear = linear_daam(recording, **chosen)
        return {name: linear[text] for name, text in texts.items()}
    if method == "OVAM":
        return {name: ovam(recording, text, **chosen)[text] for name, text in texts.items()}
    check_mapped(recording, words)
    maps = daam(recording, **chosen)
    return {spelled(word): maps[word] for word in words}


def is_said(recording: Recording, word: Query | Token) -> bool:
    """Return whether a word or phrase is one of the prompt's."""
    return not isinstance(word, Token) and bool(matches(recording.words, word))


def is_mapped(recording: Recording, word: Query | Token, method: str) -> bool:
    """Return whether a recording has the map of a word, phrase or token by a method."""
    if method == "DAAM":
        return is_said(recording, word)
    known = method == "linear" if isinstance(word, Token) else spelled(word) in recording.trace.beside
    return known or not recording.trace.joint


def check_mapped(recording: Recording, words: Sequence[Query | Token], method: str = "DAAM") -> None:
    """Raise ValueError for words and tokens that have no map by a method, and say what maps them instead."""
    foreign = [spelled(word) for word in words if not is_mapped(recording, word, method)]
    others = [name for name in methods_of(recording.trace) if name != method]
    advice = f"; choose {' or '.join(others)}" if others else ", the only text whose maps this recording has"
    if foreign:
        where = "in the prompt" if method == "DAAM" else "read beside the image"
        raise ValueError(f"{', '.join(foreign)}: not {where}{advice}")


def side_by_side(
    image,
    maps: Mapping[str, np.ndarray],
    *,
    opacity: float = 0.6,
    colormap: str = "inferno",
    scale: str = "together",
    highest: float = 0.0,
) -> dict[str, np.ndarray]:
    """Draw the image under each map: uint8 (row, column, rgb), of the image's size.

    The last color is the maximum of all maps "together", but at least `highest`; or that of "each" map by itself; or 1,
    all attention ("0 to 1").
    """
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r}: choose one of {', '.join(SCALES)}")
    last = {"together": max(highest, *(m.max() for m in maps.values())) if maps else None, "each": None, "0 to 1": 1.0}
    drawn = {"vmax": last[scale], "opacity": opacity, "colormap": colormap}
    return {name: plots.overlay(image, heat, **drawn) for name, heat in maps.items()}


def strongest(recording: Recording, method: str = "DAAM", **chosen) -> float:
    """Return the largest value in the maps of the prompt's words, or of texts beside the image; DAAM's for OVAM."""
    trace = recording.trace
    if method != "linear":
        method = "DAAM" if "DAAM" in methods_of(trace) else "OVAM"
    words = trace.beside if trace.joint and method != "DAAM" else words_of(recording).values()
    return float(max((heat.max() for heat in word_maps(recording, [*words], method, **chosen).values()), default=0.0))


def rank_words(recording: Recording, row: float, column: float) -> list[tuple[str, float]]:
    """Return the prompt's words with their attention (DAAM) at a point, strongest first.

    The point is given as fractions of the image's height and width, 0..1.
    """
    maps = daam(recording)
    found = [(spelled(word), float(_at(maps[word], row, column))) for word in maps]
    return sorted(found, key=lambda pair: -pair[1])


def curves_at(recording: Recording, word: str, row: float, column: float) -> dict[str, dict[str, float]]:
    """Return the attention (DAAM) of a point to a word of the prompt, in each "step" and in each "layer".

    Without steps where only sums over them were kept.
    """
    return {
        per: {str(key): float(_at(maps[word], row, column)) for key, maps in daam(recording, per=per).items()}
        for per in ("step", "layer")[not recording.trace.queries :]
    }


def words_of(recording: Recording) -> dict[str, Query]:
    """Return the words of a prompt, as maps are indexed by them, by what people read.

    Without one that the text window cut short: it is no word that could be asked for.
    """
    whole = [word for word in recording.words if not word.text.endswith("…")]
    return {spelled(word): word for word in HeatMaps(np.zeros((0, 1, 1)), whole)}


def pixel_figure(recording: Recording, point: Sequence[int], size: Sequence[int]) -> bytes:
    """Draw the attention of a pixel as a PNG: its strongest words, and the first of them over steps and over layers.

    Over layers alone where only sums over steps were kept.

    The point is (row, column) in an image of `size` (rows, columns); ValueError where it is outside.
    """
    if not all(0 <= at < length for at, length in zip(point, size, strict=True)):
        at = tuple(map(int, point))
        raise ValueError(f"pixel {at} is not in the image, which has {size[0]} rows and {size[1]} columns")
    where = [(at + 0.5) / length for at, length in zip(point, size, strict=True)]
    ranked = rank_words(recording, *where)[:6]
    words = words_of(recording)
    first = max(words, key=lambda name: dict(ranked).get(name, -1))
    curves = curves_at(recording, words[first], *where)
    figure = Figure(figsize=(9, 2.2))
    bars, *axes = figure.subplots(1, 1 + len(curves))
    figure.subplots_adjust(left=0.13, right=0.98, bottom=0.25, top=0.95, wspace=0.35)  # a layout engine takes as long
    with plots.style():
        bars.barh([name for name, _ in ranked][::-1], [value for _, value in ranked][::-1], color="#1958b3")
        bars.set_xlabel("share of attention (DAAM)")
        bars.locator_params(axis="x", nbins=5)  # small shares have long numbers
    for ax, (per, values) in zip(axes, curves.items(), strict=True):
        line = {first: list(values.values())}
        plots.curves(ax, range(len(values)), line, xlabel=per, ylabel=first, legend=False)
        ax.locator_params(axis="x", integer=True)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80)
    return buffer.getvalue()


def _at(heat, row, column):
    rows, columns = heat.shape
    return heat[min(int(row * rows), rows - 1), min(int(column * columns), columns - 1)]


def spelled(word: Query | Token) -> str:
    """Spell a word as people read it: a token's name, "car (2)" for the second car."""
    if isinstance(word, Token):
        return word.name
    return word if isinstance(word, str) else f"{word[0]} ({word[1] + 1})"
