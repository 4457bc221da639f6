"""One file as most people have it: written here in the layout of the original Stable Diffusion, and loaded back."""

import re

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from test_families import build

import attnlab as al
from attnlab.recording.texts import TextEncoder

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
UNET = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2", "conv_norm_out": "out.0",
    "conv_out": "out.2", "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}  # fmt: skip
OPEN_CLIP = {
    "text_model.embeddings.token_embedding": "token_embedding", "text_model.final_layer_norm": "ln_final",
    "text_model.encoder.layers": "transformer.resblocks", "layer_norm1": "ln_1", "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj",
}  # fmt: skip


def unet_names(unet):
    """{diffusers' name: original name} of a U-Net's tensors."""
    count, renamed = unet.config.layers_per_block + 1, {}
    for name in unet.state_dict():
        old = name
        for new, original in UNET.items():
            old = re.sub(rf"^{re.escape(new)}\b", original, old)
        old = re.sub(
            r"^down_blocks\.(\d+)\.(resnets|attentions)\.(\d+)",
            lambda m: f"input_blocks.{int(m[1]) * count + int(m[3]) + 1}.{int(m[2] == 'attentions')}",
            old,
        )
        old = re.sub(
            r"^down_blocks\.(\d+)\.downsamplers\.0\.conv", lambda m: f"input_blocks.{(int(m[1]) + 1) * count}.0.op", old
        )
        deep = count + 1  # layers in an up block
        old = re.sub(
            r"^up_blocks\.(\d+)\.(resnets|attentions)\.(\d+)",
            lambda m, n=deep - 1: f"output_blocks.{int(m[1]) * n + int(m[3])}.{int(m[2] == 'attentions')}",
            old,
        )
        plain = [kind.startswith("UpBlock") for kind in unet.config.up_block_types]
        old = re.sub(
            r"^up_blocks\.(\d+)\.upsamplers\.0",
            lambda m, plain=plain: f"output_blocks.{(int(m[1]) + 1) * count - 1}.{1 if plain[int(m[1])] else 2}",
            old,
        )
        if "resnets" in name:
            for new, original in RESNET.items():
                old = old.replace(f".{new}.", f".{original}.")
        renamed[name] = f"model.diffusion_model.{old}"
    return renamed


def vae_names(vae):
    last, renamed = len(vae.config.up_block_types) - 1, {}
    for name in vae.state_dict():
        old = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        old = re.sub(r"encoder\.down_blocks\.(\d+)\.resnets", r"encoder.down.\1.block", old)
        old = re.sub(r"encoder\.down_blocks\.(\d+)\.downsamplers\.0", r"encoder.down.\1.downsample", old)
        old = re.sub(r"decoder\.up_blocks\.(\d+)\.resnets", lambda m: f"decoder.up.{last - int(m[1])}.block", old)
        old = re.sub(
            r"decoder\.up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"decoder.up.{last - int(m[1])}.upsample", old
        )
        old = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", old)
        if "attentions" in old:
            old = old.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
            old = re.sub(r"to_([qkv])\.", r"\1.", old).replace("to_out.0", "proj_out")
        renamed[name] = f"first_stage_model.{old}"
    return renamed


def open_clip(encoder):
    """Tensors of SDXL's second text encoder as OpenCLIP has them: queries, keys and values in one."""
    weights = encoder.state_dict()
    found = {"positional_embedding": weights.pop("text_model.embeddings.position_embedding.weight")}
    found["text_projection"] = weights.pop("text_projection.weight").T
    for name in [name for name in weights if "q_proj" in name]:
        joined = torch.cat([weights.pop(name.replace("q_proj", f"{one}_proj")) for one in "qkv"])
        weights[name.replace("self_attn.q_proj.", "attn.in_proj_")] = joined
    for name, tensor in weights.items():
        for new, original in OPEN_CLIP.items():
            name = name.replace(new, original)
        found[name] = tensor
    return {f"conditioner.embedders.1.model.{name}": tensor for name, tensor in found.items()}


def original(pipe):
    """All tensors of a pipeline in one dict, by the names of the original layout."""
    weights = {new: pipe.unet.state_dict()[name] for name, new in unet_names(pipe.unet).items()}
    for name, new in vae_names(pipe.vae).items():
        tensor = pipe.vae.state_dict()[name]
        linear = "attentions" in name and "group_norm" not in name and tensor.ndim == 2
        weights[new] = tensor[..., None, None] if linear else tensor
    xl = getattr(pipe, "text_encoder_2", None)
    prefix = "conditioner.embedders.0.transformer." if xl else "cond_stage_model.transformer."
    for name, tensor in pipe.text_encoder.state_dict().items():
        weights[f"{prefix}text_model.{name.removeprefix('text_model.')}"] = tensor
    return weights | (open_clip(xl) if xl else {})


