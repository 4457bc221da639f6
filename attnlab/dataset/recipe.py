"""Recipes of labeled data sets: what is generated, which words label it, how maps become masks, what is rejected.

    recipe = Recipe(
        prompts=["{place} on fire at {time}"], lists={"place": ["a house", "a tree"], "time": ["night", "dusk"]},
        classes={"fire": "fire"}, images=4,
    )
    recipe = Recipe.load("fires.yaml")              # the same fields in YAML
    recipe.prompt(5), recipe.seed_of(5)             # what record 5 is made from, and nothing else
    recipe.check(tokenizer)                         # what only the model's tokenizer can tell

A recipe is checked as a whole when it is made: one error names everything that is wrong with it.
"""

import difflib
import hashlib
import itertools
import json
import string
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path

import yaml

from ..masks import METHODS
from ..recording.words import matches, split
from ..storage import replacing

__all__ = ["Filters", "Recipe"]

RECIPE_FORMAT = 1  # recipes of later formats are refused
MAPS = ("daam", "ovam", "linear")
SCHEDULERS = ("DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler")
MAX_CLASSES = 254  # 0 is the background, 255 is ignored


@dataclass(frozen=True)
class Filters:
    """What a record must be to be kept; None leaves a filter out.

    Attributes
    ----------
    area : tuple of two float in 0..1
        Least and largest fraction of the image that its masks cover together.
    flat : float in 0..1
        Least range of each map, as a fraction of its maximum. Not of linear maps, which have no zero.
    blank : float
        Least standard deviation of the image's gray values, 0..255.
    duplicates : int
        An image is rejected if its difference hash (64 bits) differs from an earlier one's in at most so many bits.
    similarity : float in -1..1
        Least cosine of image and prompt by the CLIP model `clip`.
    clip : str
        Folder or hub id of a CLIP model.
    """

    area: tuple[float, float] | None = (0.05, 0.95)
    flat: float | None = 0.2
    blank: float | None = 4.0
    duplicates: int | None = 2
    similarity: float | None = None
    clip: str | None = None


