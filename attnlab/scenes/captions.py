"""Write captions of street scenes: phrases for what is visible, joined in many ways, and the class of each word."""

import itertools
from collections import defaultdict
from typing import NamedTuple

import numpy as np

from .world import World

__all__ = ["CLASS_OF", "COLORS", "MAX_TOKENS", "NEARBY", "SKYLINE", "VISIBLE_AREA", "WORDS_OF", "colors_said"]
__all__ += ["count_visible", "write_caption"]

MAX_TOKENS = 46  # the most words and commas of a caption
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
COLORS = ("white", "yellow", "blue", "red", "green", "black", "gray", "brown", "orange")
_PLURALS = {"person": "people"}  # the others end in s
_NUMBERS = {2: "two", 3: "three"}
_PHRASES_OF_HOUR = {  # the sky, and how a caption may end
    "day": ("a blue sky", ("on a sunny day",)),
    "dusk": ("an orange sky", ("at dusk", "in the evening")),
    "night": ("a dark sky", ("at night",)),
    "overcast": ("a gray sky", ("on a cloudy day",)),
    "snow": ("a white sky", ("in winter", "on a snowy day")),
}
_COLOR_OF_GROUND = {"grass": "green", "dirt": "brown", "snow": "white"}
_PLACES = {
    "city": ("in an urban environment", "in a city", "in an urban environment"),
    "suburb": ("in a town", "in a neighbourhood"),
    "country": ("in the countryside",),
}
_WHERE = {"road": ("on a road", "on a street"), "sidewalk": ("on a sidewalk",), "water": ("in water",)}
_OPENINGS = ("a photo of", "a picture of", "an image of", "a view of")
_NEAR = "near view of"
NEARBY = ("near", "next to", "beside")
_SYNONYMS = {"rider": "cyclist", "bicycle": "bike"}
_DRESSED = ("person", "rider")  # their color is that of their clothes
_PART_OF_OTHER = 100  # instances from here on belong to another object: the pole of a light, the bicycle of a rider
SKYLINE = 200  # the instance of "building" that stands for all far ones
_STYLES = {  # of captions: how often colors are said, and relations; sky and ground; the hour; how many phrases
    # Light falls on everything, so everything asks for its hour. Said in the sky's own phrase alone, it made the word
    # "sky" one that all things look at, and the sky itself least.
    "full": (0.92, 1, 0.9, 1, (99,)),
    "short": (0.35, 1, 0.6, 0.5, (1, 1, 2, 3)),
    "bare": (0, 0, 0.2, 0.2, (1,)),  # a noun or a number of things
    "sparse": (0.45, 1, 0.3, 0.5, (1, 2, 3, 4, 5)),
}
_COLORED_GROUND, _COLORED_SKY = 0.55, 0.2  # how often, where colors are said


class _Facts(NamedTuple):
    """What a caption is written from, and how often it says what kinds of things."""

    rng: np.random.Generator
    world: World
    seen: dict[str, tuple[int, ...]]
    burning: set[tuple[str, int]]  # objects on fire
    color: float
    more: float  # what an object rides, stands on or is near to, relative to usual
    backdrop: float  # sky and ground

    def one(self, options):
        return options[self.rng.integers(len(options))]

    def by(self, chance):
        return self.rng.uniform() < chance


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
    rng, world: World, seen: dict[str, tuple[int, ...]], dense: bool = True, near: bool = False
) -> tuple[str, dict[str, str]]:
    """Write a caption that names only what is in `seen`; return it and {word: class} of its words for classes.

    Dense: most captions name all objects with their colors, what is behind them and the hour, as far as `MAX_TOKENS`
    words and commas go; the others one to three things, or a single bare noun. Not dense: one to five things, half
    without color. Near: it begins with "near view of".
    """
    style = str(rng.choice(("full", "short", "bare"), p=(0.7, 0.22, 0.08))) if dense else "sparse"
    *chances, hour, lengths = _STYLES[style]
    burning = {fire.on for fire in world.fires if fire.instance in seen.get("fire", ())}
    phrases = _phrases(_Facts(rng, world, seen, burning, *chances))[: rng.choice(lengths)]
    opening, ends = _opening(rng, near), _ends(rng, world, seen, hour)
    room = MAX_TOKENS - sum(len(text.split()) for text in (opening, *ends))
    caption = " ".join((*([opening] if opening else []), _join(rng, _fitting(phrases, room)), *ends))
    words = [word.strip(",") for word in caption.split()]
    return caption, {word: CLASS_OF[word] for word in words if word in CLASS_OF}


