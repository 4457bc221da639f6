"""Make labeled data sets of recipes, verify and preview them, count, split and export what is in them.

attnlab dataset make flood-tiny floods --workers 2
attnlab dataset verify floods
attnlab dataset export floods yolo floods-yolo --split 0.8 0.1 0.1
attnlab dataset leaks floods-yolo/images/*
"""

import argparse
import difflib
import itertools
import json
import shlex
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

__all__ = ["add_dataset_command", "run_dataset"]

FORMATS = {  # what is exported, and the next command
    "coco": "pycocotools.coco.COCO reads the JSON; images lie in the data set's folder",
    "yolo": "yolo segment train data={}",
    "voc": "what trains on VOC 2012 takes the folder",
    "segformer": "datasets.load_dataset({!r}) and transformers read the folder",
}
_OPTIONS = {"polygons": "coco", "enlarged": "yolo"}  # of exports, and of which
_SPLITS = ("train", "val", "test")
_SHOWN = 20  # most lines of one kind


def add_dataset_command(commands: argparse._SubParsersAction) -> None:
    """Add `attnlab dataset` and its actions to the parsers of a command line."""
    form = {"formatter_class": argparse.RawTextHelpFormatter}
    about = "make, verify, preview, export and count labeled data sets; find leaks"
    parser = commands.add_parser("dataset", help=about, description=__doc__, **form)
    actions = parser.add_subparsers(dest="action", required=True, metavar=" | ".join(_ACTIONS))
    made = {}
    for name, (run, text) in _ACTIONS.items():
        made[name] = actions.add_parser(name, help=text.partition(".")[0], description=text, **form)
        made[name].set_defaults(run=run)
    recipe = "a file in YAML, or the name of one that comes with attnlab: any other name lists them"
    folder = {"type": _path, "metavar": "FOLDER"}
    made["make"].add_argument("recipe", metavar="RECIPE", help=f"{recipe};\nor the folder of a data set that was begun")
    made["make"].add_argument(
        "folder", nargs="?", help="a new folder, or one that was begun (named as RECIPE)", **folder
    )
    made["make"].add_argument("--workers", type=int, default=1, metavar="N", help="processes that make it (1)")
    made["make"].add_argument("--dry-run", action="store_true", help="say what would be made, and how long it takes")
    made["verify"].add_argument("folders", nargs="+", help="data sets", **folder)
    made["preview"].add_argument("recipe", metavar="RECIPE_OR_FOLDER", help=f"{recipe};\nor a data set's folder")
    made["preview"].add_argument("--images", type=int, default=8, metavar="N", help="how many a recipe draws (8)")
    made["preview"].add_argument("--out", type=_path, metavar="PNG", help="where the picture goes (NAME_preview.png)")
    for name in ("make", "preview"):
        text = "another value, in YAML, for a line of the recipe: -p kept 200 -p model my-model"
        made[name].add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help=text)
    made["stats"].add_argument("folders", nargs="+", help="data sets", **folder)
    made["stats"].add_argument("--json", action="store_true", help="print JSON, with every prompt")
    export = made["export"]
    export.add_argument("folder", help="a data set", **folder)
    export.add_argument("format", choices=FORMATS, help=", ".join(FORMATS))
    export.add_argument(
        "out", type=_path, metavar="OUT", help="a new folder, or an earlier export; of coco a file.json"
    )
    text = "share of train, val and test, or of train and val (0.8 0.1 0.1)"
    export.add_argument("--split", nargs="*", type=float, metavar="PART", help=text)
    export.add_argument(
        "--by", choices=("seed", "prompt"), default="seed", help="prompt: no prompt in two splits (seed)"
    )
    export.add_argument("--seed", type=int, default=0, help="another one splits in another way (0)")
    export.add_argument("--within", type=float, metavar="LEVELS", help=_WITHIN_HELP)
    export.add_argument("--polygons", action="store_true", help="of coco: polygons, in place of run lengths")
    text = "of yolo: for images smaller than what it trains on (640 pixels)"
    export.add_argument("--enlarged", action="store_true", help=text)
    made["leaks"].add_argument("folders", nargs="+", help="images in any layout; one alone: copies inside it", **folder)
    made["leaks"].add_argument("--within", type=float, metavar="LEVELS", help=_WITHIN_HELP)
    made["leaks"].add_argument("--all", action="store_true", help=f"list all, not {_SHOWN} of two folders")


