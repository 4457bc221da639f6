"""What a recipe may say: its filters, choices and limits, and everything that is wrong with one, a sentence each."""

import math
import re
import reprlib
import string
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields

from ..masks import check_mask
from ..pipelines import DTYPES
from ..recording.pieces import split
from ..recording.words import matches
from .instances import check_instances, needs_attention
from .photos import Photos, wrong_photos

__all__ = ["MAPS", "MAX_CLASSES", "NEGATIVE", "OF_GENERATION", "SCHEDULERS", "Filters", "mask_name", "most_images"]
__all__ += ["names_in", "refuse", "wrong_settings", "wrong_size", "wrong_words"]

NEGATIVE = "background"  # what `Recipe.kept` calls records that have no class
MAPS = ("daam", "ovam", "linear")
SCHEDULERS = (
    "DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "LCMScheduler", "PNDMScheduler",
    "UniPCMultistepScheduler",
)  # fmt: skip
OF_GENERATION = ("steps", "guidance", "negative", "scheduler", "lists")  # mean nothing where photos are labeled
MAX_CLASSES = 254  # 0 is the background, 255 is ignored
_ATTEMPTS = 10  # most records per one that is to be kept, where a recipe does not say how many images
_MAX_RECORDS, _MAX_PROMPTS, _MAX_SEED = 10**7, 10**6, 2**64 - 1
_MAX_SIDE, _MAX_LETTERS, _MAX_SAID = 8192, 10_000, 20  # pixels of a side, letters of a text, problems in one error
_SHORT = reprlib.Repr()
_SHORT.maxstring = 200
_TEXT = f"a text of up to {_MAX_LETTERS} whole characters"


@dataclass(frozen=True)
class Filters:
    """What a record must be to be kept; None leaves a filter out."""

    area: tuple[float, float] | None = (0.05, 0.95)  # least and largest fraction of the image that its masks cover
    flat: float | None = 0.2  # least range of each map over its maximum; not of linear maps, which have no zero
    blank: float | None = 4.0  # least standard deviation of the image's gray values, 0..255
    duplicates: int | None = 2  # most bits, of 64, by which the hash of a near duplicate differs from the first's
    similarity: float | None = None  # least cosine, -1..1, of image and prompt by a CLIP model
    clip: str | None = None  # folder or hub id of that model


def refuse(problems):
    """Raise a ValueError that names all problems, if there are any."""
    problems = list(problems)
    if problems:
        more = [f"and {len(problems) - _MAX_SAID} more"] if len(problems) > _MAX_SAID else []
        said = "".join(f"\n- {problem}" for problem in [*problems[:_MAX_SAID], *more])
        raise ValueError(f"this recipe cannot be made:{said}")


def wrong_words(recipe, tokenizer):
    """Yield what is wrong with the words that label the classes, one sentence each."""
    if tokenizer is None:
        yield f"model {recipe.model} has no tokenizer, so it reads no words"
        return
    found = {text: split(tokenizer, tokenizer(text).input_ids) for text in recipe.texts}
    window, named = tokenizer.model_max_length, set()
    for name, word in recipe.classes.items():
        places = {text: matches(words, word) for text, words in found.items()}
        named |= {text for text, those in places.items() if those}
        if not any(places.values()):
            yield f"class {name!r}: no prompt has the word {word!r}; any text does with map: ovam"
        for text, those in places.items():
            if len(those) > 1:
                yield f"class {name!r}: {word!r} is {len(those)} times in {text!r}"
            elif those and max(those[0]) >= window - 1:  # the end token has the last place
                yield f"class {name!r}: {word!r} lies outside the {window} tokens that the model reads of {text!r}"
    if isinstance(recipe.kept, Mapping) and NEGATIVE in recipe.kept and named == set(found):
        yield f"kept wants {NEGATIVE}, images of no class, but every prompt names one: add a prompt that does not"