def colors_said(caption: str) -> list[tuple[str, str]]:
    """Return the (class, color) pairs that a caption says, in its order.

    A color belongs to the noun behind it, "a red car", or else to the last noun before it, "a person in red".

    Parameters
    ----------
    caption : str
        Of a street scene, or a prompt like one.
    """
    found, before = [], None
    words = [*caption.replace(",", "").split(), ""]
    for word, behind in itertools.pairwise(words):
        before = CLASS_OF.get(word, before)
        name = CLASS_OF.get(behind, before)
        if word in COLORS and name:
            found.append((name, word))
    return found


def _opening(rng, near):
    if near:
        return _NEAR
    return str(rng.choice(_OPENINGS)) if rng.uniform() < 0.12 else ""


def _ends(rng, world, seen, hour):
    """Say where it is, and with a chance of `hour` when."""
    ends = [str(rng.choice(_PLACES[world.theme]))] if world.theme in _PLACES and rng.uniform() < 0.4 else []
    if rng.uniform() < hour:
        snow = ("in the snow",) if world.ground == "snow" and "ground" in seen else ()
        ends.append(str(rng.choice(_PHRASES_OF_HOUR[world.time][1] + snow)))
    return ends


def _phrases(facts):
    """Write phrases for everything that is seen, those of objects mostly first."""
    rng = facts.rng
    groups = list(_groups(facts).items())
    solid = [_group(facts, *groups[k]) for k in rng.permutation(len(groups))]
    flames = _burning(facts)
    fuel = [k for k, phrase in enumerate(solid) if phrase.thing in facts.burning]
    if fuel and flames and facts.by(0.6 * facts.more):
        solid[fuel[0]] = _Phrase(f"{solid[fuel[0]].text} with {_and(flames)}", solid[fuel[0]].thing)
        flames = []
    if len(solid) > 1 and facts.by(0.35 * facts.more):
        solid[:2] = _relate(facts, *solid[:2])
    phrases = [phrase.text for phrase in solid] + flames + _backdrop(facts)
    if facts.by(0.6):
        rng.shuffle(phrases)
    return list(dict.fromkeys(phrases)) or [_fallback(facts)]


def _fallback(facts):
    """Name something that is seen where chance left out everything."""
    if "sky" in facts.seen:
        return _PHRASES_OF_HOUR[facts.world.time][0]
    return facts.world.ground if "ground" in facts.seen else WORDS_OF[next(iter(facts.seen))][0]


def _fitting(phrases, room):
    """Leave out phrases for which there is no room; each takes a word or a comma more that joins it to the next."""
    kept = []
    for phrase in phrases:
        tokens = len(phrase.split()) + phrase.count(",") + 1
        if tokens <= room:
            kept.append(phrase)
            room -= tokens
    return kept


def _groups(facts):
    """Group the visible objects by their noun, without those that belong to another object."""
    groups = defaultdict(list)
    for name in ("building", "tree", "car", "person", "traffic light", "pole", "rider", "bicycle"):
        for i in facts.seen.get(name, ()):
            if i < _PART_OF_OTHER:
                groups[facts.world.kind.get((name, i), name)].append((name, i))
    return groups


def _group(facts, noun, things):
    """Name one or more objects: 'a red car', 'two trees', 'a burning blue house', 'a red car left of a blue car'."""
    aflame = [thing for thing in things if thing in facts.burning]
    if noun == "tree" and len(things) >= 4:
        forest = ("a burning forest", "forest fire", "a forest fire") if aflame else ("a forest", "trees")
        return _Phrase(facts.one(forest), *aflame[:1])
    facts = facts._replace(color=float(facts.by(facts.color)))  # of all things or of none
    single = [_Phrase(_single(facts, noun, thing), thing) for thing in things]
    if len(single) == 1:
        return single[0]
    if len({p.text for p in single}) == len(single) and (aflame or facts.by(0.45)):
        single = _relate(facts, *single) if len(single) == 2 and facts.by(0.6) else single
        return _Phrase(_and([p.text for p in single]))
    many = _PLURALS.get(noun, noun + "s")
    paints = {facts.world.paint.get(thing) for thing in things}
    if len(paints) == 1 and None not in paints and facts.color:
        many = _colored(noun, many, *paints)
    others = set(facts.seen[things[0][0]]) - {instance for _, instance in things}  # of the class: a light's pole, ...
    unclear = others or {"fire", "smoke"} & set(facts.seen) or facts.world.theme == "forest"
    counted = len(things) in _NUMBERS and not unclear and facts.by(0.85)
    return _Phrase(f"{_NUMBERS[len(things)]} {many}" if counted else many)


