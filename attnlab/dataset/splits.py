"""Split a data set for training and tests, so that nothing of one part is in another.

splits = split_dataset(dataset)                            # {"train": [0, 2, ...], "val": [...], "test": [...]}
export_yolo(dataset, "fires-yolo", splits=splits)
"""

import re
import unicodedata
import warnings
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from .leaks import read_thumbnails
from .records import Dataset
from .thumbnails import WITHIN, near_pairs

__all__ = ["FRACTIONS", "split_dataset"]

FRACTIONS = MappingProxyType({"train": 0.8, "val": 0.1, "test": 0.1})
"""What part of a data set each split has, where nothing else is said."""

_TOLD = 0.05  # a split's share that is so far from what was asked is told


def split_dataset(
    dataset: Dataset,
    fractions: Mapping[str, float] = FRACTIONS,
    *,
    seed: int = 0,
    by: str = "seed",
    within: float | None = WITHIN,
) -> dict[str, list[int]]:
    """Split a data set so that no image, near duplicate, seed or, if asked, prompt is in two splits.

    What must stay together are groups. They are dealt so that each split has its part of each class, the rarest first:
    iterative stratification (Sechidis, Tsoumakas and Vlahavas, ECML PKDD 2011), of groups, and with an end to what a
    split takes.

    Parameters
    ----------
    dataset : Dataset
        A finished data set. Images marked as bad are in no split.
    fractions : mapping of str to float
        Part of the images that each split is to have; together they are 1.
    seed : int
        Of the order in which groups are dealt: the same one splits the same data in the same way.
    by : str
        "seed": images of one seed stay together, of which a recipe makes one each. "prompt": and images of one prompt,
        so that tests have prompts that training has not; prompts that differ in case, spaces, punctuation, or a, an and
        the are one.
    within : float, optional
        Largest distance of near duplicates, as in `find_leaks`. None: images are not opened, and of near duplicates
        only those whose `difference_hash` is equal stay together.

    Returns
    -------
    dict of str to list of int
        Positions in `dataset.records`, in order, by the name of the split.

    Raises
    ------
    ValueError
        If an argument is wrong, or there are fewer groups than splits.

    Warns
    -----
    UserWarning
        If a class is missing from a split, or groups are so large that a split is 0.05 of all images off.
    """
    _check(fractions, by, within)
    good = [record for record in dataset.records if record["file_name"] not in dataset.bad]
    group = _groups(dataset.folder, good, by, within)
    sizes = np.bincount(group)
    if len(sizes) < len(fractions):
        raise ValueError(_too_few(sizes, fractions, by))
    classes = [*dataset.classes[1:], "background alone"]
    has = np.array([[(record["areas"].get(name) or 0) > 0 for name in classes[:-1]] for record in good])
    has = np.column_stack([has, ~has.any(1)])
    counts = np.zeros((len(sizes), len(classes)))
    np.add.at(counts, group, has)
    split_of = _deal(counts, sizes, _quotas(len(good), fractions), np.random.default_rng(seed))[group]
    _tell(split_of, has, classes, sizes, fractions, by)
    position = {record["file_name"]: i for i, record in enumerate(dataset.records)}
    places = np.array([position[record["file_name"]] for record in good])
    return {name: places[split_of == k].tolist() for k, name in enumerate(fractions)}


def _check(fractions, by, within):
    if by not in ("seed", "prompt"):
        raise ValueError(f"by={by!r}: choose seed or prompt")
    if within is not None and not within >= 0:
        raise ValueError(f"within={within!r}: gray levels from 0 on, such as {WITHIN}, or None")
    if not isinstance(fractions, Mapping) or not fractions or not all(0 < part <= 1 for part in fractions.values()):
        raise ValueError(f"fractions is {fractions!r}: it maps names to parts above 0, such as {dict(FRACTIONS)}")
    if abs(sum(fractions.values()) - 1) > 1e-6:
        said = " + ".join(map(str, fractions.values()))
        raise ValueError(f"fractions: {said} is {sum(fractions.values()):.4g}, and must be 1")


def _groups(folder, records, by, within):
    """Find what must stay together: an array (record,) of the numbers of groups."""
    keys = [[str(record["seed"]) for record in records]]
    keys += [[record["hash"] for record in records]] * (within is None)
    keys += [[_plain(record["prompt"]) for record in records]] * (by == "prompt")
    every = group = np.arange(len(records))
    for key in keys:
        firsts, numbers = np.unique(np.array(key, dtype=str), return_index=True, return_inverse=True)[1:]
        group = _join(group, firsts[numbers], every)
    if within is None or not records:
        return group
    files = [folder / record["file_name"] for record in records]
    found, thumbnails, _ = read_thumbnails(files)
    if found != files:
        raise ValueError(f"{folder} has images that cannot be read: verify_dataset names them; mark them as bad")
    for pairs in near_pairs(thumbnails, within=within):
        group = _join(group, pairs.first, pairs.second)
    return group


