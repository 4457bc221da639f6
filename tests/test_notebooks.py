"""Each notebook keeps the conventions of the house and runs to its end."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import papermill
import pytest
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from small_pipelines import SMALL
from transformers import CLIPTextModelWithProjection

import attnlab as al
from attnlab.cli.runner import read_parameters, run_notebook
from attnlab.training import seeded
from experiments.bundled.text_encoder import new_text_encoder

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
# Parameters that make a run short: {"04_dbscan_masks": {"steps": 4}}
QUICK = {
    "00_train_tiny_model": {"scenes": 10, "each": 1, "steps": 2},
    "01_generate_and_record": {"steps": 6, "rounds": 2},
    "02_open_vocabulary_maps": {"steps": 6},
    "03_token_optimization": {"images": 4, "steps": 6, "epochs": 20},
    "04_dbscan_masks": {"steps": 10},
    "05_disaster_dataset": {"images": 1, "steps": 4},
    "06_joint_image_mask_diffusion": {"samples": 8, "steps": 6},
    "07_thesis_figures": {"images": 3, "epochs": 10, "steps": 3, "training": [1]},
    "08_benchmarks": {"geometry": "tiny", "size": 64, "recorded": 8, "pairs": 1},
    "09_maps_and_masks": {"scenes": 6, "shown": 4, "shots": 2},
    "10_few_shot_tokens": {"scenes": 40, "tests": 2, "training": 24, "shots": [1], "draws": [1], "published": []},
    "11_reach_of_tokens": {
        "images": 4,
        "steps": 6,
        "scenes": 40,
        "tests": 2,
        "training": 24,
        "many": 24,
        "shots": 1,
        "compared": 20,
    },
    "12_own_photos": {"scenes": 3, "looks": 3},
    "13_joint_attention": {"scenes": 2, "shown": 2, "shots": 1, "steps": 3, "asked": ["a river"]},
    "14_published_protocols": {"scenes": 6},
}
# The same for models that attnlab does not bundle, of random weights: Stable Diffusion 1.5, and others in OTHERS
FOREIGN = {
    "01_generate_and_record": {"steps": 2, "rounds": 1},
    "02_open_vocabulary_maps": {"steps": 2},
    "03_token_optimization": {"steps": 2, "images": 2, "epochs": 2},
    "04_dbscan_masks": {"steps": 2},
    "05_disaster_dataset": {"steps": 1, "images": 1},
    "12_own_photos": {"photos": str(FOLDER.parent / "figures/04_image.png"), "looks": 2},
    "13_joint_attention": {"steps": 2, "asked": ["a river"]},
    "14_published_protocols": {"images": str(FOLDER.parent / "tests/data/two_scenes")},
}
OTHERS = [
    ("sdxl", 64, "01_generate_and_record"),
    ("flux", 32, "01_generate_and_record"),
    ("pixart_sigma", 32, "01_generate_and_record"),
    ("pixart_sigma", 32, "02_open_vocabulary_maps"),
    ("flux", 32, "13_joint_attention"),
    ("flux", 32, "14_published_protocols"),
]
OF_UNETS = [stem for stem in FOREIGN if stem != "13_joint_attention"]
# What cannot be done, by notebook: what is typed, and what is said before any work
U_NETS = ("00", "09", "10", "11")  # notebooks that compare the two bundled U-Nets
REFUSED = [
    ("00", {"model": "nosuch"}, "name two of the bundled U-Nets"),
    *((number, {"model": "tiny-mmdit"}, "name two of the bundled U-Nets, tiny, tiny-plain") for number in U_NETS),
    ("03", {"model": "tiny-mmdit"}, "tiny-mmdit has joint attention"),
    ("07", {"model": "tiny-mmdit"}, "has no U-Net, which the thesis is about"),
    ("00", {"steps": 0}, "steps"),
    ("01", {"word": "zebra"}, "'zebra' is not in the text"),
    ("01", {"model": "nosuch"}, "no model 'nosuch'"),
    ("02", {"negative": ""}, "a negative prompt with a word"),
    ("03", {"word": "zebra"}, "the reference segmenter knows sky"),
    ("04", {"prompt": "", "steps": 0, "size": 7}, "- prompt: text='': give at least one word\n- steps is 0"),
    ("04", {"level": 7.0}, "level"),
    ("05", {"method": "nosuch"}, "nosuch"),
    ("06", {"model": "aerial-x2"}, "this notebook is about rendered land"),
    ("07", {"training": [0]}, "training=[0]"),
    ("08", {"dtype": "float61"}, "float32, float16 or bfloat16"),
    ("09", {"word": "zebra"}, "the rendered scenes show"),
    ("10", {"shots": [40], "draws": [1], "training": 20}, "40 are wanted"),
    ("11", {"word": "zebra"}, "the reference segmenter knows sky"),
    ("12", {"photos": "nosuch"}, "name a photo, a folder"),
    ("12", {"words": {"zebra": "zebra"}}, "scenes are rendered for bundled models alone, and show sky"),
    ("12", {"model": "nosuch"}, "no model 'nosuch'"),
    ("13", {"model": "nosuch"}, "no model 'nosuch'"),
    ("13", {"model": "tiny"}, "tiny has no joint attention"),
    ("13", {"plain": "tiny-mmdit"}, "tiny-mmdit has joint attention, too"),
    ("13", {"words": ["zebra"]}, "the rendered scenes show"),
    ("13", {"words": ["smoke"]}, "- word: 'smoke' is not in the text"),
    ("13", {"asked": []}, "give one of each at least"),
    ("13", {"scenes": 1}, "scenes=1: give a whole number, 2 or more"),
    ("14", {"images": "nosuch"}, "nosuch has neither classes.csv"),
    ("14", {"model": "nosuch/nosuch"}, "scenes are rendered for bundled models alone"),
    ("14", {"model": "nosuch", **FOREIGN["14_published_protocols"]}, "no model 'nosuch'"),
    ("14", {"cut": "most"}, "cut is 'most'"),
]

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def numbers_in(value):
    """All numbers of a metrics file, however deep."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from numbers_in(item)
    elif isinstance(value, int | float):
        yield value