def _colored(noun, text, paint, shirt=False):
    if noun not in _DRESSED:
        return f"{paint} {text}"
    return f"{text} in a {paint} shirt" if shirt else f"{text} in {paint}"


def _single(facts, noun, thing):
    """Name one object: its color, whether it burns, what it rides, hangs from or stands on."""
    world, seen, (name, instance) = facts.world, facts.seen, thing
    text = _SYNONYMS[noun] if noun in _SYNONYMS and facts.by(0.3) else noun
    if thing in world.paint and facts.by(facts.color):
        text = _colored(noun, text, world.paint[thing], shirt=facts.by(0.3))
    if thing in facts.burning and facts.by(0.85):
        return facts.one((f"a burning {text}", f"a {text} on fire"))
    other = _PART_OF_OTHER + instance
    if name == "rider" and other in seen.get("bicycle", ()) and facts.by(0.5 * facts.more):
        bicycle, paint = facts.one(("bicycle", "bike")), world.paint.get(("bicycle", other))
        return f"a {text} on a {paint} {bicycle}" if paint and facts.by(facts.color / 2) else f"a {text} on a {bicycle}"
    if name == "traffic light" and other in seen.get("pole", ()) and facts.by(0.3 * facts.more):
        return f"a {text} on a pole"
    place = world.place.get(thing)
    if place in seen and facts.by(0.2 * facts.more):
        return f"a {text} {facts.one(_WHERE.get(place, (f'on the {world.ground}',)))}"
    return f"a {text}"


def _relate(facts, first, second):
    """Join two phrases into one that says where the objects are to each other, if both stand somewhere."""
    feet = facts.world.feet
    if not (first.thing in feet and second.thing in feet):
        return [first, second]
    (x, y), (x2, y2) = feet[first.thing], feet[second.thing]
    if abs(x - x2) < 0.22 and abs(y - y2) > 0.05:
        how = "in front of" if y > y2 else "behind"
    elif abs(x - x2) > 0.3 and facts.by(0.7 if abs(x - x2) < 0.5 else 1):
        how = "left of" if x < x2 else "right of"
    else:
        how = facts.one(NEARBY)
    return [_Phrase(f"{first.text} {how} {second.text}")]


def _backdrop(facts):
    world, seen = facts.world, facts.seen
    phrases = []
    if SKYLINE in seen.get("building", ()) and facts.by(0.7):
        phrases.append("buildings")
    if "road" in seen and not (world.flooded and facts.by(0.5)):
        phrases.append(facts.one(("a road", "a street")))
    if "sidewalk" in seen:
        phrases.append("a sidewalk")
    if "water" in seen:
        phrases.append(facts.one(_water(facts)))
    if "mountain" in seen:
        phrases.append(facts.one(("mountains", "a mountain")))
    if "ground" in seen and facts.by(facts.backdrop):
        color = f"{_COLOR_OF_GROUND[world.ground]} " if facts.by(_COLORED_GROUND * facts.color) else ""
        phrases.append(color + world.ground)
    if "sky" in seen and facts.by(facts.backdrop):
        phrases.append(_PHRASES_OF_HOUR[world.time][0] if facts.by(_COLORED_SKY * facts.color) else "sky")
    return phrases


def _water(facts):
    if not facts.world.flooded:
        return "a river", "water", "a river"
    flood = ["water", "flood water", "a flood"]
    if sum(facts.world.kind.get(("building", i)) == "house" for i in facts.seen.get("building", ())) > 1:
        flood += ["a flooded neighbourhood", "flooded neighbourhood"] * 2
    return [*flood, "a flooded street", "a flooded road"] if "road" in facts.seen else flood


def _burning(facts):
    phrases = []
    if "fire" in facts.seen and not (facts.burning and facts.by(0.3)):
        phrases.append(facts.one(("fire", "a fire", "flames")))
    if "smoke" in facts.seen:
        gray = [fire.smoke_color[0] for fire in facts.world.fires if fire.smoke]
        color = "black" if max(gray) < 100 else "white" if min(gray) > 160 else "thick"  # true of all smoke
        phrases.append(f"{facts.one(('thick', color, color))} smoke" if facts.by(facts.color * 0.6) else "smoke")
    return phrases


def _and(phrases):
    return ", ".join(phrases[:-1]) + " and " + phrases[-1] if len(phrases) > 1 else phrases[0]


def _join(rng, phrases):
    if len(phrases) == 1:
        return phrases[0]
    if len(phrases) > 2 and rng.uniform() < 0.3:
        return ", ".join(phrases)
    joint = rng.choice((" with ", " and ") if len(phrases) == 2 else (" with ", ", "))
    return phrases[0] + joint + _and(phrases[1:])
