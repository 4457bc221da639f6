"""What can be said of a street scene: phrases for what is visible, joined in many ways, and the class of each word."""

from collections import defaultdict

import numpy as np

AREA = 0.006  # a class is visible from this share of the image on
INSTANCE_AREA = 0.004  # and one of several from this one
CLASS_OF = {  # every word that names a class
    "sky": "sky", "grass": "ground", "dirt": "ground", "snow": "ground", "road": "road", "street": "road",
    "water": "water", "river": "water", "flood": "water", "flooded": "water", "mountain": "mountain",
    "mountains": "mountain",
    "house": "house", "houses": "house", "tree": "tree", "trees": "tree", "forest": "tree", "car": "car", "cars": "car",
    "person": "person", "people": "person", "fire": "fire", "flames": "fire", "burning": "fire", "smoke": "smoke",
}  # fmt: skip
MANY = {"house": "houses", "tree": "trees", "car": "cars", "person": "people"}
NUMBERS = {2: "two", 3: "three"}
MOODS = {"day": "on a sunny day", "dusk": "at dusk", "night": "at night", "overcast": "on a cloudy day"}
SKIES = {"day": "a blue sky", "dusk": "an orange sky", "night": "a dark sky", "overcast": "a gray sky"}
OPENINGS = ("a photo of", "a picture of", "an image of", "a view of")
BESIDE = ("near", "next to", "beside")


def count_visible(ids: np.ndarray, things) -> dict[str, tuple[int, ...]]:
    """Classes that cover enough of `ids` (row, column) to be named, each with its instances that do."""
    area = np.bincount(ids.ravel(), minlength=len(things)) / ids.size
    by_class, by_instance = defaultdict(float), defaultdict(float)
    for thing, share in zip(things, area, strict=True):
        by_class[thing.name] += share
        by_instance[thing.name, thing.instance] += share
    return {
        name: tuple(i for (n, i), a in by_instance.items() if n == name and a >= INSTANCE_AREA)
        for name, share in by_class.items()
        if share >= AREA
    }


def describe(rng: np.random.Generator, world, seen: dict[str, tuple[int, ...]], fires) -> tuple[str, dict[str, str]]:
    """A caption, and of each of its words that names a class that class. Names only what is in `seen`."""
    burning = {fire.on for fire in fires} if "fire" in seen else set()
    solid = [_object_phrase(rng, world, name, seen[name], burning) for name in MANY if seen.get(name)]
    rng.shuffle(solid)
    if len(solid) == 2 and rng.uniform() < 0.3:
        solid = [f"{solid[0]} {rng.choice(BESIDE)} {solid[1]}"]
    phrases = solid + _fire_phrases(rng, seen, fires, burning) + _backdrop_phrases(rng, world, seen)
    if rng.uniform() < 0.6:
        rng.shuffle(phrases)
    phrases = phrases[: rng.integers(1, 6)] or [SKIES[world.time]]
    caption = _join(rng, phrases)
    if rng.uniform() < 0.2:
        caption = f"{rng.choice(OPENINGS)} {caption}"
    if {"house", "road"} <= set(seen) and rng.uniform() < 0.15:
        caption += " in an urban environment"
    elif rng.uniform() < 0.35:
        caption += f" {MOODS[world.time]}"
    words = [word.strip(",") for word in caption.split()]
    return caption, {word: CLASS_OF[word] for word in words if word in CLASS_OF}


def _object_phrase(rng, world, name, instances, burning):
    """'a red car', 'two trees', 'a burning house', ...; a color only where it is true of everything named."""
    aflame = [i for i in instances if (name, i) in burning]
    if name == "tree" and len(instances) >= 4:
        return str(rng.choice(("a burning forest", "forest fire") if aflame else ("a forest", "trees")))
    if aflame and rng.uniform() < 0.8:
        return str(rng.choice((f"a burning {name}", f"a {name} on fire")))
    if len(instances) > 1:
        return (
            f"{NUMBERS[len(instances)]} {MANY[name]}"
            if len(instances) in NUMBERS and rng.uniform() < 0.6
            else MANY[name]
        )
    paint = world.paint.get((name, instances[0]))
    return f"a {paint} {name}" if paint and rng.uniform() < 0.5 else f"a {name}"


def _backdrop_phrases(rng, world, seen):
    phrases = []
    if "road" in seen:
        phrases.append(str(rng.choice(("a road", "a street"))))
    if "water" in seen:
        flood = ["water", "flood water", "a flood"]
        if "road" in seen or "house" in seen:
            flood.append("a flooded street" if "road" in seen else "a flooded neighbourhood")
        phrases.append(str(rng.choice(flood if world.flooded else ("a river", "water"))))
    if "mountain" in seen:
        phrases.append(str(rng.choice(("mountains", "a mountain"))))
    if "ground" in seen and rng.uniform() < 0.35:
        phrases.append(world.ground)
    if "sky" in seen and rng.uniform() < 0.35:
        phrases.append(str(rng.choice((SKIES[world.time], "sky"))))
    return phrases


def _fire_phrases(rng, seen, fires, burning):
    phrases = []
    if "fire" in seen and not (burning and rng.uniform() < 0.3):
        phrases.append(str(rng.choice(("fire", "a fire", "flames"))))
    if "smoke" in seen:
        color = "black" if fires[0].smoke_color[0] < 120 else "white"
        phrases.append(str(rng.choice(("smoke", "smoke", f"{color} smoke", "thick smoke"))))
    return phrases


def _join(rng, phrases):
    if len(phrases) == 1:
        return phrases[0]
    if len(phrases) > 2 and rng.uniform() < 0.2:
        return ", ".join(phrases)
    head, joint = phrases[0], rng.choice((" with ", " and ") if len(phrases) == 2 else (" with ", ", "))
    return head + joint + (phrases[1] if len(phrases) == 2 else ", ".join(phrases[1:-1]) + " and " + phrases[-1])
