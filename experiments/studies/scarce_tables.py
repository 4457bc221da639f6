"""Tables of the study of scarce labels, of a record with one row per training."""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from ..bundled.cards import markdown_table
from .intervals import gain_over_sets, half_width, holm
from .scarce_arms import ARMS
from .scarce_sets import FIRST_TUNING_SET

__all__ = ["collect_record", "curve_table", "gain_rows", "gains_markdown", "quality_table", "record_tables"]
__all__ += ["segmenter_rows", "tuning_table"]

_NAMES = {"segmenters": ("arm", "scenes", "set", "weight", "seed"), "models": ("model", "scenes", "set")}
_NAMES["quality"] = ("drawn", "scenes", "set")


def segmenter_rows(work: Path) -> list[dict]:
    """Read what there is of segmenters so far: arm, scenes, set, weight, seed, validation mIoU, test IoU (class,)."""
    return _rows(work, "segmenters")


def collect_record(work: Path, study: dict) -> dict:
    """Read what there is so far: settings, and rows of segmenters, joint models and measured pairs."""
    models = [
        {name: row[name] for name in _NAMES["models"]} | {"error": min((e for _, e in row["found"]), default=None)}
        for row in _rows(work, "models")
    ]
    quality = _rows(work, "quality")
    return {"study": study, "segmenters": segmenter_rows(work), "models": models, "quality": quality}


def _rows(work, folder):
    """Return the results in a folder, with the arguments that are in a file's name; a list becomes "found"."""
    rows = []
    for path in sorted((work / folder).glob("*.json")):
        named = dict(zip(_NAMES[folder], path.stem.split(), strict=True))
        row = {name: int(x) if name in ("scenes", "set", "seed") else x for name, x in named.items()}
        found = json.loads(path.read_text("utf-8"))
        rows.append(row | (found if isinstance(found, dict) else {"found": found}))
    return rows


def gain_rows(record: dict, level: float = 0.05) -> list[dict]:
    """Compare arms with the labels alone on test scenes, paired by set and seed, and correct for all arms and sizes.

    Each has the mean gain in mIoU over sets, its interval at the level that Holm's procedure tests it at, its adjusted
    p, the half width of the interval, which is the smallest gain that would have been seen, how many sets there are,
    and, where it was trained, the mean gain over the semi-supervised arm.
    """
    tested = defaultdict(dict)  # (scenes, arm) -> {(set, seed): mIoU}
    for row in record["segmenters"]:
        if "test" in row:
            tested[row["scenes"], row["arm"]][row["set"], row["seed"]] = np.nanmean(np.array(row["test"], float))
    rows = []
    for scenes, arm in sorted(tested, key=lambda one: (one[0], [*ARMS].index(one[1]))):
        if arm == "labels":
            continue
        of_arm, gains = tested[scenes, arm], _by_set(tested, scenes, arm, "labels")
        if not gains:
            continue
        mean, error, p = gain_over_sets(gains)
        beside = _by_set(tested, scenes, arm, "consistent") if arm != "consistent" else []
        row = {"scenes": scenes, "arm": arm, "mIoU": float(np.mean([*of_arm.values()])), "gain": mean, "error": error}
        row |= {"p": p, "sets": len(gains), "over consistent": gain_over_sets(beside)[0] if beside else None}
        rows.append(row)
    for row, adjusted, at in zip(rows, *holm([row["p"] for row in rows], level), strict=True):
        half = half_width(row.pop("error"), row["sets"], at)
        row |= {"p": adjusted, "low": row["gain"] - half, "high": row["gain"] + half, "smallest": half}
    return rows


def _by_set(tested, scenes, arm, other):
    """Return the differences of two arms, a list per set that both have, one per seed."""
    first, second = tested[scenes, arm], tested.get((scenes, other), {})
    found = defaultdict(list)
    for place in sorted(first.keys() & second.keys()):
        found[place[0]].append(first[place] - second[place])
    return [*found.values()]


def gains_markdown(record: dict) -> str:
    """Write the table of gains."""
    head = ["scenes", "arm", "mIoU", "gain", "95% interval, Holm", "p, Holm", "smallest gain seen", "sets"]
    head.append("over the semi-supervised")
    rows = [
        [row["scenes"], ARMS[row["arm"]].about, row["mIoU"], f"{row['gain']:+.3f}",
         f"{row['low']:+.3f} to {row['high']:+.3f}", row["p"], row["smallest"], row["sets"],
         "" if row["over consistent"] is None else f"{row['over consistent']:+.3f}"]
        for row in gain_rows(record)
    ]  # fmt: skip
    return markdown_table(head, rows)


def curve_table(record: dict) -> str:
    """Write mIoU of labels alone by number of scenes, means over sets, and how long they were trained."""
    found = defaultdict(list)
    for row in record["segmenters"]:
        if row["arm"] == "labels" and row["set"] < FIRST_TUNING_SET:
            found[row["scenes"]].append((row["validation"], np.nanmean(np.array(row["test"], float)), row["step"]))
    rows = [[n, *np.mean(values, 0).tolist()[:2], round(np.mean(values, 0)[2]), len(values)]
            for n, values in sorted(found.items())]  # fmt: skip
    return markdown_table(["exact scenes", "validation mIoU", "test mIoU", "step of the best", "trainings"], rows)


def tuning_table(record: dict) -> str:
    """Write the mean validation mIoU of each arm and weight on the tuning sets."""
    found = defaultdict(list)
    for row in record["segmenters"]:
        if row["set"] >= FIRST_TUNING_SET:
            found[row["scenes"], row["arm"], row["weight"]].append(row["validation"])
    rows = [[*key, float(np.mean(values)), len(values)] for key, values in sorted(found.items())]
    return markdown_table(["scenes", "arm", "weight", "validation mIoU", "seeds"], rows)


def quality_table(record: dict) -> str:
    """Write what was measured of drawn pairs, means over sets."""
    found = defaultdict(list)
    for row in record["quality"]:
        apart = row["distances, 5th percentile and median"]
        values = [row[name] for name in ("agreement", "relative agreement", "precision", "recall")]
        found[row["scenes"], row["drawn"]].append([*values, *apart["drawn"], *apart["held-out"]])
    rows = [[*key, *np.mean(values, 0).tolist()] for key, values in sorted(found.items())]
    head = ["scenes", "drawn by", "agreement", "relative agreement", "precision", "recall", "distance, 5th percentile"]
    return markdown_table([*head, "median", "held-out scenes, 5th percentile", "median "], rows)


def record_tables(record: dict) -> list[str]:
    """Write all tables."""
    return [table(record) for table in (curve_table, tuning_table, gains_markdown, quality_table)]
