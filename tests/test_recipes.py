"""Recipes: everything that is wrong is said at once, in words and quickly, and every text survives every file."""

import json
import time
from dataclasses import replace

import numpy as np
import pytest

import attnlab as al
from attnlab.dataset import Dataset, Filters, Recipe, export_coco, generate_dataset, verify_dataset
from attnlab.dataset.rules import SCHEDULERS

FIRE = Recipe(prompts=["a {thing} with fire"], lists={"thing": ["house", "tree"]}, classes={"fire": "fire"}, steps=2)
OPEN = Filters(area=None, flat=None, blank=None, duplicates=None)


def test_everything_that_is_wrong_is_said_at_once():
    with pytest.raises(ValueError) as error:
        Recipe(
            prompts=["a {place} at {time}"],
            lists={"place": [], "color": ["red"]},
            classes={"../fire": "fire", "smoke": ""},
            images=0,
            map="attention",
            mask={"method": "dbscan", "epsilon": 2},
            size=(60, 64),
            band=1.5,
            filters={"area": [0.9, 0.1]},
            scheduler="Euler",
            tokens="none.safetensors",
        )
    said = str(error.value)
    for part in (
        "{time}",
        "'place' is []",
        "'color' is in no prompt",
        "'../fire'",
        "'smoke' is labeled by ''",
        "images is 0",
    ):
        assert part in said
    for part in (
        "'attention'",
        "no epsilon; it has eps",
        "size is (60, 64)",
        "band is 1.5",
        "area",
        "'Euler'",
        "tokens",
    ):
        assert part in said
    assert said.count("\n- ") == 13


