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

from ..recording.words import matches, split

FORMAT = 1  # of recipes: those of later versions are refused
MAPS = ("daam", "ovam", "linear")
METHODS = {  # how a map becomes a mask, and the settings each takes
    "threshold": {"level"},
    "otsu": set(),
    "dbscan": {"quantile", "level", "eps", "min_samples", "keep", "min_area"},
    "random_walker": {"low", "high", "beta"},
    "zero": set(),
}
SCHEDULERS = ("DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler")
MOST = 254  # classes: 0 is the background, 255 undecided


@dataclass(frozen=True)
class Filters:
    """What a record has to be to be kept; None leaves a filter out.

    area : least and largest share of the image that its masks cover together
    flat : least range of each map, as a share of its maximum; not of linear maps, which have no zero
    blank : least standard deviation of the image's gray values, 0..255
    duplicates : an image whose difference hash (64 bits) is that of an earlier one but for so many bits is rejected
    similarity : least cosine of image and prompt, -1..1, by the CLIP model `clip`, a folder or hub id
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

    Attributes
    ----------
    prompts : texts, with {name} where each entry of a list is to stand
    classes : what each class is labeled by, in the order of its number in label images, from 1 on: a word of the
        prompts ("daam"), any text ("ovam", "linear"), or the name of a learned token of the file `tokens` ("linear")
    model : as for `load_pipeline`
    lists : the lists that prompts name; every combination is a prompt
    images : of each prompt
    seed : of record 0
    steps, guidance, negative, size : of the generation: denoising steps, guidance scale, negative prompt, (height,
        width) in pixels or None for the model's own
    scheduler : name of a diffusers scheduler, or None for the model's own
    batch : images that are generated together; a part of what the data set is, as rounding depends on it
    threads : of torch, in each process; a part of what the data set is, for the same reason
    shard : batches that are written together, and begun again together after an interruption
    map : "daam" (words of the prompt), "ovam" (any text), "linear" (any text or learned token)
    context : for "ovam", a phrase with {} where the text stands
    propagate : how often maps are spread along self-attention; `attention`: its map height
    tokens : a file of learned tokens
    mask : {"method": "otsu"}, or another of METHODS with settings of the mask function of that name
    band : pixels whose value is nearer to the border of a mask than this share of the way to its maximum are undecided,
        255; 0 decides all
    labels : one label image a record; False: one mask file a class
    filters : see `Filters`
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
        if isinstance(self.filters, Mapping):
            unknown = set(self.filters) - {f.name for f in fields(Filters)}
            if not unknown:
                object.__setattr__(self, "filters", Filters(**self.filters))
        problems = list(_problems(self))
        if problems:
            raise ValueError("this recipe cannot be made:" + "".join(f"\n- {problem}" for problem in problems))

    def __len__(self) -> int:
        return len(self.texts) * self.images

    @cached_property
    def texts(self) -> list[str]:
        """Every prompt, with its lists filled in."""
        return [text for prompt in self.prompts for text in _filled(prompt, self.lists)]

    def prompt(self, index: int) -> str:
        return self.texts[index // self.images]

    def seed_of(self, index: int) -> int:
        return self.seed + index

    @property
    def shards(self) -> int:
        return -(-len(self) // (self.batch * self.shard))

    def batches(self, number: int) -> list[range]:
        """Records of each batch of a shard."""
        first = number * self.batch * self.shard
        last = min(first + self.batch * self.shard, len(self))
        return [range(i, min(i + self.batch, last)) for i in range(first, last, self.batch)]

    @property
    def digest(self) -> str:
        """A hash of everything in it."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()[:16]

    def as_dict(self) -> dict:
        """As JSON types."""
        return json.loads(json.dumps({"format": FORMAT, **asdict(self)}, default=dict))

    def check(self, tokenizer) -> None:
        """ValueError where "daam" is asked for a word that no prompt has, or that one has twice."""
        if self.map != "daam":
            return
        found = {text: split(tokenizer, tokenizer(text).input_ids) for text in self.texts}
        problems = []
        for name, word in self.classes.items():
            times = {text: len(matches(words, word)) for text, words in found.items()}
            if not any(times.values()):
                problems.append(f"class {name!r}: no prompt has the word {word!r}; any text does with map: ovam")
            problems += [f"class {name!r}: {word!r} is {n} times in {text!r}" for text, n in times.items() if n > 1]
        if problems:
            raise ValueError("this recipe cannot be made:" + "".join(f"\n- {problem}" for problem in problems))

    def save(self, path: str | Path) -> Path:
        """Write as YAML, whole or not at all."""
        path = Path(path)
        part = path.with_name(path.name + ".part")
        part.write_text(yaml.safe_dump(self.as_dict(), sort_keys=False, allow_unicode=True), "utf-8")
        return part.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> "Recipe":
        """Read YAML; FileNotFoundError or ValueError where that cannot be, with everything that is wrong."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no recipe {path}")
        try:
            values = yaml.safe_load(path.read_text("utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not YAML: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path} is no recipe: write `prompts: [...]`, `classes: {{fire: fire}}`, ...")
        version = values.pop("format", FORMAT)
        if version != FORMAT:
            raise ValueError(f"{path} has format {version}, this attnlab reads {FORMAT}: install a later one")
        known = [f.name for f in fields(cls)]
        if unknown := [name for name in values if name not in known]:
            hints = {name: difflib.get_close_matches(str(name), known, 1) for name in unknown}
            named = [f"{name!r}" + (f" (did you mean {hint[0]}?)" if hint else "") for name, hint in hints.items()]
            raise ValueError(f"{path}: a recipe has no {', '.join(named)}; it has {', '.join(known)}")
        if missing := [name for name in ("prompts", "classes") if name not in values]:
            raise ValueError(f"{path} lacks {' and '.join(missing)}")
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def _filled(prompt, lists):
    """A template with every combination of the lists it names, in the order of the lists."""
    names = list(dict.fromkeys(_fields(prompt)))
    for values in itertools.product(*(lists[name] for name in names)):
        yield prompt.format(**dict(zip(names, values, strict=True)))


def _fields(prompt):
    return [name for _, name, _, _ in string.Formatter().parse(prompt) if name is not None]


def _problems(r):
    """Everything that is wrong with a recipe, one sentence each."""
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


def _wrong_types(r):
    whole = {"images": 1, "seed": 0, "steps": 1, "batch": 1, "threads": 1, "shard": 1, "propagate": 0, "attention": 1}
    for name, least in whole.items():
        value = getattr(r, name)
        if type(value) is not int or value < least:
            yield f"{name} is {value!r}: it is a whole number from {least} on"
    if isinstance(r.guidance, bool) or not isinstance(r.guidance, int | float) or not r.guidance >= 0:
        yield f"guidance is {r.guidance!r}: it is a number from 0 on"
    if not isinstance(r.band, int | float) or not 0 <= r.band < 1:
        yield f"band is {r.band!r}: it is a share from 0 to below 1"
    if r.size is not None and (len(r.size) != 2 or not all(type(n) is int and n > 0 and n % 8 == 0 for n in r.size)):
        yield f"size is {r.size!r}: (height, width) in multiples of 8, or leave it out"
    for name in ("model", "negative", "context"):
        if not isinstance(getattr(r, name), str):
            yield f"{name} is {getattr(r, name)!r}: it is a text"
    if type(r.labels) is not bool:
        yield f"labels is {r.labels!r}: it is true or false"


def _wrong_prompts(r):
    if (
        not isinstance(r.prompts, tuple)
        or not r.prompts
        or not all(isinstance(p, str) and p.strip() for p in r.prompts)
    ):
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
    if not isinstance(r.classes, Mapping) or not 0 < len(r.classes) <= MOST:
        yield f"classes is {r.classes!r}: it maps names, 1 to {MOST}, to words"
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
    if unknown := sorted(map(str, set(mask) - METHODS[method] - {"method"})):
        known = ", ".join(sorted(METHODS[method])) or "no settings"
        yield f"mask method {method} has no {', '.join(unknown)}; it has {known}"
    if method == "zero" and r.map != "linear":
        yield "mask method zero cuts the maps of learned tokens: it wants map: linear"


def _wrong_filters(f):
    if not isinstance(f, Filters):
        yield f"filters is {f!r}: it has {', '.join(x.name for x in fields(Filters))}"
        return
    if f.area is not None and not (len(f.area) == 2 and 0 <= f.area[0] < f.area[1] <= 1):
        yield f"filters: area is {f.area!r}: [least, largest] share of the image, such as [0.05, 0.95]"
    for name, least, most in (("flat", 0, 1), ("blank", 0, 255), ("duplicates", 0, 64), ("similarity", -1, 1)):
        value = getattr(f, name)
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most
        ):
            yield f"filters: {name} is {value!r}: a number from {least} to {most}, or nothing"
    if f.clip is not None and not isinstance(f.clip, str):
        yield f"filters: clip is {f.clip!r}: a folder or hub id of a CLIP model"
    if f.similarity is not None and f.clip is None:
        yield "filters: similarity wants clip, a folder or hub id of a CLIP model"
