"""Recipes of labeled data sets: what is generated, which words label it, how maps become masks, what is rejected.

A recipe is checked as a whole when it is made: one error names everything that is wrong with it.
"""

import difflib
import hashlib
import itertools
import json
import math
import re
import reprlib
import string
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path

import yaml

from ..masks import check_mask
from ..pipelines import DTYPES
from ..recording.pieces import split
from ..recording.words import matches
from ..storage import write_text
from .instances import check_instances, needs_attention
from .photos import Photos, find_photos, wrong_photos

__all__ = ["Filters", "Recipe", "mask_name"]

RECIPE_FORMAT = 1  # recipes of later formats are refused
NEGATIVE = "background"  # what `Recipe.kept` calls records that have no class
_ATTEMPTS = 10  # most records per one that is to be kept, where a recipe does not say how many images
_LATER = ("dtype", "kept", "photos", "instances")  # settings that older recipes lack: None is left out of digests
MAPS = ("daam", "ovam", "linear")
SCHEDULERS = (
    "DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "LCMScheduler", "PNDMScheduler",
    "UniPCMultistepScheduler",
)  # fmt: skip
_OF_GENERATION = ("steps", "guidance", "negative", "scheduler", "lists")  # mean nothing where photos are labeled
MAX_CLASSES = 254  # 0 is the background, 255 is ignored
_MAX_RECORDS, _MAX_PROMPTS, _MAX_SEED = 10**7, 10**6, 2**64 - 1
_MAX_BYTES = _MAX_VALUES = 10**7  # of a file, and of the values in it once its aliases are written out
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


