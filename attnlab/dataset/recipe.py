"""Recipes of labeled data sets: what is generated, which words label it, how maps become masks, what is rejected.

A recipe is checked as a whole when it is made: one error names everything that is wrong with it.
"""

import difflib
import hashlib
import itertools
import json
import re
import string
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path

import yaml

from ..masks import check_mask
from ..recording.words import matches, split
from ..storage import write_text

__all__ = ["Filters", "Recipe"]

RECIPE_FORMAT = 1  # recipes of later formats are refused
MAPS = ("daam", "ovam", "linear")
SCHEDULERS = ("DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler")
MAX_CLASSES = 254  # 0 is the background, 255 is ignored


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
        Images per prompt, and the seed of record 0.
    steps, guidance, negative : int, float, str
        Denoising steps, guidance scale and negative prompt.
    size, scheduler : tuple of two int, str
        (height, width) in pixels, and the name of a diffusers scheduler. Default: the model's own.
    batch, threads, shard : int
        Images per call of the model, threads of torch per process (rounding depends on both), and batches per shard,
        which is made again if it was interrupted.
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
    """

    prompts: tuple[str, ...]
    classes: Mapping[str, str]
    model: str = "tiny"
    lists: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    images: int = 1
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

    def __post_init__(self):
        for name in ("prompts", "size"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if isinstance(self.filters, Mapping) and set(self.filters) <= {f.name for f in fields(Filters)}:
            object.__setattr__(self, "filters", Filters(**self.filters))
        _refuse(_problems(self))

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
        return self.texts[index // self.images]

    def seed_of(self, index: int) -> int:
        """Return the seed of a record."""
        return self.seed + index

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-len(self) // (self.batch * self.shard))

    def batches(self, number: int) -> list[range]:
        """Return the records of each batch of a shard."""
        first = number * self.batch * self.shard
        last = min(first + self.batch * self.shard, len(self))
        return [range(i, min(i + self.batch, last)) for i in range(first, last, self.batch)]

    @property
    def digest(self) -> str:
        """A hash of all settings."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()[:16]

    def as_dict(self) -> dict:
        """Return the settings as JSON types."""
        return json.loads(json.dumps({"format": RECIPE_FORMAT, **asdict(self)}, default=dict))

    def check(self, tokenizer) -> None:
        """Raise ValueError where "daam" is to label by a word that no prompt has, or that one has twice."""
        if self.map == "daam":
            _refuse([*_wrong_words(self, tokenizer)])

    def save(self, path: str | Path) -> Path:
        """Write as YAML, whole or not at all."""
        return write_text(path, yaml.safe_dump(self.as_dict(), sort_keys=False, allow_unicode=True))

    @classmethod
    def load(cls, path: str | Path) -> "Recipe":
        """Read YAML. FileNotFoundError or ValueError, with everything that is wrong, where that cannot be."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no recipe {path}")
        try:
            return cls(**_fields_in(path))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def _fields_in(path):
    """Read the fields of a recipe from YAML; ValueError for what is none."""
    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"it is not YAML: {error}") from None
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
    if missing := [name for name in ("prompts", "classes") if name not in values]:
        raise ValueError(f"it lacks {' and '.join(missing)}")
    return values


def _refuse(problems):
    """Raise a ValueError that names all problems, if there are any."""
    if problems:
        raise ValueError("this recipe cannot be made:" + "".join(f"\n- {problem}" for problem in problems))


def _wrong_words(recipe, tokenizer):
    """Yield what is wrong with the words that label the classes, one sentence each."""
    found = {text: split(tokenizer, tokenizer(text).input_ids) for text in recipe.texts}
    for name, word in recipe.classes.items():
        times = {text: len(matches(words, word)) for text, words in found.items()}
        if not any(times.values()):
            yield f"class {name!r}: no prompt has the word {word!r}; any text does with map: ovam"
        yield from (f"class {name!r}: {word!r} is {n} times in {text!r}" for text, n in times.items() if n > 1)


def _fields(prompt):
    """List the names that stand in braces in a prompt, each once."""
    return list(dict.fromkeys(name for _, name, _, _ in string.Formatter().parse(prompt) if name is not None))


def _problems(r):
    """List everything that is wrong with a recipe, one sentence each."""
    whole = {"images": 1, "seed": 0, "steps": 1, "batch": 1, "threads": 1, "shard": 1, "propagate": 0, "attention": 1}
    is_size = r.size is None or (len(r.size) == 2 and all(_is_whole(n, 8) and n % 8 == 0 for n in r.size))
    is_tokens = r.tokens is None or (r.map == "linear" and Path(str(r.tokens)).is_file())
    rows = [(n, _is_whole(getattr(r, n), least), f"it is a whole number from {least} on") for n, least in whole.items()]
    rows += [(name, isinstance(getattr(r, name), str), "it is a text") for name in ("model", "negative", "context")]
    rows += [
        ("guidance", _is_number(r.guidance, 0, float("inf")), "it is a number from 0 on"),
        ("band", _is_number(r.band, 0, 1) and r.band < 1, "it is a fraction from 0 to below 1"),
        ("size", is_size, "(height, width) in multiples of 8, or leave it out"),
        ("labels", type(r.labels) is bool, "it is true or false"),
        ("map", r.map in MAPS, f"choose one of {', '.join(MAPS)}"),
        ("context", r.map != "ovam" or str(r.context).count("{}") == 1, "write {} once, where the text stands"),
        ("tokens", is_tokens, "name a file of learned tokens, and map: linear"),
        ("scheduler", r.scheduler in (None, *SCHEDULERS), f"choose one of {', '.join(SCHEDULERS)}, or leave it out"),
    ]
    found = [f"{name} is {getattr(r, name)!r}: {right}" for name, is_right, right in rows if not is_right]
    return [*found, *_wrong_prompts(r), *_wrong_classes(r.classes), *_wrong_mask(r), *_wrong_filters(r.filters)]


def _is_number(value, least, most):
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


def _is_whole(value, least):
    return type(value) is int and value >= least


def _wrong_prompts(r):
    texts = r.prompts if isinstance(r.prompts, tuple) else ()
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        yield f"prompts is {r.prompts!r}: it is a list of one or more texts"
        return
    lists, used = r.lists if isinstance(r.lists, Mapping) else {}, set()
    if not isinstance(r.lists, Mapping):
        yield f"lists is {r.lists!r}: it maps names to lists of texts"
    for prompt in texts:
        try:
            names = _fields(prompt)
        except ValueError as error:
            yield f"prompt {prompt!r} cannot be read: {error}"
            continue
        used |= set(names)
        known = ", ".join(lists) or "nothing"
        yield from (f"prompt {prompt!r} names {{{n}}}, but lists has {known}" for n in names if n not in lists)
    for name, values in lists.items():
        if not isinstance(values, list | tuple) or not values or not all(isinstance(v, str) and v for v in values):
            yield f"list {name!r} is {values!r}: it holds one or more texts"
        if name not in used:
            yield f"list {name!r} is in no prompt"


def _wrong_classes(classes):
    if not isinstance(classes, Mapping) or not 0 < len(classes) <= MAX_CLASSES:
        yield f"classes is {classes!r}: it maps names, 1 to {MAX_CLASSES}, to words"
        return
    for name, word in classes.items():
        if not isinstance(name, str) or not re.fullmatch("[a-zA-Z0-9 _-]+", name):
            yield f"class {name!r}: a name has letters, digits, spaces, - and _ alone, as files are named after it"
        if not isinstance(word, str) or not word.strip():
            yield f"class {name!r} is labeled by {word!r}: give a word or text"


def _wrong_mask(r):
    try:
        check_mask(r.mask)
    except ValueError as error:
        yield str(error)
    if r.map != "linear" and isinstance(r.mask, Mapping) and r.mask.get("method") == "zero":
        yield "mask method zero cuts the maps of learned tokens: it wants map: linear"


def _wrong_filters(f):
    if not isinstance(f, Filters):
        yield f"filters is {f!r}: it has {', '.join(x.name for x in fields(Filters))}"
        return
    if f.area is not None and not (len(f.area) == 2 and 0 <= f.area[0] < f.area[1] <= 1):
        yield f"filters: area is {f.area!r}: [least, largest] fraction of the image, such as [0.05, 0.95]"
    for name, least, most in (("flat", 0, 1), ("blank", 0, 255), ("duplicates", 0, 64), ("similarity", -1, 1)):
        value = getattr(f, name)
        if value is not None and not _is_number(value, least, most):
            yield f"filters: {name} is {value!r}: a number from {least} to {most}, or nothing"
    if f.clip is not None and not isinstance(f.clip, str):
        yield f"filters: clip is {f.clip!r}: a folder or hub id of a CLIP model"
    if f.similarity is not None and f.clip is None:
        yield "filters: similarity wants clip, a folder or hub id of a CLIP model"
