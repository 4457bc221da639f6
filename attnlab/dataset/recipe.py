"""Recipes of labeled data sets: what is generated, which words label it, how maps become masks, what is rejected.

A recipe is checked as a whole when it is made: one error names everything that is wrong with it.
"""

import difflib
import hashlib
import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path

import yaml

from ..storage import write_text
from .photos import Photos, find_photos
from .rules import OF_GENERATION, Filters, most_images, names_in, refuse, wrong_settings, wrong_size, wrong_words

__all__ = ["Recipe"]

RECIPE_FORMAT = 1  # recipes of later formats are refused
_LATER = ("dtype", "kept", "photos", "instances")  # settings that older recipes lack: None is left out of digests
_MAX_BYTES = _MAX_VALUES = 10**7  # of a file, and of the values in it once its aliases are written out


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
        refuse(wrong_settings(self))
        _count_images(self)
        refuse(wrong_size(self))

    def __len__(self) -> int:
        return len(self.texts) * self.images

    @cached_property
    def texts(self) -> list[str]:
        """All prompts, filled with every combination of the lists they name, in the order of the lists."""
        found = []
        for prompt in self.prompts:
            names = names_in(prompt)
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
        unused = {name for name in _LATER if getattr(self, name) is None} | {*(OF_GENERATION if self.photos else ())}
        values = {name: value for name, value in asdict(self).items() if name not in unused}
        return json.loads(json.dumps({"format": RECIPE_FORMAT, **values}, default=dict))

    def check(self, tokenizer) -> None:
        """Raise ValueError where "daam" is to label by a word that is in no prompt, or twice in one, or is cut off.

        The model reads a prompt up to the end of its window, and no further.
        """
        if self.map == "daam":
            refuse(wrong_words(self, tokenizer))

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
        object.__setattr__(r, "images", most_images(r))