def refuse(constant):
    raise ValueError(f"metrics.json holds {constant}")


def test_numbers_are_unique_and_quick_names_exist():
    numbers = [path.stem[:2] for path in NOTEBOOKS]
    assert len(numbers) == len(set(numbers)), "attnlab run NN and runs/NN need one notebook for each number"
    assert QUICK.keys() | FOREIGN.keys() <= {path.stem for path in NOTEBOOKS}


@every_notebook
def test_is_committed_stripped(path):
    check = subprocess.run([sys.executable, "-m", "nbstripout", "--verify", str(path)], capture_output=True, text=True)
    assert check.returncode == 0, f"type: nbstripout {path.relative_to(FOLDER.parent)}"


@every_notebook
def test_keeps_the_conventions(path):
    notebook = json.loads(path.read_text("utf-8"))
    cells = [
        (cell["cell_type"], "".join(cell["source"]), cell["metadata"].get("tags", [])) for cell in notebook["cells"]
    ]
    assert re.fullmatch(r"\d\d_[a-z0-9_]+", path.stem)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3", "plain papermill asks for the kernel's name"
    assert notebook["metadata"]["kernelspec"].get("language") == "python"
    assert cells[0][0] == "markdown" and cells[0][1].startswith("# "), "begins with its title"
    assert cells[-1][0] == "markdown", "ends with what to try next"
    assert sum("parameters" in tags for *_, tags in cells) == 1
    too_long = [source.splitlines()[0] for kind, source, _ in cells if kind == "code" and source.count("\n") >= 25]
    assert not too_long, "code cells of more than 25 lines: move what they define into attnlab"


@every_notebook
def test_each_parameter_is_explained(path):
    parameters = read_parameters(path)  # raises where a default is no JSON type
    assert [name for name, parameter in parameters.items() if not parameter.help] == []
    assert parameters["out"].default == f"runs/{path.stem[:2]}"
    assert set(papermill.inspect_notebook(path)) == set(parameters), "plain papermill misreads a second = in a line"
    assert QUICK.get(path.stem, {}).keys() <= parameters.keys()


@every_notebook
def test_runs_and_writes_metrics_and_figures(path, tmp_path, monkeypatch):
    folder = run_whole(path, QUICK.get(path.stem, {}), tmp_path, monkeypatch)
    for cell in json.loads((folder / path.name).read_text("utf-8"))["cells"]:
        outputs, source = cell.get("outputs", []), "".join(cell["source"])
        assert not any("warn" in "".join(output.get("text", "")).lower() for output in outputs), f"warns:\n{source}"
        shown = [set(output.get("data", {})) for output in outputs]
        assert all("image/png" in kinds for kinds in shown if any("widget" in kind for kind in kinds)), "not to be read"


def run_whole(path, values, tmp_path, monkeypatch):
    """Run a notebook to its end, and look at what it wrote and shows."""
    monkeypatch.chdir(tmp_path)  # a notebook leans on no folder but `out`
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait leave the cores to other tests
    folder, _ = run_notebook(path, values, tmp_path / "runs")
    metrics = json.loads((folder / "metrics.json").read_text("utf-8"), parse_constant=refuse)
    assert list(numbers_in(metrics)), "metrics.json holds no number"
    figures = sorted(folder.glob(f"{path.stem[:2]}_*.png"))
    assert figures, "no figure named after the notebook's number"
    for figure in figures:
        with Image.open(figure) as image:
            assert min(image.size) > 16 and len(image.convert("RGB").getcolors(1 << 24)) > 1, f"{figure.name} is blank"
    assert {item.name for item in tmp_path.iterdir()} == {"runs"}, "wrote outside `out`"
    for cell in json.loads((folder / path.name).read_text("utf-8"))["cells"]:
        outputs, source = cell.get("outputs", []), "".join(cell["source"])
        pictures = sum("image/png" in output.get("data", {}) for output in outputs)
        printed = "".join("".join(output.get("text", "")) for output in outputs)
        saved = ".png" in printed and ".save(" not in source  # a figure, not a plain image
        assert pictures == 1 or not saved, f"shows {pictures} pictures, not 1:\n{source}"
    return folder


