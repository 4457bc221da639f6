"""Measure maps of class words by published protocols: ImageNet-Segmentation, and images of one class of Pascal VOC.

As ConceptAttention does (Helbling et al., ICML 2025, arXiv 2502.04320; github.com/helblazer811/ConceptAttention at
db30c4d, `experiments/imagenet_segmentation` and `experiments/pascal_voc_segmentation`): an image is made square, noised
once, and looked at once with the prompt "a CLASS". In joint attention the class shares out each pixel with words for
what else may be there, by attention's outputs; U-Nets have the class's DAAM map. Map, mask and truth are compared at
224 x 224, nearest neighbors. Two layouts of a folder are read (`open_protocol`):

    images/NAME.jpg (or .png)    masks/NAME.png    classes.csv
    JPEGImages/NAME.jpg    SegmentationClass/NAME.png    ImageSets/Segmentation/val.txt

In the first, a mask is 0 where its object is not, and classes.csv has a line `name,word` for each image, or
`name,word,beside` with the words that share out its pixels, "floor;grass". The second is Pascal VOC as it is published.

What differs from theirs: each word is read by itself as a text of its own, all its tokens count and not the first one
alone, and the prompt's summary (FLUX) stays the prompt's. The timestep is 500 of 1000; theirs depends on options, and
is 1 of their DAAM. Images are resized at once, nothing is blurred, maps of VOC are rescaled before they are ranked, and
pixels that VOC ignores count nowhere.
"""

import csv
import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from sklearn.metrics import average_precision_score
from tqdm import tqdm

import attnlab as al
from attnlab import metrics
from attnlab.masks import IGNORE
from attnlab.recording.adapters import adapter_of
from attnlab.recording.checks import check_generation, own_size
from attnlab.scenes import street
from attnlab.storage import claim_folder, read_rgb, write_text

__all__ = ["CUTS", "IMAGENET_SEGMENTATION", "SIDE", "VOC_SINGLE_CLASS", "Protocol", "ProtocolCase", "ProtocolRun"]
__all__ += ["compare", "open_protocol", "protocol_table", "summarize_protocol", "truth_of", "write_scenes"]

SIDE = 224  # pixels a side at which masks are compared
CUTS = ("mean", "argmax")  # a mask is where its map is above the map's mean; where no word beside has more of a pixel
_FLUX_BLOCKS = 19  # of FLUX in which text and image have weights of their own
_FIRST_SCENE = street.HELD_OUT + 950_000


class Protocol(NamedTuple):
    """A published protocol, and what was published of it: method, and accuracy, mIoU and mAP in percent."""

    name: str
    beside: tuple[str, ...]  # words that share out an image's pixels with its class
    cut: str  # one of CUTS, in joint attention; U-Nets take the mean
    blocks: tuple[int, ...]  # of FLUX's 19, from 0
    published: tuple[tuple[str, float | None, float | None, float | None], ...]


IMAGENET_SEGMENTATION = Protocol(
    "ImageNet-Segmentation",
    ("background", "floor", "tree", "person", "grass", "face"),
    "mean",
    (14, 15, 16, 17),
    (
        ("ConceptAttention, FLUX.1 schnell", 83.1, 71.0, 90.5),
        ("cross-attention, FLUX.1 schnell", None, 59.9, None),
        ("DAAM, Stable Diffusion XL", None, 64.6, None),
        ("DAAM, Stable Diffusion 2", None, 47.6, None),
    ),
)
VOC_SINGLE_CLASS = Protocol(
    "Pascal VOC, one class",
    ("background", "floor", "grass", "tree", "sky"),
    "argmax",
    (14, 15, 16, 17, 18),
    (("ConceptAttention, FLUX.1 schnell (second hand)", None, 76.5, None),),
)
_VOC_WORDS = (
    "plane", "bike", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "table", "dog", "horse",
    "motorcycle", "person", "pot", "sheep", "sofa", "train", "monitor",
)  # fmt: skip  # what ConceptAttention calls VOC's classes 1 to 20


class ProtocolCase(NamedTuple):
    """One image: its name, the word of its class, the words beside, its files, and the class's number in the mask."""

    name: str
    word: str
    beside: tuple[str, ...]
    image: Path
    mask: Path
    label: int | None = None  # None: every number but 0


