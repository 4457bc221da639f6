"""Write what was measured of the bundled models as Markdown tables into their cards."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from attnlab.scenes import street
from attnlab.storage import replacing

from .localize import TIMESTEPS
from .steer import COMPANIONS, shown_when_asked

__all__ = ["MARKS", "PIPELINES", "joint_tables", "markdown_table", "pipeline_tables", "segmenter_tables", "write_card"]

# measured.json calls the reference segmenters "oracle" (streets) and "judge" (aerial)
PIPELINES = ("tiny", "tiny-plain", "tiny-mmdit")  # of streets, the last once it is there
MARKS = "<!-- measured -->", "<!-- end of what was measured -->"


def markdown_table(head: list[str], rows) -> str:
    """Write a Markdown table, with three decimals."""
    rows = [head, ["---"] * len(head), *rows]
    lines = [[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _between(value, interval):
    return f"{value:.3f} ({interval[0]:.3f} to {interval[1]:.3f})"


def pipeline_tables(name: str, found: dict[str, dict]) -> str:
    """Write what was measured of a pipeline, as the text between the marks of its card."""
    maps, steer = found[name]["maps"], found[name]["steering"]
    rows = []
    for other in PIPELINES:
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
        markdown_table(["model", "map", "mean IoU", "pointing game"], rows),
        f"Steering: {steer['images a class']} images per class from single-object prompts ({steer['steps']} steps, "
        f"guidance {steer['guidance']:g}). Whether an image shows a class is said by the reference segmenter, whose "
        f"own recall on {maps['scenes']} rendered scenes stands beside it; 95% Wilson intervals. Unasked: in the "
        "images of all other prompts but those that it comes with "
        f"({', '.join(f'{a} with {b}' for a, b in COMPANIONS.items())}). The columns about maps are means over maps.",
    ]
    for thin, title in ((False, "class"), (True, "thin class")):
        mean, least = shown_when_asked(steer["classes"], thin)
        classes = [c for c in steer["classes"] if (c in street.THIN) == thin]
        rows = [_class_row(c, maps["classes"].get(c), steer["classes"][c]) for c in classes]
        head = [title, "maps", "mean IoU", "pointing", "shown when asked", "shown unasked", "segmenter's recall"]
        parts.append(markdown_table(head, [*rows, ["mean; least", "", "", "", f"{mean:.3f}; {least:.2f}", "", ""]]))
    parts += _prompt_tables(found[name]) if "colors" in found[name] else []
    parts.append(
        f"Autoencoder: {found[name]['PSNR']:.1f} dB PSNR on those scenes. An image of 20 steps with guidance: "
        f"{found[name]['seconds an image']:.2f} s on {found[name]['cores']} "
        f"CPU core{'s' * (found[name]['cores'] > 1)}."
    )
    return "\n\n".join(parts)


def _prompt_tables(found):
    """Write what was measured of colors, numbers and the likeness of images."""
    colors, numbers, quality, copies = (found[kind] for kind in ("colors", "numbers", "quality", "copies"))
    rows, means = [], []
    for rows_of in (colors["one"], colors["two"], numbers):
        rows.append([[prompt, *_rates(row)] for prompt, row in rows_of.items()])
        means.append(float(np.mean([row["rate"] for row in rows_of.values()])))
    own = "read rightly in rendered scenes"
    return [
        f"Colors: {colors['images']} images of each prompt. The color of the largest region of its class that the "
        "reference segmenter sees; what colors look like was learned from other rendered scenes as the autoencoder "
        "restores them. 95% Wilson intervals. Unasked: in the images of the prompts with other colors of this class.",
        markdown_table(["prompt", "in this color", "unasked", own], [*rows[0], ["mean", means[0], "", ""]]),
        f"Two colors: {next(iter(colors['two'].values()))['of']} images a row, half of them with the colors "
        "exchanged in the prompt. Exchanged: each thing has the color of the other.",
        markdown_table(["prompt", "both right", "exchanged"], [*rows[1], ["mean", means[1], ""]]),
        f"Numbers: {next(iter(numbers.values()))['of']} images of each prompt; things are connected regions that the "
        "segmenter sees.",
        markdown_table(
            ["prompt", "this number", "mean number", "counted rightly in rendered scenes"],
            [*rows[2], ["mean", means[2], "", ""]],
        ),
        f"Fréchet distance of {quality['images']} images with captions of held-out scenes to as many other held-out "
        f"scenes, by features of the segmenter's encoder: {quality['drawn']:.3f}; of those scenes themselves "
        f"{quality['restored']:.3f} as the autoencoder restores them, {quality['rendered']:.3f} as rendered. Images of "
        f"prompts for different things have {copies['same noise']:.1f} dB PSNR to each other where they began with the "
        f"same noise, {copies['other noise']:.1f} dB where not.",
    ]


def _rates(row):
    """Return the cells of a measured rate: with its interval, what else was measured, and how it is in scenes."""
    others = [row[key] for key in ("unasked", "exchanged", "mean") if key in row]
    if "scenes" in row:
        others.append(f"{_between(row['scenes']['rate'], row['scenes']['interval'])} of {row['scenes']['of']}")
    return [_between(row["rate"], row["interval"]), *others]


def _class_row(name, maps, steer):
    own = [maps["maps"], maps["iou"], maps["pointing"]] if maps else [0, "", ""]
    return [name, *own, _between(steer["asked"], steer["interval"]), steer["unasked"], steer["oracle recall"]]


def segmenter_tables(name: str, found: dict[str, dict]) -> str:
    """Write what was measured of the street segmenter, as the text between the marks of its card."""
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
    ) + markdown_table(head, [*rows, ["mean", sharp["mIoU"], restored["mIoU"], "", "", ""]])


def joint_tables(found: dict[str, dict], classes: Sequence[str]) -> dict[str, str]:
    """Write what `train_aerial` measured as the text between the marks of the card of each of its models."""
    of = [one for key, one in found.items() if key.startswith("measure ")]
    of.sort(key=lambda one: one["scenes"])
    held_out, shuffled = (of[-1]["IoU of the judge"][kind] for kind in ("held-out scenes", "samples, shuffled masks"))
    kinds = [(f"samples, {one['scenes']} scenes", one["IoU of the judge"]["samples"]) for one in of]
    head = ["labels", *classes, "mean without vehicles", "mean"]
    rows = [_ious("held-out scenes", held_out, classes), *(_ious(*kind, classes) for kind in kinds)]
    agreement = (
        f"IoU of labels with what the reference segmenter sees in their images, {of[-1]['samples']} samples of each "
        f"joint model, {of[-1]['tests']} held-out scenes."
    )
    scores = (
        "Class proportions: the largest difference between samples and the scenes learned from, of classes above 5%: "
        "of samples conditioned on the proportions of these scenes, and of unconditional ones. Held-out proportions: "
        "mean difference from those of a held-out scene, of samples conditioned on them or not. Distance: median over "
        "samples to the nearest scene learned from, over the same of held-out scenes. Fréchet distance: of features of "
        "the segmenter's encoder, to the held-out scenes."
    )
    names = ["scenes", "steps", "held-out error", "class proportions off, conditional", "its standard error"]
    names += ["unconditional", "its standard error", "held-out proportions off, conditional", "unconditional"]
    names += ["distance", "Fréchet distance", "the same, other scenes", "pixels with margin below 0.9"]
    parts = [agreement, markdown_table(head, [*rows, _ious("samples, shuffled masks", shuffled, classes)])]
    cards = {"aerial": "\n\n".join([*parts, scores, markdown_table(names, [_scores(one) for one in of])])}
    cards["aerial-segmenter"] = "\n\n".join([agreement.split(",")[0] + ".", markdown_table(head, rows[:1])])
    for one in (one for key, one in found.items() if key.startswith("enlarge ")):
        kinds = {kind: one[kind] for kind in ("enlarged", "pixels repeated")}
        rows = [[kind, *values.values()] for kind, values in kinds.items()]
        says = f"{one['tests']} held-out scenes of 128 x 128 pixels, shrunk and enlarged, beside those scenes."
        cards["aerial-x2"] = "\n\n".join([says, markdown_table(["", *kinds["enlarged"]], rows)])
    return cards


def _ious(name, ious, classes):
    ious = np.array(ious, float)
    rest = [k for k, other in enumerate(classes) if other != "vehicle"]
    return [name, *ious.tolist(), float(np.nanmean(ious[rest])), float(np.nanmean(ious))]


def _scores(one):
    proportions, near = one["class shares"], one["median distance to the nearest scene learned from"]
    frechet = one["Fréchet distance to held-out scenes, the judge's encoder"]
    real = np.array(proportions["scenes learned from"])
    step, error = min(one["held-out error"], key=lambda check: check[1])
    found = [
        *_off(real, proportions, "samples"),
        *_off(real, proportions, "samples without a word"),
        *(float(np.mean(off)) for off in one["class shares off those of a held-out scene, mean"].values()),
        near["samples"] / near["held-out scenes"],
        frechet["samples"],
        frechet["other scenes"],
    ]
    return [one["scenes"], f"{step:,}", error, *found, one["pixels with margin below 0.9"]]


def _off(real, proportions, kind):
    """Return the largest error of the proportions of frequent classes, and its standard error."""
    off = abs(real - proportions[kind])
    worst = np.argmax(np.where(real > 0.05, off, 0))
    return float(off[worst]), proportions[f"{kind}, standard error"][worst]


def write_card(folder: Path, text: str) -> None:
    """Put `text` between the marks of the card in `folder`."""
    card = folder / "README.md"
    before, _, rest = card.read_text().partition(MARKS[0])
    _, mark, after = rest.partition(MARKS[1])
    if not mark:
        raise ValueError(f"{card} needs the lines {MARKS[0]} and {MARKS[1]}")
    with replacing(card) as part:
        part.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}")
