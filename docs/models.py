"""Write the page of models that can be recorded: `python docs/models.py`, a minute. Nothing on it is written by hand.

Every line is a small pipeline of tests/small_pipelines. It is generated with, and what its recording gives is held
against a softmax in float64 by the checks of tests/small_pipelines/checks.py, which the tests use, too.
"""

import sys
import tempfile
from pathlib import Path

from attnlab.storage import write_text

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from small_pipelines import SMALL, checks  # noqa: E402 (found only now)
from small_pipelines.checks import Family  # noqa: E402

__all__ = ["COLUMNS", "PAGE", "TITLES", "line", "main", "page"]

PAGE = ROOT / "docs/models.md"
TITLES = {
    "flux": "FLUX.1 with guidance by a negative prompt",
    "flux_distilled": "FLUX.1 dev, schnell, Krea",
    "sd3": "Stable Diffusion 3, 3.5",
    "qwen_image": "Qwen-Image",
    "z_image": "Z-Image",
    "flux_fill": "FLUX.1 Fill",
    "flux_kontext": "FLUX.1 Kontext",
    "qwen_image_edit": "Qwen-Image-Edit",
    "flux2": "FLUX.2",
    "chroma": "Chroma",
    "aura_flow": "AuraFlow",
    "cogview4": "CogView4",
    "lumina2": "Lumina-Image 2",
    "hunyuan_image": "HunyuanImage 2.1",
    "hidream": "HiDream-I1",
    "pixart_alpha": "PixArt-α",
    "pixart_sigma": "PixArt-Σ",
    "pixart_pag": "PixArt-Σ with perturbed attention guidance",
    "sana": "Sana",
    "sana_sprint": "Sana Sprint",
    "hunyuan_dit": "HunyuanDiT",
    "lumina_next": "Lumina-Next",
    "kandinsky3": "Kandinsky 3",
    "kandinsky5": "Kandinsky 5, images",
    "animate_diff": "AnimateDiff, each frame",
    "kolors": "Kolors",
    "pag": "Stable Diffusion with perturbed attention guidance",
    "deepfloyd_if": "DeepFloyd IF",
}
COLUMNS = ("family", "pipeline", "denoiser", "how", "maps", "single steps", "other texts", "linear, tokens", "file")
COLUMNS += ("tested on",)
REFUSALS = ("which is not linear", "has no linear map", "reads no text without an image", "tells the time by the text")
"""What attnlab says where a model cannot give something; any other error is one."""

HEAD = """# Models that can be recorded

`al.record(pipe)` takes the pipelines of diffusers below. `python docs/models.py` made each line: a small pipeline of
the real classes, with random weights and a real tokenizer, generates an image, and what its recording gives is held
against a softmax in float64 of what the model really computed. "yes" means equal, to a millionth; "–" means that it
cannot be had, and that attnlab says so. No trained weights of these models were at hand. Stable Diffusion 1.x,
2.x and XL, from text, images and masks, are held against the same answers by `tests/test_families.py`.

- **how**: in *cross-attention* the image reads a text that stays as it is; in *joint attention* image and text read one
  another. *Timed text* is read anew at every timestep, by itself.
- **maps**: `al.daam`, of the prompt's words, with `share="text"` and `share="joint"`; the image is the same to the last
  bit as without recording.
- **single steps**: `al.daam(recording, steps=...)`, or `al.record_again` where keys change from step to step.
- **other texts**, afterwards: `al.ovam(recording, text)` in cross-attention; in joint attention and with timed text
  `al.record_again(pipe, recording, text=...)`, which takes as long as the image, twice. There the prompt is compared in
  all layers, and another text in the first one, where it has not read the image yet. Where that works,
  `al.record(pipe, texts=[...])` has texts read while the image is drawn, for `al.ovam` afterwards.
- **linear, tokens**: `al.linear_daam` (to a hundred-thousandth of its largest score), `al.fit_token`, and a recording
  of sums alone, `keep="sum"`; all of embeddings of texts. In joint attention they are of what attention gives to pixels
  and words, with `outputs=True`, as `al.concept_maps` is; `tests/test_concepts.py` holds FLUX and Stable Diffusion 3
  against float64. DeepFloyd IF has no such outputs.
- **file**: `recording.save` and `al.Recording.load` give the same maps.

`al.goca`, and `self_attention=` for `al.propagate`, are of Stable Diffusion's U-Nets, PAG among them, of AnimateDiff,
Kolors, PixArt and HunyuanDiT, and of joint attention whose text asks, too (not DeepFloyd IF). `tests/test_goca.py` and
`tests/test_transformers.py` hold them against float64.

"""


def how(family: Family) -> str:
    """Tell how the image meets the text, by what changes with either."""
    number, row = family.answer.steps[0], family.answer.rows[family.answer.steps[0]][0]
    if any(part.text != slice(None) for part in family.answer.parts(number, row).values()):
        return "joint attention"
    return "cross-attention" + ("" if family.recording[0].trace.queries else ", timed text")


def result(check, *given) -> str:
    """Return what a check says: "yes", "no", or "–" where attnlab refuses."""
    try:
        check(*given)
    except AssertionError:
        return "no"
    except (TypeError, ValueError) as refusal:
        if not any(words in str(refusal) for words in REFUSALS):
            raise
        return "–"
    return "yes"


def line(name: str) -> list[str]:
    """Return the columns of one small pipeline."""
    family = Family(name)
    with tempfile.TemporaryDirectory() as folder:
        texts = checks.check_other_texts if family.recording[0].trace.queries else checks.check_text_beside
        cells = [
            result(lambda: (checks.check_image(family), checks.check_maps(family))),
            *(result(check, family) for check in (checks.check_steps, texts, checks.check_linear)),
            result(checks.check_file, family, Path(folder)),
        ]
    return [
        TITLES[name],
        type(family.pipe).__name__,
        type(family.denoiser).__name__,
        how(family),
        *cells,
        "random weights",
    ]


def page() -> str:
    """Return the whole page."""
    rows = [COLUMNS, ["---"] * len(COLUMNS), *map(line, SMALL)]
    return HEAD + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main() -> None:
    """Write the page."""
    write_text(PAGE, page())
    print(PAGE.relative_to(ROOT))


if __name__ == "__main__":
    main()
