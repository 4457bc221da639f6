"""What a generation is asked for is checked before it starts."""

import re

import pytest
from conftest import PROMPT
from diffusers import LCMScheduler
from test_recording import clone

from attnlab.recording.checks import check_generation, own_size


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
