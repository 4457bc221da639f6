"""Write captions of street scenes: phrases for what is visible, joined in many ways, and the class of each word."""

from collections import defaultdict
from typing import NamedTuple

import numpy as np

from .world import World

__all__ = ["CLASS_OF", "NEARBY", "VISIBLE_AREA", "WORDS_OF", "count_visible", "write_caption"]

VISIBLE_AREA = 0.006  # a class that covers at least this fraction of the image counts as visible
_INSTANCE_AREA = 0.004  # and each single object of it that covers this fraction
WORDS_OF = {  # every word that names a class, by class
    "sky": ("sky",),
    "ground": ("grass", "dirt", "snow"),
    "road": ("road", "street"),
    "sidewalk": ("sidewalk",),
    "water": ("water", "river", "flood", "flooded"),
    "mountain": ("mountain", "mountains"),
    "building": ("building", "buildings", "house", "houses"),
    "tree": ("tree", "trees", "forest"),
    "car": ("car", "cars"),
    "person": ("person", "people"),
    "traffic light": ("traffic", "light", "lights"),
    "pole": ("pole", "poles"),
    "rider": ("rider", "riders", "cyclist"),
    "bicycle": ("bicycle", "bicycles", "bike"),
    "fire": ("fire", "flames", "burning"),
    "smoke": ("smoke",),
}
CLASS_OF = {word: name for name, words in WORDS_OF.items() for word in words}
_PLURALS = {"person": "people"}  # the others end in s
_NUMBERS = {2: "two", 3: "three"}
_PHRASES_OF_HOUR = {  # the sky, and how a caption may end
    "day": ("a blue sky", ("on a sunny day",)),
    "dusk": ("an orange sky", ("at dusk", "in the evening")),
    "night": ("a dark sky", ("at night",)),
    "overcast": ("a gray sky", ("on a cloudy day",)),
    "snow": ("a white sky", ("in winter", "on a snowy day")),
}
_PLACES = {
    "city": ("in an urban environment", "in a city", "in an urban environment"),
    "suburb": ("in a town", "in a neighbourhood"),
    "country": ("in the countryside",),
}
_OPENINGS = ("a photo of", "a picture of", "an image of", "a view of")
NEARBY = ("near", "next to", "beside")
_SYNONYMS = {"rider": "cyclist", "bicycle": "bike"}
_COLORED = {False: 0.45, True: 0.92}  # how often the color of a single object is said; True: in dense captions
_PART_OF_OTHER = 100  # instances from here on belong to another object: the pole of a light, the bicycle of a rider


class _Phrase(NamedTuple):
    """Words for some objects; `thing` (class, instance) if it is a single one, which others can be near to."""

    text: str
    thing: tuple[str, int] | None = None


def count_visible(ids: np.ndarray, things) -> dict[str, tuple[int, ...]]:
    """Return the classes that cover enough of `ids` (row, column) to be named, each with its visible instances."""
    area = np.bincount(ids.ravel(), minlength=len(things)) / ids.size
    by_class, by_instance = defaultdict(float), defaultdict(float)
    for thing, fraction in zip(things, area, strict=True):
        by_class[thing.name] += fraction
        by_instance[thing.name, thing.instance] += fraction
    return {
        name: tuple(i for (n, i), a in by_instance.items() if n == name and a >= _INSTANCE_AREA)
        for name, fraction in by_class.items()
        if fraction >= VISIBLE_AREA
    }


def write_caption(
    rng, world: World, seen: dict[str, tuple[int, ...]], dense: bool = False
) -> tuple[str, dict[str, str]]:
    """Write a caption that names only what is in `seen`; return it and {word: class} of its words for classes.

    Dense: three of four captions name all objects, most of them one by one and with their color, and what is behind
    them, though sky and ground no more often; the others are cut to one to five phrases, as usual ones all are.
    """
    burning = {fire.on for fire in world.fires} if "fire" in seen else set()
    groups = _groups(world, seen).items()
    groups = _one_by_one(rng, groups) if dense else groups
    solid = [_group(rng, world, noun, things, seen, burning, _COLORED[dense]) for noun, things in groups]
    rng.shuffle(solid)
    solid = [_Phrase(*p) for p in solid]
    if len(solid) > 1 and rng.uniform() < 0.35:
        solid[:2] = _relate(rng, world, *solid[:2])
    phrases = [p.text for p in solid] + _burning(rng, world, seen, burning) + _backdrop(rng, world, seen)
    if rng.uniform() < 0.6:
        rng.shuffle(phrases)
    if not dense or rng.uniform() < 0.25:
        phrases = phrases[: rng.integers(1, 6)]
    phrases = list(dict.fromkeys(phrases)) or [_PHRASES_OF_HOUR[world.time][0]]
    caption = _join(rng, phrases)
    if rng.uniform() < 0.2:
        caption = f"{rng.choice(_OPENINGS)} {caption}"
    if world.theme in _PLACES and rng.uniform() < 0.3:
        caption += f" {rng.choice(_PLACES[world.theme])}"
    elif rng.uniform() < 0.35:
        caption += f" {rng.choice(_PHRASES_OF_HOUR[world.time][1])}"
    words = [word.strip(",") for word in caption.split()]
    return caption, {word: CLASS_OF[word] for word in words if word in CLASS_OF}