def _join(group, first, second):
    """Join the groups of pairs of records, and of all that hang together by them."""
    links = coo_array((np.ones(len(first), bool), (group[first], group[second])), shape=[len(group)] * 2)
    return connected_components(links, directed=False)[1][group]


def _plain(text):
    """Return what a text says, without case, spaces, punctuation and articles."""
    words = re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(word for word in words if word not in ("a", "an", "the")) or " ".join(text.split())


def _quotas(count, fractions):
    """Share a number of images by fractions: whole numbers, at least one each where there are as many images."""
    exact = count * np.array(list(fractions.values()))
    quotas = np.floor(exact + 1e-9).astype(int)
    quotas[np.argsort(quotas - exact, kind="stable")[: count - quotas.sum()]] += 1
    while not quotas.all() and quotas.max() > 1:
        quotas[quotas.argmax()] -= 1
        quotas[quotas.argmin()] += 1
    return quotas


def _deal(counts, sizes, quotas, random):
    """Deal groups to splits, the groups of the rarest class first: an array (group,) of the numbers of splits.

    Counts are (group, class) numbers of images, sizes those of all images of a group, quotas those that splits take.
    """
    wanted, room = np.outer(quotas / quotas.sum(), counts.sum(0)), quotas.astype(float)  # (split, class), (split,)
    place, order = np.full(len(sizes), -1), random.permutation(len(sizes))
    order = order[np.argsort(-sizes[order], kind="stable")]  # large groups while there is room for them

    def put(group, kind):
        fits = room >= sizes[group]
        best = np.lexsort((room, wanted[:, kind], fits if fits.any() else room))[-1]
        place[group] = best
        wanted[best] -= counts[group]
        room[best] -= sizes[group]

    left = counts.sum(0)
    for group in order[sizes[order] > quotas.min()]:  # these fit into some splits alone
        put(group, _rarest(counts[group], left))
    while (open_ := order[place[order] < 0]).size:
        kind = _rarest(counts[open_].sum(0), counts[open_].sum(0))
        for group in open_[counts[open_, kind] > 0]:
            put(group, kind)
    return _fill(place, sizes, len(quotas))


def _rarest(has, left):
    """Return the number of the class that is rarest among those that are there."""
    return int(np.where(has > 0, left, np.inf).argmin())


def _fill(place, sizes, splits):
    """Give each empty split the smallest group of a split that has several."""
    for empty in set(range(splits)) - set(place.tolist()):
        spare = np.bincount(place, minlength=splits)[place] > 1
        place[np.where(spare, sizes, np.inf).argmin()] = empty
    return place


def _too_few(sizes, fractions, by):
    """Say why there are fewer groups than splits, and what to do."""
    if sizes.sum() == len(sizes):  # each image is a group of its own
        return f"{len(sizes)} images, without those marked as bad, do not fill {len(fractions)} splits: make more"
    hint = "make more images, of more prompts" + (", or split by seed" if by == "prompt" else "")
    return f"{_largest(sizes)}, in all {len(sizes)}, and there are {len(fractions)} splits: {hint}, or lower `within`"


def _largest(sizes):
    return f"{sizes.sum()} images are in groups that must stay together, the largest of {sizes.max()} images"


def _tell(split_of, has, classes, sizes, fractions, by):
    """Warn of splits that are not what was asked."""
    for k, name in enumerate(fractions):
        own = has[split_of == k].any(0)
        if lacking := [kind for kind, here, there in zip(classes, own, has.any(0), strict=True) if there and not here]:
            warnings.warn(f"{name} has no image of {', '.join(lacking)}: too few images show it", stacklevel=3)
    shares, asked = np.bincount(split_of, minlength=len(fractions)) / len(has), list(fractions.values())
    if np.abs(shares - asked).max() > max(_TOLD, 1 / len(has)):
        parts = (", ".join(f"{part:.2f}" for part in of) for of in (shares, asked))
        told = f"{', '.join(fractions)} have {' and not '.join(parts)} of the images"
        if sizes.max() == 1:
            warnings.warn(f"{told}: they are {len(has)} alone, make more", stacklevel=3)
            return
        hint = "make more images, or lower `within`" + (", or split by seed" if by == "prompt" else "")
        joined = "near duplicates" + " and equal prompts" * (by == "prompt")
        warnings.warn(f"{told}: {_largest(sizes)}, joined by {joined}; {hint}", stacklevel=3)