@dataclass(frozen=True)
class Recipe:
    """A labeled data set before it is made. Record i has the prompt i // images and the seed `seed` + i.

    Attributes
    ----------
    prompts, lists : list of str, dict of str to list of str
        Prompts, with {name} where each entry of the list `name` is to stand; every combination is a prompt.
    classes : dict of str to str
        What labels each class, in the order of its number in label images, from 1 on: a word of the prompts ("daam"),
        any text ("ovam", "linear"), or the name of a learned token ("linear").
    model : str
        As `load_pipeline` takes it.
    images, seed : int
        Images per prompt, and the seed of record 0. Default: 1; with `kept`, ten times what is wanted.
    kept : int or dict of str to int, optional
        Records to keep, in all or with each class ("background": with none); `images` is then the most made per prompt,
        in turn: record i has the prompt i % prompts. Default: all that pass the filters.
    steps, guidance, negative : int, float, str
        Denoising steps, guidance scale and negative prompt.
    size, scheduler : tuple of two int, str
        (height, width) in pixels, and the name of a diffusers scheduler. Default: the model's own. LCMScheduler is for
        models distilled for it: 4 to 8 steps, guidance 1 to 2.
    photos : Photos or str, optional
        Photos that are labeled in the place of generated images, or where they lie; `prompts` is then one text.
    dtype : str, optional
        "float32", "float16" or "bfloat16", which the model computes in. Default: float16 on a GPU, float32 on the CPU.
    batch, threads, shard : int
        Images per call of the model, threads of torch per process (rounding depends on both), and batches per shard,
        which is made as a whole, and again if it was interrupted: with `kept`, smaller ones draw less in vain.
    map, context : str
        "daam" (words of the prompt), "ovam" (any text) or "linear" (any text or learned token); for "ovam", a phrase
        with {} where the text stands.
    propagate, attention : int
        How often maps are propagated along self-attention, and the height of the self-attention used.
    tokens : str, optional
        File of learned tokens, for "linear".
    mask, filters : dict, Filters
        {"method": "otsu"}, or other settings of `attnlab.masks.mask_by`; and what a record must be to be kept.
    band : float in 0..1
        Pixels nearer to a mask's border than this fraction of the way to the map's maximum are ignored (255).
    labels : bool
        Write one label image per record. False: one mask per class.
    instances : dict, optional
        {} to write an image of single things per record, cut from its label image by `split_instances`; or
        {"method": "edges"} and other settings of it. Default: none, and exports take connected regions.
    """

    prompts: tuple[str, ...] | None = None
    classes: Mapping[str, str] = field(default_factory=dict)
    model: str = "tiny"
    lists: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    images: int | None = None
    seed: int = 0
    steps: int = 20
    guidance: float = 4.0
    negative: str = ""
    size: tuple[int, int] | None = None
    scheduler: str | None = None
    batch: int = 10
    threads: int = 2
    shard: int = 5
    map: str = "daam"
    context: str = "{}"
    propagate: int = 0
    attention: int = 16
    tokens: str | None = None
    mask: Mapping[str, object] = field(default_factory=lambda: {"method": "otsu"})
    band: float = 0.0
    labels: bool = True
    filters: Filters = field(default_factory=Filters)
    dtype: str | None = None
    kept: int | Mapping[str, int] | None = None
    photos: Photos | None = None
    instances: Mapping[str, object] | None = None

    def __post_init__(self):
        _settle(self)
        _refuse(_problems(self))
        _count_images(self)
        _refuse(_wrong_size(self))

    def __len__(self) -> int:
        return len(self.texts) * self.images

    @cached_property
    def texts(self) -> list[str]:
        """All prompts, filled with every combination of the lists they name, in the order of the lists."""
        found = []
        for prompt in self.prompts:
            names = _fields(prompt)
            combinations = itertools.product(*(self.lists[name] for name in names))
            found += [prompt.format(**dict(zip(names, values, strict=True))) for values in combinations]
        return found

    def prompt(self, index: int) -> str:
        """Return the prompt of a record."""
        return self.texts[index // self.images if self.kept is None else index % len(self.texts)]

    def seed_of(self, index: int) -> int:
        """Return the seed of a record."""
        return self.seed + index

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-len(self) // (_together(self) * self.shard))

    def batches(self, number: int) -> list[range]:
        """Return the records of each batch of a shard."""
        step = _together(self)
        first, last = (min(n * step * self.shard, len(self)) for n in (number, number + 1))
        return [range(i, min(i + step, last)) for i in range(first, last, step)]

    @cached_property
    def digest(self) -> str:
        """A hash of all settings; of photos that of their bytes, wherever they lie."""
        values = self.as_dict()
        values.get("photos", {}).pop("where", None)
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

    def as_dict(self) -> dict:
        """Return the settings that mean something as JSON types; later ones, such as `dtype`, where they are given."""
        unused = {name for name in _LATER if getattr(self, name) is None} | {*(_OF_GENERATION if self.photos else ())}
        values = {name: value for name, value in asdict(self).items() if name not in unused}
        return json.loads(json.dumps({"format": RECIPE_FORMAT, **values}, default=dict))

    def check(self, tokenizer) -> None:
        """Raise ValueError where "daam" is to label by a word that is in no prompt, or twice in one, or is cut off.

        The model reads a prompt up to the end of its window, and no further.
        """
        if self.map == "daam":
            _refuse(_wrong_words(self, tokenizer))

    def save(self, path: str | Path) -> Path:
        """Write as YAML, whole or not at all."""
        values = self.as_dict()
        raw = "\x85" not in json.dumps(values, ensure_ascii=False)  # which PyYAML writes raw and reads as "\n"
        return write_text(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=raw))

    @classmethod
    def load(cls, path: str | Path) -> "Recipe":
        """Read YAML. FileNotFoundError or ValueError, with everything that is wrong, where that cannot be."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no recipe {path}" + (": name the file in that folder" if path.is_dir() else ""))
        try:
            return cls(**_fields_in(path))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def _fields_in(path):
    """Read the fields of a recipe from YAML; ValueError for what is none."""
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"it is no recipe: one has at most {_MAX_BYTES} bytes")
    try:
        loader = yaml.SafeLoader(path.read_text("utf-8"))
        node = loader.get_single_node()
        values = None if node is None or _count(node, {}) > _MAX_VALUES else loader.construct_document(node)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        hint = "write text with {, }, :, #, quotes or tabs in it between quotation marks"
        raise ValueError(f"it is not YAML: {error}\n{hint}") from None
    if not isinstance(values, dict):
        raise ValueError("it is no recipe: write `prompts: [...]`, `classes: {fire: fire}`, ...")
    version = values.pop("format", RECIPE_FORMAT)
    if version != RECIPE_FORMAT:
        raise ValueError(f"it has format {version}, this attnlab reads {RECIPE_FORMAT}: install a later one")
    known = [f.name for f in fields(Recipe)]
    if unknown := [name for name in values if name not in known]:
        hints = {name: difflib.get_close_matches(str(name), known, 1) for name in unknown}
        named = [f"{name!r}" + (f" (did you mean {hint[0]}?)" if hint else "") for name, hint in hints.items()]
        raise ValueError(f"a recipe has no {', '.join(named)}; it has {', '.join(known)}")
    wanted = ["classes"] if values.get("photos") else ["prompts", "classes"]
    if missing := [name for name in wanted if name not in values]:
        raise ValueError(f"it lacks {' and '.join(missing)}")
    return values


def _count(node, known):
    """Count the values under a YAML node as if its aliases were written out; ValueError for a name that is twice."""
    if id(node) not in known:
        known[id(node)] = math.inf  # of what holds itself
        below = node.value if isinstance(node, yaml.SequenceNode) else []
        if isinstance(node, yaml.MappingNode):
            below = itertools.chain(*node.value)
            lines: dict[str, list[int]] = {}
            for name, _ in node.value:
                if isinstance(name, yaml.ScalarNode):
                    lines.setdefault(name.value, []).append(name.start_mark.line + 1)
            if twice := [(name, where) for name, where in lines.items() if len(where) > 1]:
                (name, where), *_ = twice
                said = f"{name!r} is there twice, in lines {where[0]} and {where[1]}"
                raise ValueError(f"{said}: the first would be lost, leave one of them out")
        known[id(node)] = 1 + sum(_count(one, known) for one in below)
    return known[id(node)]


def _refuse(problems):
    """Raise a ValueError that names all problems, if there are any."""
    problems = list(problems)
    if problems:
        more = [f"and {len(problems) - _MAX_SAID} more"] if len(problems) > _MAX_SAID else []
        said = "".join(f"\n- {problem}" for problem in [*problems[:_MAX_SAID], *more])
        raise ValueError(f"this recipe cannot be made:{said}")


def _wrong_words(recipe, tokenizer):
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


def _fields(prompt):
    """List the names that stand in braces in a prompt, each once; ValueError where more than a name is in braces."""
    found = [parts for _, *parts in string.Formatter().parse(prompt) if parts[0] is not None]
    if more := [name for name, form, conversion in found if form or conversion]:
        raise ValueError(f"write {{{more[0]}}} alone, without : or !")
    return list(dict.fromkeys(name for name, _, _ in found))


def _problems(r):
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
    return sum(math.prod(len(r.lists[name]) for name in _fields(prompt)) for prompt in r.prompts)


def _most_images(r):
    """Return how many images per prompt are made at most, where a recipe does not say it."""
    wanted = sum(r.kept.values()) if isinstance(r.kept, Mapping) else r.kept
    return 1 if wanted is None else -(-_ATTEMPTS * wanted // _count_prompts(r))


def _wrong_size(r):
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
            names = _fields(prompt)
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


def _together(r):
    """Return the records of a batch. Photos are large, and of several sizes: tiles and looks of one make a batch."""
    return 1 if r.photos else r.batch


def _settle(r):
    """Give a recipe the types of its fields, where YAML has none of them, and with photos a prompt."""
    for name in ("prompts", "size"):
        if isinstance(getattr(r, name), list):
            object.__setattr__(r, name, tuple(getattr(r, name)))
    if isinstance(r.filters, Mapping) and set(r.filters) <= {f.name for f in fields(Filters)}:
        object.__setattr__(r, "filters", Filters(**r.filters))
    photos = {"where": r.photos} if isinstance(r.photos, str) else r.photos
    if isinstance(photos, Mapping) and "where" in photos and set(photos) <= {f.name for f in fields(Photos)}:
        object.__setattr__(r, "photos", Photos(**photos))
    if r.photos is not None and r.prompts is None:
        object.__setattr__(r, "prompts", ("a photo",))


def _count_images(r):
    """Find the photos of a recipe, where it does not know them, and say how many images its prompts have."""
    if r.photos:
        found = r.photos if r.photos.files else replace(r.photos, files=find_photos(r.photos.where))
        object.__setattr__(r, "photos", found)
        object.__setattr__(r, "images", len(found.names))
    elif r.images is None:
        object.__setattr__(r, "images", _most_images(r))


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
    told = [f.name for f in fields(r) if f.name in _OF_GENERATION and getattr(r, f.name) != _default(f)]
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