def test_recipes_are_yaml(tmp_path):
    path = FIRE.save(tmp_path / "fire.yaml")
    assert Recipe.load(path) == FIRE or Recipe.load(path).digest == FIRE.digest
    assert replace(FIRE, steps=3).digest != FIRE.digest
    assert "dtype" not in FIRE.as_dict(), "recipes that were written before there was a dtype stay the same"
    typed = replace(FIRE, dtype="bfloat16")
    assert Recipe.load(typed.save(tmp_path / "typed.yaml")).dtype == "bfloat16" and typed.digest != FIRE.digest
    text = path.read_text()
    for change, message in [
        (text.replace("images: 1", "image: 5"), "did you mean images?"),
        (text.replace("format: 1", "format: 2"), "has format 2, this attnlab reads 1: install a later one"),
        (text.replace("images: 1", "images: many"), "images is 'many'"),
        ("prompts: [a fire", "is not YAML"),
        ("- a fire", "is no recipe"),
        ("classes: {fire: fire}", "lacks prompts"),
        ("prompts: !!python/object/apply:os.getcwd []", "is not YAML"),
    ]:
        path.write_text(change)
        with pytest.raises(ValueError, match=r"fire\.yaml") as error:
            Recipe.load(path)
        assert message in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"no recipe .*missing\.yaml"):
        Recipe.load(tmp_path / "missing.yaml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": {"method": "dbscan", "quantile": 7}}, "quantile is a fraction between 0 and 1, got 7"),
        ({"mask": {"method": "dbscan", "eps": "x"}}, "eps is a radius in pixels, a number above 0"),
        ({"mask": {"method": "random_walker", "low": 0.9}}, "low must be less than high"),
        ({"mask": "otsu"}, "mask is 'otsu': write {method: one of"),
        ({"seed": 2**64}, "seed is 18446744073709551616: it is a whole number from 0 to 18446744073709551615"),
        ({"seed": 2**64 - 2, "images": 2}, "seed is 18446744073709551614: the last record's would be above"),
        ({"images": 10**9}, "images is 1000000000: it is a whole number from 1 to 10000000"),
        ({"images": 10**7}, "2 prompts with 10000000 images each are too many"),
        ({"steps": 10**9}, "steps is 1000000000"),
        ({"threads": 10**6}, "threads is 1000000: it is a whole number from 1 to 1024"),
        ({"propagate": 10**6}, "propagate is 1000000"),
        ({"size": 64}, "size is 64: (height, width) in multiples of 8, up to 8192"),
        ({"size": [80000, 80000]}, "size is (80000, 80000)"),
        ({"guidance": float("inf")}, "guidance is inf: it is a number from 0 to 1000"),
        ({"filters": {"area": 5}}, "filters: area is 5"),
        ({"filters": {"area": ["a", "b"]}}, "filters: area is ['a', 'b']"),
        ({"lists": {"thing": ["house"], 3: ["x"]}}, "list 3: a name begins with a letter"),
        ({"prompts": ["{a.b} fire"], "lists": {"a.b": ["x"]}}, "list 'a.b': a name begins with a letter"),
        ({"prompts": ["{0} fire"], "lists": {"0": ["x"]}}, "list '0': a name begins with a letter"),
        ({"prompts": ["{thing:>9999999999} fire"]}, "write {thing} alone, without : or !"),
        ({"prompts": ["{thing!r} fire"]}, "write {thing} alone, without : or !"),
        ({"prompts": ["a {thing} with fire \ud800"]}, "a text of up to 10000 whole characters"),
        ({"lists": {"thing": ["\udfff"]}}, "list 'thing' is ['\\udfff']"),
        ({"classes": {"fire": "fire\ud800"}}, "class 'fire' is labeled by 'fire\\ud800'"),
        ({"negative": "\ud800"}, "negative is '\\ud800'"),
        ({"context": "\ud800 {}"}, "context is '\\ud800 {}'"),
        ({"model": "\ud800"}, "model is '\\ud800'"),
        ({"negative": "x" * 10_001}, "negative is 'xxx"),
        ({"classes": {"x" * 101: "fire"}}, "a name has 1 to 100 letters"),
        ({"classes": {"Feuer\u0301": "fire"}}, "a name has 1 to 100 letters"),
        ({"classes": {"a b": "fire", "a_b": "house"}, "labels": False}, "classes 'a b' and 'a_b': their masks' files"),
        ({"classes": {"Fire": "fire", "fire": "house"}, "labels": False}, "classes 'Fire' and 'fire': their masks'"),
    ],
)
def test_what_cannot_be_made_is_refused_when_it_is_written(change, message):
    with pytest.raises(ValueError) as error:
        replace(FIRE, **change)
    assert message in str(error.value)


def test_names_of_one_label_image_may_differ_in_case_alone():
    assert len(replace(FIRE, classes={"Fire": "fire", "fire": "house", "a b": "a", "a_b": "with"}).classes) == 4


NEGATIVES = Recipe(
    prompts=["a house with fire", "a house"], classes={"fire": "fire"}, kept={"background": 3, "fire": 2}
)


def test_kept_records_bound_the_images_and_go_round_the_prompts():
    assert FIRE.images == replace(FIRE, images=None).images == 1 and FIRE.prompt(1) == "a tree with fire"
    assert "kept" not in FIRE.as_dict() and FIRE.as_dict()["images"] == 1
    assert FIRE.digest == "016ee29449b2cb67", "recipes without kept are as they were"
    kept = replace(FIRE, kept=7, images=None)
    assert kept.images == 35 and len(kept) == 70, "ten attempts at each, over two prompts"
    assert [kept.prompt(i) for i in range(3)] == ["a house with fire", "a tree with fire", "a house with fire"]
    assert kept.digest != replace(FIRE, images=35).digest
    assert NEGATIVES.images == 25 and replace(FIRE, kept=2, images=1).images == 1