@pytest.fixture(scope="session")
def foreign(tmp_path_factory):
    """Folders of pipelines of random weights: Stable Diffusion 1.5 and XL with an eighth of the channels, FLUX, PixArt.

    The vocabulary of the first two is tiny's.
    """
    tiny = al.load_pipeline("tiny", device="cpu").tokenizer
    tiny.model_max_length = 77
    found = {}
    with seeded(0):
        levels = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        vae = AutoencoderKL(block_out_channels=(8,) * 4, latent_channels=4, norm_num_groups=4, **levels)
        unet = {"block_out_channels": (40, 80, 160, 160), "norm_num_groups": 8, "cross_attention_dim": 96}
        parts = {"vae": vae, "tokenizer": tiny, "text_encoder": new_text_encoder(tiny, width=96)}
        parts |= {
            "scheduler": PNDMScheduler(skip_prk_steps=True, steps_offset=1),
            "unet": UNet2DConditionModel(sample_size=64, **unet),
        }
        without = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        found["sd15"] = StableDiffusionPipeline(**parts, **without)
        config = new_text_encoder(tiny, width=160).config
        config.projection_dim = 160
        unet = {
            "block_out_channels": (40, 80, 160),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 96 + 160,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 32,
            "projection_class_embeddings_input_dim": 6 * 32 + 160,
        }
        parts |= {"unet": UNet2DConditionModel(sample_size=128, norm_num_groups=8, **unet), "tokenizer_2": tiny}
        parts |= {"text_encoder_2": CLIPTextModelWithProjection(config), "scheduler": EulerDiscreteScheduler()}
        found["sdxl"] = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    found |= {name: SMALL[name]()[0] for name in ("flux", "pixart_sigma")}
    return {name: saved(pipe, tmp_path_factory.mktemp(name)) for name, pipe in found.items()}


def saved(pipe, folder):
    pipe.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(("name", "size", "stem"), [*OTHERS, *(("sd15", 64, stem) for stem in OF_UNETS)])
def test_runs_on_a_model_that_is_not_bundled(name, size, stem, foreign, tmp_path, monkeypatch):
    """Nothing of it is judged by what only knows the bundled models' images, and no scene of theirs is shown to it."""
    values = {"model": foreign[name], "size": size, "dtype": "bfloat16", **FOREIGN[stem]}
    folder = run_whole(FOLDER / f"{stem}.ipynb", values, tmp_path, monkeypatch)
    metrics = json.loads((folder / "metrics.json").read_text("utf-8"))
    assert metrics.get("by_hand_difference", 0) < 1e-5 and metrics.get("bit_exact", True)


def test_other_words_of_joint_attention_are_refused_in_the_first_cells(foreign, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="image and text attend to one another in FluxPipeline"):
        run_first_cells(FOLDER / "02_open_vocabulary_maps.ipynb", {"model": foreign["flux"], "size": 32})


@pytest.mark.parametrize("stem", FOREIGN)
def test_what_knows_rendered_scenes_alone_is_asked_about_bundled_models_alone(stem):
    """A segmenter's labels and rendered scenes stand below an `if` that asks whether the model is bundled."""
    source = "\n".join(code_of(FOLDER / f"{stem}.ipynb"))
    tree = ast.parse(source)
    guards = [node for node in ast.walk(tree) if isinstance(node, ast.If | ast.IfExp) and names_in(node.test) & GUARDS]
    guarded = {id(part) for guard in guards for part in ast.walk(guard)}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    rendered = [call for call in calls if call.func.attr in ("segment", "render", "render_with")]
    assert [ast.unparse(call) for call in rendered if id(call) not in guarded] == []
    assert all("bundled" in line for name in GUARDS for line in re.findall(rf"^{name} = .*", source, re.M))


GUARDS = {"bundled", "segmented", "known"}


def names_in(node):
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def code_of(path):
    cells = json.loads(path.read_text("utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize(("number", "values", "says"), REFUSED)
def test_what_cannot_be_done_is_refused_in_the_first_cells(number, values, says, tmp_path, monkeypatch):
    """The first cells run in this process, as a kernel would: those up to the first heading after the title."""
    path = next(path for path in NOTEBOOKS if path.stem.startswith(number))
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        run_first_cells(path, values)
    assert says in str(error.value)


def run_first_cells(path, values):
    """Run the parameters, then the code up to and with the first cell behind a heading."""
    cells = [cell for cell in json.loads(path.read_text("utf-8"))["cells"][1:]]
    headings, names = 0, {}
    for cell in cells:
        source = "".join(cell["source"])
        headings += cell["cell_type"] == "markdown"
        if headings > 1:
            return
        if cell["cell_type"] == "code":
            exec(source, names)
            names |= values if "parameters" in cell["metadata"].get("tags", []) else {}
