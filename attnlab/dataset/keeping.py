"""Choose which records of a data set are kept: no near duplicates, and no more of a class than is wanted."""

from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np

from .recipe import Recipe
from .rules import NEGATIVE

__all__ = ["ENOUGH", "Originals", "Selection", "classes_of", "count_reasons"]

ENOUGH = "enough of its classes"  # why a good record is rejected that has no class of which more are wanted
_ALL = "images"  # what is counted where a recipe wants records of any class


class Originals:
    """Hashes of the records that are kept, among which the first near one is found.

    A Hamming distance to 100,000 hashes takes numpy a tenth of a millisecond, so all are compared.
    """

    def __init__(self):
        self._hashes, self._indices = np.empty(1024, np.uint64), []

    def near(self, own: int, most: float) -> int | None:
        """Return the index of the first record whose hash differs in at most so many bits; None where none does."""
        bits = np.bitwise_count(self._hashes[: len(self._indices)] ^ np.uint64(own))
        found = np.flatnonzero(bits <= most)
        return self._indices[found[0]] if len(found) else None

    def add(self, index: int, own: int) -> None:
        """Add the hash of a record."""
        if len(self._indices) == len(self._hashes):
            self._hashes = np.concatenate([self._hashes, np.empty_like(self._hashes)])
        self._hashes[len(self._indices)] = own
        self._indices.append(index)


class Selection:
    """The records that are kept, chosen one by one in the order of their index.

    Attributes
    ----------
    wanted, counts : dict of str to int
        How many records with each class the recipe wants, and how many are kept so far.
    """

    def __init__(self, recipe: Recipe):
        self._most, self._originals = recipe.filters.duplicates, Originals()
        self._by_class = isinstance(recipe.kept, Mapping)
        self.wanted = dict(recipe.kept) if self._by_class else {} if recipe.kept is None else {_ALL: recipe.kept}
        self.counts = dict.fromkeys(self.wanted, 0)

    def judge(self, line: dict) -> str | None:
        """Return why the next record is rejected; count it where it is kept.

        Of a class that has enough, records are kept only for another class that has not.
        """
        if line["rejected"]:
            return line["rejected"]
        own = int(line["hash"], 16)
        near = None if self._most is None else self._originals.near(own, self._most)
        if near is not None:
            return f"near duplicate of {near:06d}"
        if not self.needs(line):
            return ENOUGH
        self._originals.add(line["index"], own)
        self.count(line)
        return None

    def needs(self, line: dict) -> bool:
        """Whether more records are wanted of a class that this one has."""
        return not self.wanted or any(name in self.lacking for name in self._names(line))

    def count(self, line: dict) -> None:
        """Count a record that is kept."""
        for name in self._names(line):
            if name in self.counts:
                self.counts[name] += 1

    def _names(self, line):
        return classes_of(line) if self._by_class else [_ALL]

    @property
    def lacking(self) -> dict[str, int]:
        """How many more records are wanted, of each class of which there are too few."""
        return {name: n - self.counts[name] for name, n in self.wanted.items() if n > self.counts[name]}

    @property
    def is_enough(self) -> bool:
        """Whether there is all that the recipe wants; never where it wants no number."""
        return bool(self.wanted) and not self.lacking


def classes_of(line: dict) -> list[str]:
    """List the classes that a record's labels have; "background" where they have nothing, not even ignored pixels."""
    return [name for name, area in line["areas"].items() if area] or [NEGATIVE] * bool(line.get("negative"))


def count_reasons(reasons: Iterable[str]) -> dict[str, int]:
    """Count why records were rejected, the most frequent reason first."""
    short = Counter("near duplicate" if reason.startswith("near duplicate") else reason for reason in reasons)
    return dict(sorted(short.items(), key=lambda item: (-item[1], item[0])))