def run_dataset(args: argparse.Namespace) -> int:
    """Run `attnlab dataset`; return 0, or 1 where problems were found or nothing could be kept.

    Parameters
    ----------
    args : argparse.Namespace
        What the parser of `add_dataset_command` made of a command line.
    """
    with _warnings_in_words():
        return args.run(args)


def _path(text):
    return Path(text).expanduser()


@contextmanager
def _warnings_in_words():
    """Print warnings for users as sentences, without the line of code that they come from."""
    with warnings.catch_warnings():
        plain = warnings.showwarning

        def show(message, category, *where):
            if category is not UserWarning:
                plain(message, category, *where)
            else:
                print(f"attnlab: {message}", file=sys.stderr)

        warnings.showwarning = show
        yield


def _make(args):
    from ..dataset import generate_dataset

    recipe, name = _recipe(args)
    begun = name if Path(args.recipe).expanduser().is_dir() else name.stem
    folder = args.folder or Path(begun)
    if args.dry_run:
        return _estimate(recipe, folder)
    try:
        dataset = generate_dataset(recipe, folder, workers=args.workers)
    except KeyboardInterrupt:
        line = ["attnlab", "dataset", "make", args.recipe, *([str(args.folder)] * bool(args.folder))]
        line += ["--workers", str(args.workers), *(text for pair in args.p for text in ("-p", *pair))]
        raise KeyboardInterrupt(f"stopped; what is finished is kept, and this goes on:\n  {shlex.join(line)}") from None
    except RuntimeError as error:  # workers that died again and again
        print(f"attnlab: {error}", file=sys.stderr)
        return 1
    print(dataset)
    _print_rejected(dataset.rejected)
    if not dataset:
        print(f"attnlab: nothing was kept of {recipe.model}'s images: see {folder}/rejected", file=sys.stderr)
    return int(not dataset)


def _recipe(args):
    """Load the recipe that was named, with the values that were typed; and its path, or its folder."""
    import yaml

    from ..dataset import Recipe, find_recipe

    folder = Path(args.recipe).expanduser()
    is_folder = (folder / "recipe.yaml").is_file()
    path = folder / "recipe.yaml" if is_folder else find_recipe(args.recipe)
    recipe, known = Recipe.load(path), [field.name for field in fields(Recipe)]
    typed = {}
    for name, text in args.p:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"a recipe has no {name!r}{hint}\n  it has {', '.join(known)}")
        try:
            typed[name] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"-p {name} {shlex.quote(text)} is not YAML: {error}") from None
    if {"kept", "photos"} & set(typed):
        typed.setdefault("images", None)  # as many as that takes, or as there are photos
    return replace(recipe, **typed), folder if is_folder else path


def _some(recipe, count):
    """Return a recipe of a few of another's prompts, one image each, or of its photos; each class is among them."""
    if photos := recipe.photos:
        names = _evenly(photos.names, count)
        return replace(
            recipe, images=None, kept=None, photos=replace(photos, files={n: photos.files[n] for n in names})
        )
    chosen = _evenly(recipe.texts, count)
    for word in recipe.classes.values():
        if not any(word in text for text in chosen):
            chosen += [text for text in recipe.texts if word in text][:1]
    prompts = [text.replace("{", "{{").replace("}", "}}") for text in chosen]
    return replace(recipe, prompts=prompts, lists={}, images=1, kept=None)