@dataclass(frozen=True)
class Recipe:
    """A labeled data set before it is made. Record i has the prompt i // images and the seed `seed` + i.

    A flat table of settings, as people write them in YAML.

    Attributes
    ----------
    prompts : list of str
        Prompts, with {name} where each entry of a list is to stand.
    classes : dict of str to str
        What labels each class, in the order of its number in label images, from 1 on: a word of the prompts ("daam"),
        any text ("ovam", "linear"), or the name of a learned token ("linear").
    model : str
        As `load_pipeline` takes it.
    lists : dict of str to list of str
        The lists that prompts name; every combination is a prompt.
    images, seed : int
        Images per prompt, and the seed of record 0.
    steps, guidance, negative : int, float, str
        Denoising steps, guidance scale and negative prompt.
    size, scheduler : tuple of two int, str
        (height, width) in pixels, and the name of a diffusers scheduler. Default: the model's own.
    batch, threads, shard : int
        Images per call of the model, threads of torch per process (rounding depends on both), and batches per shard,
        which is made again if it was interrupted.
    map : str
        "daam" (words of the prompt), "ovam" (any text) or "linear" (any text or learned token).
    context : str
        For "ovam", a phrase with {} where the text stands.
    propagate, attention : int
        How often maps are propagated along self-attention, and the height of the self-attention used.
    tokens : str, optional
        File of learned tokens, for "linear".
    mask : dict
        {"method": "otsu"}, or other settings of `attnlab.masks.mask_by`.
    band : float in 0..1
        A pixel is ignored (255) if its value is nearer to the border of a mask than this fraction of the way to the
        maximum. 0 ignores none.
    labels : bool
        Write one label image per record. False: one mask per class.
    filters : Filters
        What a record must be to be kept.
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
        """All prompts, with their lists filled in."""
        return [text for prompt in self.prompts for text in _filled(prompt, self.lists)]

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
            _refuse(_wrong_words(self, tokenizer))

    def save(self, path: str | Path) -> Path:
        """Write as YAML, whole or not at all."""
        with replacing(path) as part:
            part.write_text(yaml.safe_dump(self.as_dict(), sort_keys=False, allow_unicode=True), "utf-8")
        return Path(path)

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
    if problems := list(problems):
        raise ValueError("this recipe cannot be made:" + "".join(f"\n- {problem}" for problem in problems))


def _wrong_words(recipe, tokenizer):
    """Yield what is wrong with the words that label the classes, one sentence each."""
    found = {text: split(tokenizer, tokenizer(text).input_ids) for text in recipe.texts}
    for name, word in recipe.classes.items():
        times = {text: len(matches(words, word)) for text, words in found.items()}
        if not any(times.values()):
            yield f"class {name!r}: no prompt has the word {word!r}; any text does with map: ovam"
        yield from (f"class {name!r}: {word!r} is {n} times in {text!r}" for text, n in times.items() if n > 1)


def _filled(prompt, lists):
    """Fill a template with every combination of the lists it names, in the order of the lists."""
    names = list(dict.fromkeys(_fields(prompt)))
    for values in itertools.product(*(lists[name] for name in names)):
        yield prompt.format(**dict(zip(names, values, strict=True)))


def _fields(prompt):
    return [name for _, name, _, _ in string.Formatter().parse(prompt) if name is not None]


def _problems(r):
    """Yield everything that is wrong with a recipe, one sentence each."""
    yield from _wrong_types(r)
    yield from _wrong_prompts(r)
    yield from _wrong_classes(r)
    if r.map not in MAPS:
        yield f"map is {r.map!r}: choose one of {', '.join(MAPS)}"
    if r.map == "ovam" and str(r.context).count("{}") != 1:
        yield f"context is {r.context!r}: write {{}} once, where the text stands"
    if r.tokens is not None and (r.map != "linear" or not Path(str(r.tokens)).is_file()):
        yield f"tokens is {r.tokens!r}: name a file of learned tokens, and map: linear"
    if r.scheduler is not None and r.scheduler not in SCHEDULERS:
        yield f"scheduler is {r.scheduler!r}: choose one of {', '.join(SCHEDULERS)}, or leave it out"
    yield from _wrong_mask(r)
    yield from _wrong_filters(r.filters)


def _is_number(value, least, most):
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


def _wrong_types(r):
    whole = {"images": 1, "seed": 0, "steps": 1, "batch": 1, "threads": 1, "shard": 1, "propagate": 0, "attention": 1}
    for name, least in whole.items():
        value = getattr(r, name)
        if type(value) is not int or value < least:
            yield f"{name} is {value!r}: it is a whole number from {least} on"
    if not _is_number(r.guidance, 0, float("inf")):
        yield f"guidance is {r.guidance!r}: it is a number from 0 on"
    if not _is_number(r.band, 0, 1) or r.band == 1:
        yield f"band is {r.band!r}: it is a fraction from 0 to below 1"
    if r.size is not None and (len(r.size) != 2 or not all(type(n) is int and n > 0 and n % 8 == 0 for n in r.size)):
        yield f"size is {r.size!r}: (height, width) in multiples of 8, or leave it out"
    for name in ("model", "negative", "context"):
        if not isinstance(getattr(r, name), str):
            yield f"{name} is {getattr(r, name)!r}: it is a text"
    if type(r.labels) is not bool:
        yield f"labels is {r.labels!r}: it is true or false"


def _wrong_prompts(r):
    texts = r.prompts if isinstance(r.prompts, tuple) else ()
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        yield f"prompts is {r.prompts!r}: it is a list of one or more texts"
        return
    lists = r.lists if isinstance(r.lists, Mapping) else {}
    if not isinstance(r.lists, Mapping):
        yield f"lists is {r.lists!r}: it maps names to lists of texts"
    used = set()
    for prompt in r.prompts:
        try:
            names = _fields(prompt)
        except ValueError as error:
            yield f"prompt {prompt!r} cannot be read: {error}"
            continue
        used |= set(names)
        for name in dict.fromkeys(names):
            if name not in lists:
                yield f"prompt {prompt!r} names {{{name}}}, but lists has {', '.join(lists) or 'nothing'}"
    for name, values in lists.items():
        if not isinstance(values, list | tuple) or not values or not all(isinstance(v, str) and v for v in values):
            yield f"list {name!r} is {values!r}: it holds one or more texts"
        if name not in used:
            yield f"list {name!r} is in no prompt"


def _wrong_classes(r):
    if not isinstance(r.classes, Mapping) or not 0 < len(r.classes) <= MAX_CLASSES:
        yield f"classes is {r.classes!r}: it maps names, 1 to {MAX_CLASSES}, to words"
        return
    for name, word in r.classes.items():
        plain = isinstance(name, str) and name and not set(name) - set(string.ascii_letters + string.digits + " -_")
        if not plain:
            yield f"class {name!r}: a name has letters, digits, spaces, - and _ alone, as files are named after it"
        if not isinstance(word, str) or not word.strip():
            yield f"class {name!r} is labeled by {word!r}: give a word or text"


def _wrong_mask(r):
    mask = r.mask if isinstance(r.mask, Mapping) else {}
    method = mask.get("method")
    if method not in METHODS:
        yield f"mask is {r.mask!r}: write {{method: one of {', '.join(METHODS)}}} and its settings"
        return
    if unknown := sorted(map(str, set(mask) - {*METHODS[method], "method"})):
        known = ", ".join(sorted(METHODS[method])) or "no settings"
        yield f"mask method {method} has no {', '.join(unknown)}; it has {known}"
    if method == "zero" and r.map != "linear":
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