def _groups(world, seen):
    """Group the visible objects by their noun, without those that belong to another object."""
    groups = defaultdict(list)
    for name in ("building", "tree", "car", "person", "traffic light", "pole", "rider", "bicycle"):
        for i in seen.get(name, ()):
            if i < _PART_OF_OTHER:
                groups[world.kind.get((name, i), name)].append((name, i))
    return groups


def _one_by_one(rng, groups):
    """Split four of five groups into single objects; a forest stays one."""
    for noun, things in groups:
        whole = (noun == "tree" and len(things) >= 4) or rng.uniform() < 0.2
        yield from [(noun, things)] if whole else [(noun, [thing]) for thing in things]


def _group(rng, world, noun, things, seen, burning, colored):
    """Name one or more objects: 'a red car', 'two trees', 'a burning house'; with colors of single ones only."""
    aflame = [thing for thing in things if thing in burning]
    if noun == "tree" and len(things) >= 4:
        names = ("a burning forest", "forest fire", "a forest fire") if aflame else ("a forest", "trees")
        return _Phrase(str(rng.choice(names)))
    if aflame and rng.uniform() < 0.8:
        return _Phrase(str(rng.choice((f"a burning {noun}", f"a {noun} on fire"))))
    if len(things) > 1:
        many = _PLURALS.get(noun, noun + "s")
        counted = len(things) in _NUMBERS and rng.uniform() < 0.6
        return _Phrase(f"{_NUMBERS[len(things)]} {many}" if counted else many)
    return _Phrase(_single(rng, world, noun, things[0], seen, colored), things[0])


def _single(rng, world, noun, thing, seen, colored):
    paint, (name, instance) = world.paint.get(thing), thing
    other = _SYNONYMS.get(noun, noun) if rng.uniform() < 0.3 else noun
    text = f"a {paint} {other}" if paint and rng.uniform() < colored else f"a {other}"
    belongs = _PART_OF_OTHER + instance
    if name == "rider" and belongs in seen.get("bicycle", ()) and rng.uniform() < 0.45:
        return f"{text} on a {rng.choice(('bicycle', 'bike'))}"
    if name == "traffic light" and belongs in seen.get("pole", ()) and rng.uniform() < 0.3:
        return f"{text} on a pole"
    place = world.place.get(thing)
    if place in seen and not world.flooded and rng.uniform() < 0.2:
        where = {"road": ("a road", "a street"), "sidewalk": ("a sidewalk",), "ground": (f"the {world.ground}",)}
        return f"{text} on {rng.choice(where[place])}"
    return text


def _relate(rng, world, first, second):
    """Join two phrases into one that says where the objects are to each other, if both stand somewhere."""
    if not (first.thing in world.feet and second.thing in world.feet):
        return [first, second]
    (x, y), (x2, y2) = world.feet[first.thing], world.feet[second.thing]
    if abs(x - x2) < 0.22 and abs(y - y2) > 0.05:
        how = "in front of" if y > y2 else "behind"
    elif abs(x - x2) > 0.3:
        how = "left of" if x < x2 else "right of"
    else:
        how = rng.choice(NEARBY)
    return [_Phrase(f"{first.text} {how} {second.text}")]


def _backdrop(rng, world, seen):
    phrases = []
    if world.skyline and "building" in seen and rng.uniform() < 0.5:
        phrases.append("buildings")
    if "road" in seen and not (world.flooded and rng.uniform() < 0.5):
        phrases.append(str(rng.choice(("a road", "a street"))))
    if "sidewalk" in seen:
        phrases.append("a sidewalk")
    if "water" in seen:
        phrases.append(str(rng.choice(_water(world, seen))))
    if "mountain" in seen:
        phrases.append(str(rng.choice(("mountains", "a mountain"))))
    if "ground" in seen and rng.uniform() < 0.35:
        phrases.append(world.ground)
    if "sky" in seen and rng.uniform() < 0.3:
        phrases.append(str(rng.choice((_PHRASES_OF_HOUR[world.time][0], "sky"))))
    return phrases


def _water(world, seen):
    if not world.flooded:
        return "a river", "water", "a river"
    flood = ["water", "flood water", "a flood"]
    if "building" in seen:
        flood += ["a flooded neighbourhood", "flooded neighbourhood"]
    return [*flood, "a flooded street", "a flooded road"] if "road" in seen else flood


def _burning(rng, world, seen, burning):
    phrases = []
    if "fire" in seen and not (burning and rng.uniform() < 0.3):
        phrases.append(str(rng.choice(("fire", "a fire", "flames"))))
    if "smoke" in seen:
        phrases.append(str(rng.choice(("smoke", "smoke", "thick smoke", *_smoke_colors(world)))))
    return phrases


def _smoke_colors(world):
    """Return 'black smoke' or 'white smoke' if it is true of all smoke, once as a list."""
    gray = [fire.smoke_color[0] for fire in world.fires if fire.smoke]
    return ["black smoke"] * (max(gray) < 100) + ["white smoke"] * (min(gray) > 160)


def _join(rng, phrases):
    if len(phrases) == 1:
        return phrases[0]
    if len(phrases) > 2 and rng.uniform() < 0.2:
        return ", ".join(phrases)
    head, joint = phrases[0], rng.choice((" with ", " and ") if len(phrases) == 2 else (" with ", ", "))
    return head + joint + (phrases[1] if len(phrases) == 2 else ", ".join(phrases[1:-1]) + " and " + phrases[-1])