def _evenly(things, count):
    return [things[k * len(things) // min(count, len(things))] for k in range(min(count, len(things)))]


def _estimate(recipe, folder):
    """Print what a recipe would make, its time and its size, by two images of it."""
    from ..dataset.photos import check_photos
    from ..dataset.records import SHARDS
    from ..dataset.shards import make_shard
    from ..pipelines import load_parts

    if recipe.photos:
        check_photos(recipe.photos, whole=False)
    recipe.check(load_parts(recipe.model, ["tokenizer"])["tokenizer"])
    print(f"prompts: {len(recipe.texts)}; images: {len(recipe)} at most; model: {recipe.model}", flush=True)
    _print_some([f"  {text}" for text in recipe.texts], 5)
    print(
        f"classes: {', '.join(recipe.classes)}" + f"; kept: {recipe.as_dict().get('kept')}" * bool(recipe.kept),
        flush=True,
    )
    one, two = replace(_some(recipe, 1), shard=1), replace(_some(recipe, 2), batch=2, shard=2)
    with TemporaryDirectory() as scratch:
        for name in ("one", "two"):
            Path(scratch, name, SHARDS).mkdir(parents=True)
        make_shard(one, Path(scratch, "one"), 0)  # with the loading of the model
        started = time.perf_counter()
        count = make_shard(two, Path(scratch, "two"), 0)
        seconds = (time.perf_counter() - started) / count
        size = sum(path.stat().st_size for path in Path(scratch, "two").rglob("*") if path.is_file()) / count
    numbers = {f"all {len(recipe)} images": len(recipe)}
    if wanted := sum(recipe.kept.values()) if isinstance(recipe.kept, Mapping) else recipe.kept:
        shard = sum(map(len, recipe.batches(0)))
        made = min(-(-wanted // shard) * shard, len(recipe))
        numbers = {f"{wanted} images, if all are kept, of {made} in shards of {shard}": made, **numbers}
    print(f"measured on {count} images: {seconds:.2f} s and {size / 1e3:.0f} kB each")
    for said, number in numbers.items():
        print(f"{said}: {timedelta(seconds=round(seconds * number))} by one worker, {size * number / 1e6:.0f} MB")
    print(f"nothing was written to {folder}")
    return 0


def _recipes(args):
    from ..dataset import known_recipes

    for name, path in known_recipes().items():
        print(f"{name:14} {path.read_text('utf-8').partition(chr(10))[0].strip('# ')}")
    return 0


def _verify(args):
    from ..dataset import Dataset, verify_dataset

    found = 0
    for folder in args.folders:
        if not (folder / "recipe.yaml").is_file():
            raise FileNotFoundError(f"{folder} holds no data set: it has no recipe.yaml")
        problems = verify_dataset(folder)
        found += len(problems)
        print(f"{folder}: {len(problems)} problems" if problems else f"{Dataset(folder)}: all is well", flush=True)
        _print_some([f"  {problem}" for problem in problems])
    return int(found > 0)


def _preview(args):
    from ..dataset import Dataset, generate_dataset
    from ..dataset.card import contact_sheet
    from ..storage import replacing

    folder = Path(args.recipe).expanduser()
    if args.images < 1:
        raise ValueError(f"--images {args.images}: draw 1 or more")
    with TemporaryDirectory() as scratch:
        if (folder / "metadata.jsonl").is_file() and not args.p:
            dataset, name = Dataset(folder), folder
        else:
            recipe, name = _recipe(args)
            dataset = generate_dataset(_some(recipe, args.images), Path(scratch, "preview"))
        shown = [record for record in dataset.records if record["file_name"] not in dataset.bad]
        print(f"{len(dataset)} kept, {len(dataset.rejected)} rejected")
        _print_rejected(dataset.rejected)
        if not shown:
            print("attnlab: there is no image to show", file=sys.stderr)
            return 1
        with replacing(args.out or Path(f"{name.resolve().stem}_preview.png")) as part:
            contact_sheet(dataset.folder, shown).save(part, "PNG")
    print(args.out or f"{name.resolve().stem}_preview.png")
    return 0


def _stats(args):
    from ..dataset import Dataset, count_dataset

    found = {str(folder): count_dataset(Dataset(folder)) for folder in args.folders}
    if args.json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
        return 0
    for folder, counts in found.items():
        sizes = ", ".join(f"{n} of {size}" for size, n in counts["sizes"].items())
        print(f"{folder}: {counts['images']} images ({sizes or 'none'}), {counts['bad']} more marked as bad")
        rows = [["class", "images", "pixels", "share", "regions", "median region"]]
        for name, row in counts["classes"].items():
            rows.append(
                [name, row["images"], row["pixels"], f"{row['share']:.1%}", row["regions"], row["median region"]]
            )
        rows.append(["background alone", counts["background alone"], "", "", "", ""])
        _print_table(rows)
        print(f"ignored pixels: {counts['ignored']}\nrejected: {sum(counts['rejected'].values())}")
        _print_some([f"  {n:5} {reason}" for reason, n in counts["rejected"].items()])
        print("prompts: kept, rejected")
        _print_some([f"  {kept:5} {rejected:5}  {text}" for text, (kept, rejected) in counts["prompts"].items()])
    return 0


def _export(args):
    from .. import dataset as library
    from ..dataset.thumbnails import WITHIN

    options = {name: True for name in _OPTIONS if getattr(args, name)}
    if other := [name for name in options if _OPTIONS[name] != args.format]:
        raise ValueError(f"--{other[0]} is for {_OPTIONS[other[0]]}, not for {args.format}: leave it out")
    dataset, splits = library.Dataset(args.folder), None
    if args.split is not None:
        parts = args.split or [0.8, 0.1, 0.1]
        if not 2 <= len(parts) <= 3:
            raise ValueError(
                f"--split {' '.join(map(str, parts))}: give the shares of train and val, or train, val and test"
            )
        fractions = dict(zip(_SPLITS, parts, strict=False))
        within = WITHIN if args.within is None else args.within
        splits = library.split_dataset(dataset, fractions, seed=args.seed, by=args.by, within=within)
    function = getattr(library, f"export_{args.format}")
    made = function(dataset, args.out, splits=splits, **options)
    bad = f", {len(dataset.bad)} marked as bad left out" if dataset.bad else ""
    print(f"{len(dataset) - len(dataset.bad)} pairs of {', '.join(dataset.classes[1:])}{bad}")
    for name, positions in (splits or {}).items():
        print(f"{name:5} {len(positions):5}  {_classes_in(dataset, positions)}")
    print(*(made.values() if isinstance(made, dict) else [made]), sep="\n")
    shown = shlex.quote(f"{args.out}/data.yaml") if args.format == "yolo" else str(args.out)
    print("next:", FORMATS[args.format].format(shown))
    return 0


def _classes_in(dataset, positions):
    """Say how many of some records show each class."""
    areas = [dataset.records[i]["areas"] for i in positions]
    return ", ".join(f"{name} in {sum(bool(own.get(name)) for own in areas)}" for name in dataset.classes[1:])


def _leaks(args):
    from ..dataset import find_leaks
    from ..dataset.leaks import find_images
    from ..dataset.thumbnails import WITHIN

    for folder in args.folders[2:]:
        find_images(folder)  # one without any is refused before others are read; of two, find_leaks does so
    within, found = WITHIN if args.within is None else args.within, 0
    pairs = list(itertools.combinations(args.folders, 2)) or [(args.folders[0], None)]
    for first, second in pairs:
        leaks = find_leaks(first, second, within=within)
        found += len(leaks)
        where = f"{first}, {second}" if second else first
        same = sum(leak.same for leak in leaks)
        print(f"{where}: {len(leaks)} near duplicates" + f", {same} with the same pixels" * bool(leaks), flush=True)
        _print_some([f"  {_leak(leak)}" for leak in leaks], None if args.all else _SHOWN)
    return int(found > 0)


def _leak(leak):
    how = "same pixels" if leak.same else f"{leak.distance:.1f} gray levels apart"
    return f"{leak.second} is {leak.first} ({', '.join([how, *([leak.turn.strip()] * bool(leak.turn))])})"


def _print_some(lines: Sequence[str], most: int | None = _SHOWN):
    more = len(lines) - (len(lines) if most is None else most)
    print(*lines[:most], *([f"  and {more} more"] if more > 0 else []), sep="\n", end="\n" * bool(lines), flush=True)


def _print_rejected(rejected):
    from ..dataset.keeping import count_reasons

    reasons = count_reasons([line["reason"] for line in rejected])
    _print_some([f"  {count:5} rejected: {reason}" for reason, count in reasons.items()])


def _print_table(rows):
    widths = [max(len(str(row[k])) for row in rows) for k in range(len(rows[0]))]
    for first, *others in rows:
        print(f"  {first:{widths[0]}}", *(f"{one:>{n}}" for one, n in zip(others, widths[1:], strict=True)), sep="  ")


_WITHIN_HELP = "gray levels, 0..255, by which near duplicates differ at most (6)"
_ACTIONS = {
    "make": (_make, "Make a recipe's data set. Killed at any moment, the same line goes on to the same bytes."),
    "recipes": (_recipes, "List the recipes that come with attnlab."),
    "verify": (_verify, "Verify images, masks and lines of data sets. Exit status 1 where one is missing or altered."),
    "preview": (_preview, "Draw a contact sheet: of a data set, or of a few images that a recipe makes."),
    "stats": (_stats, "Count classes, pixels, regions, prompts, and what was rejected and why."),
    "export": (_export, "Export a data set, split without near duplicates across splits if --split is given."),
    "leaks": (_leaks, "Find images that folders share, up to flips, quarter turns, size and encoding.\n"
                      "Exit status 1 where there are any."),
}  # fmt: skip
