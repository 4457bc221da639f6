"""What was measured of the bundled models as Markdown tables, written into their cards."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..scenes import street
from .localize import TIMESTEPS
from .steer import COMPANIONS, share

MARKS = "<!-- measured -->", "<!-- end of what was measured -->"


def table(head: list[str], rows) -> str:
    """A Markdown table; numbers with three digits behind the point."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(f"{v:.3f}" if isinstance(v, float) else str(v) for v in line) + " |" for line in lines
    )


def _between(value, interval):
    return f"{value:.3f} ({interval[0]:.3f} to {interval[1]:.3f})"


def pipeline_tables(name: str, found: dict[str, dict]) -> str:
    """What was measured of a pipeline, as the text between the marks of its card."""
    maps, steer = found[name]["maps"], found[name]["steering"]
    rows = []
    for other in ("tiny", "tiny-plain"):
        if other in found:
            for kind in ("word", "shuffled word"):
                m = found[other]["maps"]
                cells = [_between(m[f"{kind} {what}"], m[f"{kind} {what} interval"]) for what in ("iou", "pointing")]
                rows.append([other, "the word's own" if kind == "word" else "another class's", *cells])
    parts = [
        f"DAAM maps of {maps['maps']} caption words on {maps['scenes']} held-out scenes (seeds from "
        f"{street.HELD_OUT:,}), noised to t = {', '.join(map(str, TIMESTEPS))} of 1000; IoU at one threshold "
        f"({maps['threshold']:.2f} of the maximum for {name}), chosen on {maps['tuning scenes']} other scenes; means "
        "over scenes with 95% bootstrap intervals.",
        table(["model", "map", "mean IoU", "pointing game"], rows),
        f"Steering: {steer['images a class']} images a class from single-object prompts ({steer['steps']} steps, "
        f"guidance {steer['guidance']:g}). Whether an image shows a class is said by the oracle, whose own recall on "
        f"{maps['scenes']} rendered scenes stands beside it; 95% Wilson intervals. Unasked: in the images of all other "
        f"prompts but those that it comes with ({', '.join(f'{a} with {b}' for a, b in COMPANIONS.items())}). The "
        "columns about maps are means over maps.",
    ]
    for thin, title in ((False, "class"), (True, "thin class")):
        mean, least = share(steer["classes"], thin)
        rows = [
            _class_row(c, maps["classes"].get(c), steer["classes"][c])
            for c in steer["classes"]
            if (c in street.THIN) == thin
        ]
        head = [title, "maps", "mean IoU", "pointing", "shown when asked", "shown unasked", "oracle's recall"]
        parts.append(table(head, [*rows, ["mean; least", "", "", "", f"{mean:.3f}; {least:.2f}", "", ""]]))
    parts.append(
        f"Autoencoder: {found[name]['PSNR']:.1f} dB PSNR on those scenes. An image of 20 steps with guidance: "
        f"{found[name]['seconds an image']:.2f} s on a CPU ({found[name]['cores']} cores)."
    )
    return "\n\n".join(parts)


def _class_row(name, maps, steer):
    own = [maps["maps"], maps["iou"], maps["pointing"]] if maps else [0, "", ""]
    return [name, *own, _between(steer["asked"], steer["interval"]), steer["unasked"], steer["oracle recall"]]


def oracle_tables(name: str, found: dict[str, dict]) -> str:
    """What was measured of the oracle, as the text between the marks of its card."""
    sharp, restored = found[name]["sharp"], found[name]["restored"]
    rows = []
    for c, iou in sharp["IoU"].items():
        a, b = (kind["recall of small objects"].get(c, {"objects": "", "recall": ""}) for kind in (sharp, restored))
        rows.append([c, iou, restored["IoU"][c], a["objects"], a["recall"], b["recall"]])
    head = ["class", "IoU, sharp", "IoU, restored", "small objects", "found, sharp", "found, restored"]
    return (
        f"On {sharp['images']} held-out scenes (seeds from {street.HELD_OUT:,}), sharp and as the autoencoder restores "
        "them. A small object is a connected region of 8 pixels to 2.4% of the image; found: most of its pixels have "
        "its class.\n\n"
    ) + table(head, [*rows, ["mean", sharp["mIoU"], restored["mIoU"], "", "", ""]])


def joint_tables(found: dict[str, dict], classes: Sequence[str]) -> str:
    """What `attnlab.tiny.aerial` measured of joint models, as the text between the marks of a card."""
    of = {key: one for key, one in found.items() if key.startswith("measure ")}
    parts, first = [], next(iter(of.values()))
    rest = [k for k, name in enumerate(classes) if name != "vehicle"]

    def row(name, ious):
        ious = np.array(ious, float)
        return [name, *ious.tolist(), float(np.nanmean(ious[rest])), float(np.nanmean(ious))]

    kinds = [(f"samples, {one['scenes']} scenes", one["IoU of the judge"]["samples"]) for one in of.values()]
    held_out, shuffled = (first["IoU of the judge"][kind] for kind in ("held-out scenes", "samples, shuffled masks"))
    rows = [row(*kind) for kind in [("held-out scenes", held_out), *kinds, ("samples, shuffled masks", shuffled)]]
    parts.append(
        f"IoU of labels with what the judge sees in their images, {first['samples']} samples of each joint model, "
        f"{first['tests']} held-out scenes."
    )
    parts.append(table(["labels", *classes, "mean without vehicles", "mean"], rows))
    rows = []
    for one in of.values():
        shares, near = one["class shares"], one["median distance to the nearest scene learned from"]
        frechet = one["Fréchet distance to held-out scenes, the judge's encoder"]
        apart = np.abs(np.subtract(*shares.values()))[np.array(shares["scenes learned from"]) > 0.05].max()
        step, error = min(one["held-out error"], key=lambda check: check[1])
        rows.append([one["scenes"], f"{step:,}", error, float(apart), near["samples"] / near["held-out scenes"],
                     frechet["samples"], frechet["other scenes"], one["pixels with margin below 0.9"]])  # fmt: skip
    head = ["scenes", "steps", "held-out error", "class shares off by, at most", "nearest-neighbor distance ratio"]
    head += ["Fréchet distance, samples", "the same, other scenes", "pixels with margin below 0.9"]
    parts.append(
        "Class shares: of classes above 5% of the scenes. Distance: median over samples to the nearest scene learned "
        "from, over the same of held-out scenes. Fréchet: of the judge's encoder, to the held-out scenes."
    )
    return "\n\n".join([*parts, table(head, rows)])


def write_card(folder: Path, text: str) -> None:
    """Put `text` between the marks of the card in `folder`."""
    card = folder / "README.md"
    before, _, rest = card.read_text().partition(MARKS[0])
    _, mark, after = rest.partition(MARKS[1])
    if not mark:
        raise ValueError(f"{card} needs the lines {MARKS[0]} and {MARKS[1]}")
    part = card.with_suffix(".part")
    part.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}")
    part.replace(card)