def test_kept_records_are_written_as_yaml(tmp_path):
    again = Recipe.load(NEGATIVES.save(tmp_path / "recipe.yaml"))
    assert again.kept == {"background": 3, "fire": 2} and again.digest == NEGATIVES.digest and again.images == 25


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kept": 0}, "kept is 0: it is a whole number from 1 to 10000000, or one for each class, such as {fire: 100}"),
        ({"kept": True}, "kept is True"),
        ({"kept": {}}, "kept is {}"),
        ({"kept": {"fire": 1.5}}, "kept is {'fire': 1.5}"),
        ({"kept": ["fire"]}, "kept is ['fire']"),
        ({"kept": {"fires": 5}}, "kept names 'fires', which is no class: it may have fire, background"),
        (
            {"kept": 3, "images": 1},
            "images is 1: 2 prompts make 2 images at most, kept wants 3; leave images out for 10",
        ),
        ({"kept": {"fire": 2, "background": 1}, "images": 1}, "2 images at most, kept wants 3"),
        ({"kept": 10**7, "images": None}, "are too many"),
        ({"kept": {"background": 2}, "classes": {"background": "fire"}}, "give the class of that name another one"),
        ({"kept": {"background": 2}, "map": "ovam"}, "images of no class, which ovam cannot have so"),
        ({"kept": {"background": 2}, "map": "linear", "mask": {"method": "zero"}}, "filters: {area: null}"),
    ],
)
def test_what_cannot_be_kept_is_refused(change, message):
    with pytest.raises(ValueError) as error:
        replace(FIRE, **{"images": 20, **change})
    assert message in str(error.value)


def test_negatives_want_a_prompt_that_names_no_class():
    tokenizer = al.load_pipeline("tiny", device="cpu").tokenizer
    NEGATIVES.check(tokenizer)
    with pytest.raises(ValueError, match="kept wants background, images of no class, but every prompt names one"):
        replace(NEGATIVES, prompts=("a house with fire",)).check(tokenizer)
    with pytest.raises(ValueError, match="but every prompt names one"):
        replace(NEGATIVES, classes={"fire": "fire", "house": "house"}).check(tokenizer)
    token = replace(NEGATIVES, map="linear", mask={"method": "zero"}, filters=OPEN)
    assert token.kept["background"] == 3, "a learned token may say that its class is not there"


def test_too_many_prompts_are_counted_and_not_made():
    begun = time.process_time()
    lists = {f"x{i}": [str(n) for n in range(10)] for i in range(9)}
    with pytest.raises(ValueError, match="1000000000 prompts with 1 images each are too many: at most 1000000 prompts"):
        Recipe(prompts=["fire " + " ".join(f"{{{name}}}" for name in lists)], lists=lists, classes={"fire": "fire"})
    assert time.process_time() - begun < 1


def test_an_error_of_many_problems_names_some():
    with pytest.raises(ValueError, match=r"(?s)prompt '\{x0\}' names.*and 280 more$"):
        replace(FIRE, prompts=[f"{{x{i}}}" for i in range(299)])


BOMB = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
MERGED = "a0: &a0 {x: y}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "it is no recipe"),
        (MERGED, "it is no recipe"),
        ("a: &a [*a]", "it is no recipe"),
        ("[" * 5000, "it is not YAML"),
        (b"\x89PNG\r\n\x1a\n\0\0", "it is not YAML"),
        (b"prompts: [\0]", "it is not YAML"),
        ("", "it is no recipe"),
        ("prompts: [a fire]\nclasses: {fire: fire, fire: flames}", "'fire' is there twice, in lines 2 and 2"),
        ("prompts: [a fire with {x}]\nclasses: {fire: fire}", "between quotation marks"),
        ("prompts: [a fire]\nclasses: {no: fire}", "quotation marks around yes, no"),
        ("prompts: [a fire]\nclasses: [fire]", "to words, such as {fire: fire}"),
        (
            "prompts: [a fire]\nclasses: {fire: fire}\nseed: 1\nseed: 2",
            "twice, in lines 3 and 4: the first would",
        ),
        ("prompts: [a fire]\nclasses: {fire: fire}\nseed: 1" + "0" * 5000, "digits"),
        (b"#" * (10**7 + 1), "it is no recipe: one has at most 10000000 bytes"),
        ("classes: &c {fire: fire}\nprompts: [a fire]\nfilters: *c", "filters is {'fire': 'fire'}"),
    ],
)
def test_files_that_are_no_recipe_are_refused_quickly(tmp_path, text, message):
    path, begun = tmp_path / "recipe.yaml", time.process_time()
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=r"recipe\.yaml: ") as error:
        Recipe.load(path)
    assert message in str(error.value) and len(str(error.value)) < 2000 and time.process_time() - begun < 5