def names_in(prompt):
    """List the names that stand in braces in a prompt, each once; ValueError where more than a name is in braces."""
    found = [parts for _, *parts in string.Formatter().parse(prompt) if parts[0] is not None]
    if more := [name for name, form, conversion in found if form or conversion]:
        raise ValueError(f"write {{{more[0]}}} alone, without : or !")
    return list(dict.fromkeys(name for name, _, _ in found))


def wrong_settings(r):
    """List everything that is wrong with a recipe, one sentence each."""
    least = {"images": 1, "seed": 0, "steps": 1, "batch": 1, "threads": 1, "shard": 1, "propagate": 0, "attention": 1}
    most = {name: {"seed": _MAX_SEED, "threads": 1024, "propagate": 1000}.get(name, _MAX_RECORDS) for name in least}
    is_size = r.size is None or _is_pair(r.size, lambda n: _is_whole(n, 8, _MAX_SIDE) and n % 8 == 0)
    is_tokens = r.tokens is None or (r.map == "linear" and _is_text(r.tokens))
    rows = [
        (
            n,
            _is_whole(getattr(r, n), least[n], most[n]) or (n, r.images) == ("images", None),
            f"it is a whole number from {least[n]} to {most[n]}",
        )
        for n in least
    ]
    rows += [
        (name, _is_text(getattr(r, name), empty=True), f"it is {_TEXT}") for name in ("model", "negative", "context")
    ]
    rows += [
        ("guidance", _is_number(r.guidance, 0, 1000), "it is a number from 0 to 1000"),
        ("band", _is_number(r.band, 0, 1) and r.band < 1, "it is a fraction from 0 to below 1"),
        ("size", is_size, f"(height, width) in multiples of 8, up to {_MAX_SIDE}, or leave it out"),
        ("labels", type(r.labels) is bool, "it is true or false"),
        ("map", r.map in MAPS, f"choose one of {', '.join(MAPS)}"),
        ("context", r.map != "ovam" or str(r.context).count("{}") == 1, "write {} once, where the text stands"),
        ("tokens", is_tokens, "name a file of learned tokens, and map: linear"),
        ("scheduler", r.scheduler in (None, *SCHEDULERS), f"choose one of {', '.join(SCHEDULERS)}, or leave it out"),
        ("dtype", r.dtype in (None, *DTYPES), f"choose one of {', '.join(DTYPES)}, or leave it out"),
    ]
    found = [f"{name} is {_SHORT.repr(getattr(r, name))}: {right}" for name, is_right, right in rows if not is_right]
    found += [*_wrong_prompts(r), *_wrong_classes(r), *_wrong_mask(r), *_wrong_filters(r.filters), *_wrong_looking(r)]
    found += _wrong_instances(r)
    return found or [*_wrong_kept(r)]  # of what is right in its parts


def _is_number(value, least, most):
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


def _is_whole(value, least, most):
    return type(value) is int and least <= value <= most


def _is_pair(value, is_right):
    return isinstance(value, list | tuple) and len(value) == 2 and all(is_right(one) for one in value)


def _is_text(value, empty=False):
    """Whether a value is a text that a file in UTF-8 can hold, and short enough for any model."""
    is_whole = isinstance(value, str) and len(value) <= _MAX_LETTERS and not re.search("[\ud800-\udfff]", value)
    return is_whole and (empty or bool(value.strip()))


def _count_prompts(r):
    return sum(math.prod(len(r.lists[name]) for name in names_in(prompt)) for prompt in r.prompts)