def run(pipe):
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "pt", "generator": al.seed(7)}
    return pipe("a burning house", **call).images


@pytest.fixture(scope="module", params=["1.x", "XL"])
def files(request, pipe, tmp_path_factory):
    """(pipeline, its .safetensors file, a folder of its configuration without weights)."""
    kind = StableDiffusionXLPipeline if request.param == "XL" else StableDiffusionPipeline
    made, folder = kind(**build(request.param, pipe.tokenizer)), tmp_path_factory.mktemp("single")
    made.save_pretrained(folder / "config")
    for weights in (folder / "config").glob("*/*.safetensors"):
        weights.unlink()
    save_file({name: tensor.contiguous() for name, tensor in original(made).items()}, folder / "model.safetensors")
    return made, folder / "model.safetensors", folder / "config"


def test_it_is_the_same_pipeline(files):
    made, file, config = files
    loaded = al.load_pipeline(file, config=config, device="cpu")
    assert type(loaded) is type(made) and loaded.name_or_path == str(file)
    assert torch.equal(run(loaded), run(made))
    with al.record(loaded) as recording:
        run(loaded)
    assert recording.metadata["model"] == str(file) and al.daam(recording)["house"].any()
    half = al.load_pipeline(str(file), config=str(config), device="cpu", torch_dtype=torch.bfloat16)
    assert {part.dtype for part in (half.unet, half.vae, half.text_encoder)} == {torch.bfloat16}


def test_what_a_file_lacks_is_said(files, tmp_path):
    _, file, config = files
    weights = load_file(file)
    for start, message in (
        ("model.diffusion_model.middle_block.0.in_layers", "or not whole"),
        ("first_stage_model.", "or not whole"),
        ("cond", "or not whole"),
        ("model.", "has no tensors model.diffusion_model..., so it is no checkpoint"),
    ):
        save_file({n: x for n, x in weights.items() if not n.startswith(start)}, tmp_path / "less.safetensors")
        with pytest.raises(ValueError, match=message):
            al.load_pipeline(tmp_path / "less.safetensors", config=config, device="cpu")


def test_a_configuration_of_another_model_is_refused(files):
    _, file, config = files
    with pytest.raises(ValueError, match="is not as the configuration tiny says, or not whole"):
        al.load_pipeline(file, config="tiny", device="cpu")
    for wrong in (config / "unet", config / "nowhere", file):
        with pytest.raises((OSError, ValueError), match=r"model_index|no model|configuration"):
            al.load_pipeline(file, config=wrong, device="cpu")


def test_without_a_hub_it_asks_for_a_configuration(files, tmp_path, monkeypatch):
    """The one that fits is told by the tensors; the cache is empty, and there is no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    fits = r"model\.safetensors is stable-diffusion-v1-5/stable-diffusion-v1-5, of which not all can be had"
    with pytest.raises(ConnectionError, match=rf"{fits}.* Give config=, a folder with model_index\.json"):
        al.load_pipeline(files[1], device="cpu", cache_dir=tmp_path)


def test_texts_of_a_recorded_file(files, tmp_path, monkeypatch):
    """A file knows its configuration only by the hub: the pipeline's own encoder is given."""
    _, file, config = files
    loaded = al.load_pipeline(file, config=config, device="cpu")
    with al.record(loaded) as recording:
        run(loaded)
    path = recording.save(tmp_path / "recording")
    again = al.Recording.load(path, TextEncoder.of(loaded))
    assert again.prompt == recording.prompt and al.ovam(again, "a tree")["tree"].any()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises((ConnectionError, ValueError), match="the configuration"):
        al.ovam(al.Recording.load(path), "a tree")


def test_a_checkpoint_that_is_a_pickle(files, tmp_path):
    """It is not opened; the command that the message gives converts it."""
    made, file, config = files
    pickled = tmp_path / "old model.ckpt"
    torch.save({"state_dict": load_file(file) | {"step": 3}, "epoch": 1}, pickled)
    with pytest.raises(ValueError, match="as a pickle, which can run any code, and is not opened") as refused:
        al.load_pipeline(pickled)
    exec(re.search(r'python -c "(.*)"', str(refused.value))[1], {})
    converted = al.load_pipeline(pickled.with_suffix(".safetensors"), config=config, device="cpu")
    assert torch.equal(run(converted), run(made))
