"""What a generation is asked for is checked before it starts."""

import re

import pytest
from conftest import PROMPT
from diffusers import LCMScheduler
from small_pipelines import OTHER, PROMPT as SAID, SMALL
from test_recording import clone

import attnlab as al
from attnlab.recording.checks import check_generation, generation_arguments, own_size

OWN_SIZE = {"hidream", "flux_kontext", "qwen_image_edit", "kandinsky5"}  # which choose among sizes of their own
JOINT = {"flux", "sd3", "qwen_image", "z_image", "lumina_next"}  # some of those whose image and text meet


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"prompt": " "}, "prompt: text=' ': give at least one word"),
        ({"prompt": "fire " * 60}, "would fall outside"),
        ({"words": ["smoke", "zebra"]}, "word: 'zebra' is not in the text; its words are 'a', 'burning'"),
        ({"prompt": "a car and a car", "words": ["car"]}, "word: 'car' occurs 2 times"),
        ({"words": [2.5]}, "word: ask by word"),
        ({"steps": 0}, "steps is 0: a whole number from 1 on"),
        ({"steps": True}, "steps is True: a whole number from 1 on"),
        ({"steps": 1001}, "steps is 1001: DDIMScheduler cannot make so many"),
        ({"guidance": float("nan")}, "guidance is nan: a number from 0 to 1000"),
        ({"guidance": -1}, "guidance is -1: a number from 0 to 1000"),
        ({"guidance": 1e9}, "guidance is 1000000000.0: a number from 0 to 1000"),
        ({"guidance": "4"}, "guidance is '4': a number from 0 to 1000"),
        ({"seed": -1}, "seed is -1: a whole number from 0"),
        ({"seed": 2**63}, "a whole number from 0 to 2**63 - 1"),
        ({"size": 60}, "size is 60: a multiple of 8 up to 256, or 0 for the model's own, 64"),
        ({"size": -8}, "size is -8: a multiple of 8"),
        ({"size": 264}, "size is 264: a multiple of 8 up to 256"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_right(pipe, asked, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        check_generation(pipe, **({"prompt": PROMPT} | asked))


def test_everything_that_is_wrong_is_said_at_once(pipe):
    with pytest.raises(ValueError) as error:
        check_generation(pipe, PROMPT, ["zebra", "lion"], steps=-1, seed=0.5)
    assert [line.split()[1] for line in str(error.value).splitlines()[1:]] == ["word:", "word:", "steps", "seed"]


def test_what_can_be_generated_passes_and_the_scheduler_stays_as_it_was(pipe):
    before = pipe.scheduler.timesteps.tolist()
    check_generation(
        pipe, PROMPT, ["smoke", ("a", 0), 1, "burning house"], steps=1000, guidance=0, seed=2**63 - 1, size=256
    )
    assert pipe.scheduler.timesteps.tolist() == before


def test_the_scheduler_itself_says_how_many_steps_it_makes(pipe, monkeypatch):
    monkeypatch.setattr(pipe, "scheduler", LCMScheduler.from_config(pipe.scheduler.config))
    check_generation(pipe, PROMPT, steps=50)
    with pytest.raises(ValueError, match="steps is 60: LCMScheduler cannot make so many"):
        check_generation(pipe, PROMPT, steps=60)


def test_a_pipeline_that_cannot_be_recorded_is_refused():
    with pytest.raises(TypeError, match="cannot be recorded"):
        check_generation(object(), PROMPT)


@pytest.mark.parametrize(("known", "own"), [(16, 64), ((16, 24), 96), (None, 512)])
def test_the_models_own_size_in_every_form(pipe, known, own):
    """One number, height and width, or nothing, as in some of SDXL's configurations: then it is SDXL's 128."""
    other = clone(pipe)
    other.unet.register_to_config(sample_size=known)
    assert own_size(other) == own
    check_generation(other, PROMPT, size=4 * own)
    with pytest.raises(ValueError, match=f"up to {4 * own}, or 0 for the model's own, {own}"):
        check_generation(other, PROMPT, size=4 * own + 8)


@pytest.mark.parametrize("family", SMALL)
def test_what_passes_is_generated_in_every_family(family):
    """The arguments of a pipeline, the multiple that its error names, and words that it will have."""
    pipe, call = SMALL[family]()
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="size is 3: a multiple of") as error:
        check_generation(pipe, SAID, ["burning house"], steps=3, size=3)
    assert str(error.value).count("\n") == 1, "the size alone is wrong"
    size = 4 * int(re.search(r"multiple of (\d+)", str(error.value))[1])
    check_generation(pipe, SAID, ["burning house"], steps=3, size=size)
    given = {name: call[name] for name in call if name not in ("guidance_scale", "true_cfg_scale", "negative_prompt")}
    with al.record(pipe) as recording:
        image = pipe(**given | generation_arguments(pipe, SAID, steps=3, size=size), generator=al.seed(0))[0][0]
    assert recording[0].trace.steps == [0, 1, 2] and "burning house" in al.daam(recording[0])
    if family == "animate_diff":
        assert len(recording) == len(image) == call["num_frames"] and image[0].size == (size, size)
    else:
        assert image.size == (size, size) or family in OWN_SIZE


@pytest.mark.parametrize("family", ["flux_distilled", "qwen_image", "pixart_sigma", "hunyuan_image"])
def test_guidance_is_told_by_the_pipelines_own_name_for_it(family):
    """FLUX is told a number, Qwen-Image needs a negative prompt as well, HunyuanImage has a guider of its own."""
    pipe, _ = SMALL[family]()
    found = generation_arguments(pipe, SAID, guidance=2.5, size=32)
    expected = {
        "flux_distilled": {"guidance_scale": 2.5},
        "qwen_image": {"true_cfg_scale": 2.5, "negative_prompt": " "},
        "pixart_sigma": {"guidance_scale": 2.5, "use_resolution_binning": False, "clean_caption": False},
        "hunyuan_image": {},
    }
    assert found == {"prompt": SAID, "num_inference_steps": 20, "height": 32, "width": 32, **expected[family]}
    assert generation_arguments(pipe, SAID, negative=OTHER)["negative_prompt"] == OTHER
    assert "height" not in generation_arguments(pipe, SAID), "its own size is the pipeline's to choose"


def test_a_negative_prompt_is_refused_where_there_is_none():
    pipe, _ = SMALL["sana_sprint"]()
    assert "negative_prompt" not in generation_arguments(pipe, SAID)
    with pytest.raises(ValueError, match="SanaSprintPipeline takes no negative prompt, so 'a red tree'"):
        generation_arguments(pipe, SAID, negative=OTHER)


@pytest.mark.parametrize("family", sorted(JOINT - {"lumina_next"}))
def test_texts_that_do_not_fit_are_refused_before_any_work_where_image_and_text_meet(family):
    pipe, _ = SMALL[family]()
    pipe.transformer.register_forward_hook(lambda *_: pytest.fail("the denoiser ran"))
    check_generation(pipe, SAID, texts=[OTHER])
    with pytest.raises(ValueError, match="text: the model reads no word from 'tree' on"):
        check_generation(pipe, SAID, texts=[OTHER, "tree " * 600])


def test_other_texts_are_refused_of_a_model_that_reads_none():
    pipe, _ = SMALL["lumina_next"]()
    with pytest.raises(TypeError, match="no other text fits an image"):
        check_generation(pipe, SAID, texts=[OTHER])


def test_other_texts_that_fit_pass(pipe):
    check_generation(pipe, PROMPT, texts=[OTHER, "a zebra"])
    with pytest.raises(ValueError, match=r"text: .*would fall outside"):
        check_generation(pipe, PROMPT, texts=[OTHER, "tree " * 60])
    small, _ = SMALL["pixart_sigma"]()
    check_generation(small, SAID, texts=[OTHER])


def test_a_schedule_that_shifts_with_the_size_counts_its_steps(pipe):
    """FLUX's scheduler wants to know the size; the check is about the number of steps."""
    small, _ = SMALL["flux"]()
    small.scheduler = small.scheduler.from_config(small.scheduler.config, use_dynamic_shifting=True)
    check_generation(small, SAID, steps=50)
    with pytest.raises(ValueError, match="steps is 0: a whole number from 1 on"):
        check_generation(small, SAID, steps=0)