def open_protocol(folder: str | Path) -> tuple[Protocol, list[ProtocolCase]]:
    """Read which images a folder has, in one of the two layouts, and that all their files are there.

    FileNotFoundError that lists missing files; ValueError for lines of classes.csv that are none, and where no image of
    Pascal VOC shows one class.
    """
    folder = Path(folder).expanduser()
    if (folder / "classes.csv").is_file():
        return IMAGENET_SEGMENTATION, _of_classes(folder)
    if (folder / "ImageSets/Segmentation/val.txt").is_file():
        return VOC_SINGLE_CLASS, _of_voc(folder)
    raise FileNotFoundError(
        f"{folder} has neither classes.csv, beside images/ and masks/, nor ImageSets/Segmentation/val.txt of Pascal VOC"
    )


def _of_classes(folder):
    with open(folder / "classes.csv", encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file, restval=""))
    names = [row.get("name", "") for row in rows]
    if wrong := [k for k, row in enumerate(rows, 2) if not _is_row(row) or names.count(row["name"]) > 1]:
        raise ValueError(
            f"{folder / 'classes.csv'}: lines {wrong[:10]} are not `name,word` or `name,word,beside`, as its first "
            "line says, with the name of one image, without its folder and ending, that no other line has"
        )
    if not rows:
        raise ValueError(f"{folder / 'classes.csv'} has no line below its first one, name,word,beside")
    cases = []
    for name, row in zip(names, rows, strict=True):
        beside = tuple(filter(None, map(str.strip, (row.get("beside") or "").split(";"))))
        found = [path for end in (".jpg", ".png") if (path := folder / f"images/{name}{end}").is_file()]
        image, mask = (*found, folder / f"images/{name}.jpg")[0], folder / f"masks/{name}.png"
        cases.append(ProtocolCase(name, row["word"].strip(), beside or IMAGENET_SEGMENTATION.beside, image, mask))
    _check_files(folder, [path for case in cases for path in (case.image, case.mask)])
    return cases


def _is_row(row):
    return None not in row and row.get("word", "").strip() and row.get("name") == Path(row.get("name", "")).name != ""


def _of_voc(folder):
    names = (folder / "ImageSets/Segmentation/val.txt").read_text("utf-8").split()
    paths = [(folder / f"JPEGImages/{name}.jpg", folder / f"SegmentationClass/{name}.png") for name in names]
    _check_files(folder, [path for pair in paths for path in pair])
    cases = []
    for name, (image, mask) in zip(tqdm(names, desc="masks", delay=2, leave=False), paths, strict=True):
        shown = np.setdiff1d(_labels(mask), (0, IGNORE))
        if len(shown) == 1 and shown[0] <= len(_VOC_WORDS):
            word = _VOC_WORDS[shown[0] - 1]
            cases.append(ProtocolCase(name, word, VOC_SINGLE_CLASS.beside, image, mask, int(shown[0])))
    if not cases:
        raise ValueError(f"none of the {len(names)} masks in {folder / 'SegmentationClass'} shows one class alone")
    return cases


def _check_files(folder, paths):
    if missing := [str(path.relative_to(folder)) for path in paths if not path.is_file()]:
        more = f"\n- and {len(missing) - 20} more" if len(missing) > 20 else ""
        listed = "".join(f"\n- {name}" for name in missing[:20])
        raise FileNotFoundError(f"{len(missing)} of {len(paths)} files are missing in {folder}:{listed}{more}")


def _labels(path):
    """Return the numbers of a mask at SIDE x SIDE, of a palette as they are."""
    with Image.open(path) as mask:
        labels = np.asarray(mask.resize((SIDE, SIDE), Image.Resampling.NEAREST))
    if labels.ndim != 2:
        raise ValueError(f"{path} has {labels.shape[2]} channels: a mask has one, of numbers or of black and white")
    return labels


def truth_of(case: ProtocolCase) -> np.ndarray:
    """Return an image's truth at SIDE x SIDE, uint8: 1 where its object is, 0 elsewhere, 255 where nobody knows."""
    labels = _labels(case.mask)
    if case.label is None:
        return (labels > 0).astype(np.uint8)
    return np.where(labels == IGNORE, IGNORE, labels == case.label).astype(np.uint8)


