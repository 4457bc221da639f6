"""What many tests share: the bundled pipeline, generated once, and small helpers."""

import logging
import os
import signal

import pytest
import torch
from diffusers import UNet2DConditionModel

import attnlab as al

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):  # pytest -n: processes that share the cores
    threads = max(1, (os.cpu_count() or 1) // workers)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # of what tests start
    torch.set_num_threads(threads)

PROMPT = "a burning house with smoke"
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and what it starts too


@pytest.fixture(scope="session")
def pipe():
    """The bundled model, on the CPU in float32."""
    pipe = al.load_pipeline("tiny", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def generate(pipe):
    """generate(prompt, seed=…, **call): latents of one short generation, (image, channel, row, column)."""

    def run(prompt=PROMPT, seed=7, steps=4, guidance=4.0, pipe=pipe, **call):
        call = {"output_type": "latent"} | call
        result = pipe(prompt, generator=al.seed(seed), num_inference_steps=steps, guidance_scale=guidance, **call)
        return result.images

    return run


@pytest.fixture(scope="session")
def recording(pipe, generate):
    """One recorded generation of PROMPT: 4 steps with guidance."""
    with al.record(pipe) as recording:
        generate()
    return recording


@pytest.fixture(scope="session")
def levels(pipe):
    """A pipeline like the bundled one, of random weights, which meets the text at 16, 8 and, in the middle, 4."""
    cross = {"down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"]}
    cross |= {"up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]}
    unet = UNet2DConditionModel.from_config(pipe.unet.config, mid_block_type="UNetMidBlock2DCrossAttn", **cross)
    parts = {name: part for name, part in pipe.components.items() if name != "unet"}
    other = type(pipe)(unet=unet.eval(), requires_safety_checker=False, **parts)
    other.set_progress_bar_config(disable=True)
    return other


@pytest.fixture(autouse=True)
def _no_stray_hooks(request):
    """No test may leave a hook on the shared pipeline."""
    yield
    if "pipe" in request.fixturenames:
        assert count_hooks(request.getfixturevalue("pipe")) == 0


def count_hooks(pipe) -> int:
    """attnlab's hooks on any module of the denoiser and the text encoder; libraries keep some of their own."""
    modules = [*pipe.unet.modules(), *pipe.text_encoder.modules()]
    hooks = [hook for m in modules for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return sum(hook.__module__.startswith("attnlab") for hook in hooks)


class PlainAttention:
    """Attention written out in float64, one probability tensor (batch, head, pixel, token) kept a call.

    An independent answer for what the maps should be: the model's own probabilities, as it generates.
    """

    def __init__(self, store):
        self.store = store

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (f(x).double() for f, x in ((attn.to_q, hidden_states), (attn.to_k, text), (attn.to_v, text)))
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))
        scores = q @ k.mT / q.shape[-1] ** 0.5
        if attention_mask is not None:
            scores = scores + attention_mask[:, None].double()
        probabilities = scores.softmax(-1)
        if encoder_hidden_states is not None:
            self.store.append(probabilities)
        mixed = (probabilities @ v).transpose(1, 2).flatten(2).to(hidden_states.dtype)
        return attn.to_out[1](attn.to_out[0](mixed))


@pytest.fixture
def plain_attention(pipe, levels):
    """Swap PlainAttention into every cross-attention of both; gives {layer name: [probabilities of each step]}."""
    layers = [(n, m) for one in (pipe, levels) for n, m in one.unet.named_modules() if n.endswith("attn2")]
    before = [m.processor for _, m in layers]
    stores = {n: [] for n, _ in layers}
    for name, module in layers:
        module.set_processor(PlainAttention(stores[name]))
    yield stores
    for (_, module), processor in zip(layers, before, strict=True):
        module.set_processor(processor)


@pytest.fixture(autouse=True)
def _quiet_libraries():
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    torch.manual_seed(0)  # nothing may depend on it; this makes it visible if something does
