"""Small pipelines of all families: they run, repeat, and their pictures depend on the text."""

import pytest
import torch
from small_pipelines import OTHER, PROMPT, SMALL


@pytest.fixture(scope="module", params=SMALL)
def small(request):
    """A family's pipeline and the arguments of its calls."""
    pipe, call = SMALL[request.param]()
    pipe.set_progress_bar_config(disable=True)
    return pipe, call


def generate(small, **change):
    """Latents of a generation of two steps; what has none gives pixels."""
    pipe, call = small
    generator = torch.Generator().manual_seed(7)
    result = pipe(**call | change, num_inference_steps=2, output_type="latent", generator=generator)
    return torch.as_tensor(result[0])


def test_generates(small):
    image = generate(small)
    assert image.isfinite().all() and image.std() > 0.01


def test_image_has_eight_rows_of_twelve_tokens(small):
    shape = tuple(generate(small).shape)
    grids = ((8 * 12,), (8, 12), (16, 24))  # packed; one token a latent pixel; four latent pixels a token
    assert any(grid == shape[axis : axis + len(grid)] for grid in grids for axis in range(len(shape)))


def test_repeats_with_the_same_seed(small):
    assert torch.equal(generate(small), generate(small))


@pytest.mark.parametrize("other", [OTHER, PROMPT.removesuffix("car") + "tree"], ids=["other text", "other last word"])
def test_reads_the_prompt(small, other):
    assert small[1]["prompt"] == PROMPT
    image = generate(small)
    assert (generate(small, prompt=other) - image).abs().max() > 1e-3 * image.abs().max()


@pytest.mark.parametrize("family", SMALL)
def test_each_call_has_arguments_of_its_own(family):
    """A test that changes them must not change another's."""
    first, second = SMALL[family]()[1], SMALL[family]()[1]
    first["prompt"] = "another"
    assert second["prompt"] == PROMPT