def compare(heat: np.ndarray, mask: np.ndarray, truth: np.ndarray) -> dict:
    """Compare a map and a mask (row, column) of any size with a truth at SIDE x SIDE, by the numbers that are summed.

    "counts" are pixels by true and predicted class, "precision" is the average precision of the map, rescaled to 0..1,
    and of its complement, in one ranking.
    """
    valid = truth != IGNORE
    low, high = float(heat.min()), float(heat.max())
    scores = _to_side((heat.astype(float) - low) / (high - low if high > low else 1))[valid]
    counts = metrics.confusion(truth, _to_side(mask).astype(np.uint8), 2)
    found = average_precision_score(np.r_[truth[valid] == 0, truth[valid] == 1], np.r_[1 - scores, scores])
    return {"counts": counts.tolist(), "precision": float(found)}


def _to_side(values):
    """Resize to SIDE x SIDE by torch's "nearest", which takes the cell in which a pixel's corner lies."""
    rows, columns = (np.arange(SIDE) * count // SIDE for count in values.shape)
    return values[rows][:, columns]


@dataclass(frozen=True)
class ProtocolRun:
    """A protocol, a model and images: maps, masks and their numbers.

    `layers` are names, and () those of the protocol: of FLUX its own, of others those as deep; `cut` is one of CUTS, ""
    the protocol's; `size` is the side in pixels that the model looks at, 0 its own. A U-Net takes all its layers.
    """

    pipe: object
    protocol: Protocol
    cases: Sequence[ProtocolCase]
    timestep: int = 500
    layers: tuple[str, ...] = ()
    cut: str = ""
    size: int = 0

    def __post_init__(self):
        if self.cut not in ("", *CUTS) or (self.cut == "argmax" and not self.joint):
            raise ValueError(f"cut={self.cut!r}: mean, or in joint attention (FLUX, Stable Diffusion 3) argmax")

    @property
    def joint(self) -> bool:
        """Whether image and text attend to one another, so that words have outputs."""
        return adapter_of(self.pipe).joint

    @cached_property
    def settings(self) -> dict:
        """What tells a run from others, with nothing left to a default."""
        names, layers = list(adapter_of(self.pipe).attentions), list(self.layers) or None
        if self.joint and layers is None:
            group = [name for name in names if name.split(".")[0] == names[0].split(".")[0]]
            layers = [group[k] for k in sorted({k * len(group) // _FLUX_BLOCKS for k in self.protocol.blocks})]
        about = [[case.name, case.word, case.beside] for case in self.cases]
        return {
            "model": str(self.pipe.config.get("_name_or_path")),
            "dtype": str(self.pipe.dtype),
            "cut": self.cut or (self.protocol.cut if self.joint else "mean"),
            "layers": layers,
            "timestep": self.timestep,
            "size": self.size or own_size(self.pipe),
            "cases": hashlib.sha256(json.dumps(about).encode()).hexdigest(),
        }

    def check(self) -> None:
        """Read every word once; ValueError for one that the model cannot read whole, or a size it does not take."""
        words, asked = dict.fromkeys(case.word for case in self.cases), {"steps": 1, "size": self.size}
        if self.joint:
            beside = dict.fromkeys(word for case in self.cases for word in case.beside)
            check_generation(self.pipe, "a photo", texts=[*(words | beside)], **asked)
        for word in words:
            check_generation(self.pipe, f"a {word}", [] if self.joint else [word], **asked)

    def maps(self, case: ProtocolCase) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return an image as the model sees it, the map of its class, and the mask, both of the map's size."""
        found, side = self.settings, (self.settings["size"],) * 2
        image = Image.fromarray(read_rgb(case.image)).resize(side, Image.Resampling.BICUBIC)
        words = list(dict.fromkeys([case.word, *case.beside])) if self.joint else []
        recording = al.record_image(
            self.pipe,
            image,
            f"a {case.word}",
            timesteps=found["timestep"],
            layers=found["layers"],
            texts=words,
            outputs=self.joint,
            generator=al.seed(zlib.crc32(case.name.encode())),
        )
        if not self.joint:
            heat = al.daam(recording)[case.word]
            return np.asarray(image), heat, heat > heat.mean()
        layers = list(recording.trace.sizes)
        if found["cut"] == "mean":  # each layer's softmax, as theirs; of argmax it is that of all layers together
            heat = np.mean([al.concept_maps(recording, words, layers=[name])[case.word] for name in layers], axis=0)
            return np.asarray(image), heat, heat > heat.mean()
        values = al.concept_maps(recording, words).values
        return np.asarray(image), values[0], values.argmax(0) == 0

    def run(self, folder: str | Path) -> list[dict]:
        """Return the numbers of every image; each is written to a folder, and found there by a run that goes on."""
        self.check()
        claim_folder(folder, self.settings)
        found = []
        for case in tqdm(self.cases, desc="images"):
            path = Path(folder, f"{case.name}.json")
            if path.name == "settings.json":
                raise ValueError(f"rename {case.image.name}: settings.json is of the run")
            if not path.exists():
                write_text(path, json.dumps(compare(*self.maps(case)[1:], truth_of(case))))
            found.append(json.loads(path.read_text("utf-8")))
        return found


def summarize_protocol(found: Sequence[dict], resamples: int = 2000) -> dict[str, tuple[float, float, float]]:
    """Return accuracy, mIoU and mAP of images by what `compare` gives, each with its 95 % bootstrap interval.

    Pixels are counted over all images; "mIoU" is the mean over object and background. "mIoU, doubled" is what the code
    of ConceptAttention prints for ImageNet-Segmentation: it counts each mask together with its complement, by which
    both classes have accuracy / (2 - accuracy): 71.0 of 83.1, for example, but for rounding.
    """
    counts = np.array([one["counts"] for one in found], float)
    precisions = np.array([one["precision"] for one in found])
    n = len(found)
    draws = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), resamples)
    rows = []
    for weights in (np.ones(n), *draws):
        total = np.tensordot(weights, counts, 1)
        accuracy = np.trace(total) / total.sum()
        miou = np.nanmean(metrics.class_ious(total))
        rows.append((accuracy, miou, accuracy / (2 - accuracy), weights @ precisions / n))
    low, high = np.quantile(rows[1:], [0.025, 0.975], axis=0)
    names = ("accuracy", "mIoU", "mIoU, doubled", "mAP")
    return {name: tuple(map(float, row)) for name, *row in zip(names, rows[0], low, high, strict=True)}


def protocol_table(run: ProtocolRun, summary: dict) -> str:
    """Write a Markdown table in percent: this run's numbers with intervals, and below them what was published."""
    head = ["what", "images", "accuracy", "mIoU", "mIoU, doubled", "mAP"]
    own = [f"{100 * value:.1f} ({100 * low:.1f} to {100 * high:.1f})" for value, low, high in summary.values()]
    rows = [head, ["---"] * len(head), [f"this run: {run.settings['model']}", str(len(run.cases)), *own]]
    for method, *numbers in run.protocol.published:
        accuracy, miou, precision = ("" if value is None else str(value) for value in numbers)
        doubled = run.protocol is IMAGENET_SEGMENTATION
        cells = [f"{method}: published, not run here", run.protocol.name, accuracy]
        rows.append([*cells, "" if doubled else miou, miou if doubled else "", precision])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def write_scenes(folder: str | Path, count: int) -> Path:
    """Write rendered scenes in the layout of classes.csv, each with one word of its caption; return the folder.

    No bundled model was trained on them. The words beside are others of the caption, and "sky" and "grass".
    """
    lines, seeds = [["name", "word", "beside"]], iter(range(_FIRST_SCENE, street.HELD_OUT * 2))
    for place in ("images", "masks"):
        Path(folder, place).mkdir(parents=True, exist_ok=True)
    while len(lines) <= count:
        scene = street.render(number := next(seeds))
        if not (fitting := [word for word in scene.words if 0.04 < scene.mask(word).mean() < 0.6]):
            continue
        word = fitting[number % len(fitting)]
        others = [w for w in (*scene.words, "sky", "grass") if street.WORDS[w] != scene.words[word]]
        Image.fromarray(scene.image).save(Path(folder, f"images/{number}.png"))
        Image.fromarray(scene.mask(word)).save(Path(folder, f"masks/{number}.png"))
        lines.append([str(number), word, ";".join(dict.fromkeys(others))])
    write_text(Path(folder, "classes.csv"), "".join(",".join(line) + "\n" for line in lines))
    return Path(folder)