def most_images(r):
    """Return how many images per prompt are made at most, where a recipe does not say it."""
    wanted = sum(r.kept.values()) if isinstance(r.kept, Mapping) else r.kept
    return 1 if wanted is None else -(-_ATTEMPTS * wanted // _count_prompts(r))


def wrong_size(r):
    """Say where a recipe, right in its parts, is too large, or too small, as a whole."""
    prompts = _count_prompts(r)
    least = r.kept or 0
    if isinstance(r.kept, Mapping):  # an image may have several classes
        least = max((n for name, n in r.kept.items() if name != NEGATIVE), default=0) + r.kept.get(NEGATIVE, 0)
    if prompts > _MAX_PROMPTS or prompts * r.images > _MAX_RECORDS:
        most = f"at most {_MAX_PROMPTS} prompts and {_MAX_RECORDS} images"
        yield f"{prompts} prompts with {r.images} images each are too many: {most}; make several data sets"
    elif r.seed + prompts * r.images - 1 > _MAX_SEED:
        yield f"seed is {r.seed}: the last record's would be above {_MAX_SEED}"
    elif prompts * r.images < least:
        said = f"{prompts} prompts make {prompts * r.images} images at most, kept wants {least}"
        said = f"images is {r.images}: {said}; leave images out for {_ATTEMPTS} attempts at each"
        yield f"kept wants {least}, there are {r.images} photos" if r.photos else said


def _wrong_kept(r):
    """Say where `kept` is no count, or names what no record can have."""
    counts = r.kept if isinstance(r.kept, Mapping) else {} if r.kept is None else {"": r.kept}
    right = f"a whole number from 1 to {_MAX_RECORDS}, or one for each class"
    if r.kept is not None and not (counts and all(_is_whole(n, 1, _MAX_RECORDS) for n in counts.values())):
        yield f"kept is {_SHORT.repr(r.kept)}: it is {right}, such as {{{next(iter(r.classes))}: 100}}"
    elif isinstance(r.kept, Mapping):
        known = [*r.classes, NEGATIVE]
        yield from (
            f"kept names {n!r}, which is no class: it may have {', '.join(known)}" for n in counts if n not in known
        )
    if NEGATIVE in counts and NEGATIVE in r.classes:
        yield f"kept means images of no class by {NEGATIVE}: give the class of that name another one"
    elif NEGATIVE in counts and r.map != "daam":
        bounded = isinstance(r.filters, Filters) and r.filters.area and r.filters.area[0] > 0
        if r.map != "linear" or r.mask.get("method") != "zero" or bounded:
            how = "mask method zero and filters: {area: null} with map: linear, or map: daam and a prompt of no class"
            yield f"kept wants {NEGATIVE}, images of no class, which {r.map} cannot have so: choose {how}"


def _wrong_prompts(r):
    texts = r.prompts if isinstance(r.prompts, tuple) else ()
    if not texts or not all(map(_is_text, texts)):
        yield f"prompts is {_SHORT.repr(r.prompts)}: it is a list of one or more, such as [a fire], each {_TEXT}"
        return
    lists, used = r.lists if isinstance(r.lists, Mapping) else {}, set()
    if not isinstance(r.lists, Mapping):
        yield f"lists is {_SHORT.repr(r.lists)}: it maps names to lists of texts"
    known = ", ".join(map(str, lists)) or "nothing"
    for prompt in texts:
        try:
            names = names_in(prompt)
        except ValueError as error:
            yield f"prompt {prompt!r} cannot be read: {error}"
            continue
        used |= set(names)
        yield from (f"prompt {prompt!r} names {{{n}}}, but lists has {known}" for n in names if n not in lists)
    for name, values in lists.items():
        if not isinstance(name, str) or not name.isidentifier():
            yield f"list {name!r}: a name begins with a letter, and has letters, digits and _ alone"
        if not isinstance(values, list | tuple) or not values or not all(v and _is_text(v, empty=True) for v in values):
            yield f"list {name!r} is {_SHORT.repr(values)}: it holds one or more, each {_TEXT}"
        if name not in used:
            yield f"list {name!r} is in no prompt"


def _wrong_classes(r):
    if not isinstance(r.classes, Mapping) or not 0 < len(r.classes) <= MAX_CLASSES:
        yield f"classes is {_SHORT.repr(r.classes)}: it maps 1 to {MAX_CLASSES} names to words, such as {{fire: fire}}"
        return
    files = {}
    for name, word in r.classes.items():
        if not isinstance(name, str) or not re.fullmatch("[a-zA-Z0-9 _-]{1,100}", name):
            hint = "" if isinstance(name, str) else "; YAML wants quotation marks around yes, no, on, off and numbers"
            right = "a name has 1 to 100 letters a to z, digits, spaces, - and _, as files are named after it"
            yield f"class {name!r}: {right}{hint}"
        elif r.labels is False and (other := files.setdefault(mask_name(name).lower(), name)) != name:
            yield f"classes {other!r} and {name!r}: their masks' files would have one name where case does not count"
        if not _is_text(word):
            yield f"class {name!r} is labeled by {_SHORT.repr(word)}: give {_TEXT}"


def mask_name(name: str) -> str:
    """Return a class's part of the names of its mask files, and of their column in metadata.jsonl."""
    return name.replace(" ", "_")


def _wrong_looking(r):
    """Say where photos cannot be looked at so, or something is said that means nothing for photos."""
    if r.photos is None:
        return
    if not isinstance(r.photos, Photos):
        yield f"photos is {_SHORT.repr(r.photos)}: name a folder; or where, tiles, looks, agree and timesteps"
        return
    yield from wrong_photos(r.photos)
    if isinstance(r.prompts, tuple) and len(r.prompts) != 1:
        yield f"prompts are {len(r.prompts)}: photos have one, that says what all of them show"
    told = [f.name for f in fields(r) if f.name in OF_GENERATION and getattr(r, f.name) != _default(f)]
    yield from (f"{name} is {_SHORT.repr(getattr(r, name))}: photos are not generated, leave it out" for name in told)
    if r.images not in (None, 1, len(r.photos.names)):
        yield f"images is {_SHORT.repr(r.images)}: there is one record for each photo, leave it out"


def _default(one):
    return one.default if one.default_factory is MISSING else one.default_factory()


def _wrong_mask(r):
    try:
        check_mask(r.mask)
    except ValueError as error:
        yield str(error)
    if r.map != "linear" and isinstance(r.mask, Mapping) and r.mask.get("method") == "zero":
        yield "mask method zero cuts the maps of learned tokens: it wants map: linear"


def _wrong_instances(r):
    if r.instances is None:
        return
    try:
        check_instances(r.instances)
    except ValueError as error:
        yield str(error)
        return
    if r.photos is not None and needs_attention(r.instances):
        yield "instances of photos, seen in tiles and through several noises, have no edges: write connected or dbscan"
    if r.labels is False:
        yield "instances are cut from label images: leave labels out, or instances, as masks of classes may overlap"


def _wrong_filters(f):
    if not isinstance(f, Filters):
        yield f"filters is {_SHORT.repr(f)}: it has {', '.join(x.name for x in fields(Filters))}"
        return
    if f.area is not None and not (_is_pair(f.area, lambda x: _is_number(x, 0, 1)) and f.area[0] < f.area[1]):
        yield f"filters: area is {_SHORT.repr(f.area)}: [least, largest] fraction of the image, such as [0.05, 0.95]"
    for name, least, most in (("flat", 0, 1), ("blank", 0, 255), ("duplicates", 0, 64), ("similarity", -1, 1)):
        value = getattr(f, name)
        if value is not None and not _is_number(value, least, most):
            yield f"filters: {name} is {_SHORT.repr(value)}: a number from {least} to {most}, or nothing"
    if f.clip is not None and not _is_text(f.clip):
        yield f"filters: clip is {_SHORT.repr(f.clip)}: a folder or hub id of a CLIP model"
    if f.similarity is not None and f.clip is None:
        yield "filters: similarity wants clip, a folder or hub id of a CLIP model"