def test_aliases_within_reason_are_read(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("prompts: ['{a} fire {b}']\nclasses: {fire: fire}\nlists: {a: &l [x, y], b: *l}")
    assert Recipe.load(path).texts == ["x fire x", "x fire y", "y fire x", "y fire y"]


def test_a_folder_is_no_recipe_and_missing_folders_are_made(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no recipe .*: name the file in that folder"):
        Recipe.load(tmp_path)
    path = FIRE.save(tmp_path / "a/b/fire.yaml")
    assert Recipe.load(path).digest == FIRE.digest


BREAKS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"  # where str.splitlines splits
TEXTS = [f"a{mark}b" for mark in BREAKS] + [
    "\t",
    "\ufeff",
    "\x00",
    "\x7f",
    "é",
    "e\u0301",
    "😀",
    "\uffff",
    " x ",
    "'\"",
    "|",
    "{",
]


def test_every_text_survives_the_recipe_and_its_lines(tmp_path):
    """One recipe with each character that some reader takes for more than itself."""
    texts = [f"fire {text} smoke" for text in TEXTS]
    recipe = Recipe(
        prompts=[text.replace("{", "{{") for text in texts] + ["fire {mark}"],
        lists={"mark": texts},
        classes={"fire": "".join(TEXTS)},
        negative="".join(TEXTS),
        context="{}".join(TEXTS[:2]),
        model="".join(TEXTS),
    )
    again = Recipe.load(recipe.save(tmp_path / "recipe.yaml"))
    assert again == replace(recipe, lists={"mark": tuple(texts)}) or again.as_dict() == recipe.as_dict()
    assert again.texts == texts + [f"fire {text}" for text in texts]


def test_every_text_survives_a_data_set(tmp_path):
    prompt = f"a house with fire{' '.join(BREAKS)}\x00 and smoke"
    recipe = replace(FIRE, prompts=[prompt], lists={}, classes={"fire": f"fire{BREAKS}"}, negative=BREAKS)
    recipe = replace(recipe, map="ovam", context=f"{BREAKS}a {{}}", images=2, filters=replace(OPEN, duplicates=64))
    made = generate_dataset(recipe, tmp_path / "made")
    assert [len(made), len(made.rejected)] == [1, 1] and verify_dataset(made.folder) == []
    made.mark("images/000000.png")
    found = Dataset(made.folder)
    assert found.bad == {"images/000000.png"} and generate_dataset(recipe, made.folder).records == found.records
    for line in (*found.records, *found.rejected):
        assert line["prompt"] == prompt
    assert found.records[0]["words"] == recipe.classes and found.recipe.as_dict() == recipe.as_dict()
    assert "| 1 | fire | fire |" in (made.folder / "README.md").read_text("utf-8")
    assert json.loads(export_coco(found, tmp_path / "a/b/coco.json").read_text())["images"] == []


WINDOW = al.load_pipeline("tiny", device="cpu").tokenizer.model_max_length
CUT = "a house " + "and a tree " * (WINDOW // 3 - 1) + "with fire"  # as many tokens, start and end among them, are read


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": ("a {thing} with smoke",)}, "class 'fire': no prompt has the word 'fire'"),
        ({"prompts": ("a {thing} with fire and fire",)}, "'fire' is 2 times in 'a house with fire and fire'"),
        ({"prompts": (CUT, "a {thing} with fire")}, f"class 'fire': 'fire' lies outside the {WINDOW} tokens"),
        ({"map": "ovam", "classes": {"fire": CUT}}, f"the window {WINDOW}"),
        ({"map": "ovam", "context": CUT + " {}"}, f"the window {WINDOW}"),
        ({"map": "linear", "classes": {"fire": CUT}}, f"the window {WINDOW}"),
        ({"map": "ovam", "context": "x{}"}, "put spaces around {}"),
        ({"propagate": 1, "attention": 7}, "7"),
        ({"steps": 1001}, "steps is 1001: the model was trained with 1000"),
        ({"scheduler": "LCMScheduler", "steps": 51}, "51 steps of LCMScheduler) failed"),
        ({"scheduler": "PNDMScheduler", "steps": 3}, "3 steps of PNDMScheduler) failed"),
        ({"model": "nosuch"}, "no model 'nosuch'"),
        ({"filters": Filters(clip="tests")}, "no CLIP model 'tests'"),
        ({"filters": Filters(clip=str(al.pipelines.BUNDLED / "tiny"))}, "no CLIP model"),
        ({"filters": Filters(clip=str(al.pipelines.BUNDLED / "tiny/text_encoder"))}, "no CLIP model"),
    ],
)
def test_what_cannot_be_made_is_refused_before_there_is_a_folder(tmp_path, change, message):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        generate_dataset(replace(FIRE, **change), tmp_path / "out")
    assert message in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:the prompt fills the model's window")
def test_words_at_the_end_of_the_window_are_in_it(tmp_path):
    prompt = "and " * (WINDOW - 5) + "a house with"
    assert len(al.load_pipeline("tiny", device="cpu").tokenizer(prompt).input_ids) == WINDOW
    recipe = replace(FIRE, prompts=(prompt,), lists={}, classes={"house": "house"}, filters=OPEN)
    assert len(generate_dataset(recipe, tmp_path / "in")) == 1
    with pytest.raises(ValueError, match=f"'house' lies outside the {WINDOW} tokens"):
        generate_dataset(replace(recipe, prompts=("and and " + prompt,)), tmp_path / "out")


def test_folders_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is a file: name a new or empty folder"):
        generate_dataset(FIRE, tmp_path / "file")
    with pytest.raises(OSError, match=r"cannot write to .*file/below .*: name another folder"):
        generate_dataset(FIRE, tmp_path / "file/below")
    with pytest.raises(ValueError, match="workers=0"):
        generate_dataset(FIRE, tmp_path / "out", workers=0)


@pytest.mark.parametrize("scheduler", [name for name in SCHEDULERS if name[:3] in ("DDP", "KDP", "LCM", "Uni")])
def test_a_record_depends_on_its_index_alone(tmp_path, scheduler):
    """Schedulers that draw noise at each step draw it for each image by itself."""
    recipe = replace(FIRE, scheduler=scheduler, steps=4, images=2, filters=OPEN, batch=4, guidance=2)
    together = generate_dataset(recipe, tmp_path / "together")
    alone = generate_dataset(replace(recipe, batch=1, seed=2, prompts=("a tree with fire",), lists={}), tmp_path / "1")
    for one, other in zip(together[2:4], alone, strict=True):
        assert one.metadata["seed"] == other.metadata["seed"]
        difference = np.abs(np.asarray(one.image, int) - np.asarray(other.image, int))
        assert difference.max() <= 2 and np.asarray(one.image).std() > 5


def test_the_model_computes_in_the_recipes_dtype(tmp_path):
    folders = [tmp_path / name for name in ("float32", "bfloat16")]
    pairs = [generate_dataset(replace(FIRE, dtype=folder.name, steps=1), folder)[0] for folder in folders]
    full, half = (np.asarray(pair.image, float) for pair in pairs)
    assert 0 < abs(full - half).mean() < 5
    with pytest.raises(ValueError, match="dtype is 'float61': choose one of float32, float16, bfloat16"):
        replace(FIRE, dtype="float61")
