"""Learned words: they stand where words do, keep to their model, and survive a file."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import attnlab as al
from attnlab.recording.texts import TextEncoder


@pytest.fixture
def smoke(recording):
    """The word "smoke" as a token of the bundled model."""
    return al.Token("thing", recording.encoder.embed("smoke"), 0.5, metadata={"model": "tiny"})


def test_a_token_stands_where_a_word_does(recording, smoke):
    linear = al.linear_daam(recording)
    np.testing.assert_allclose(linear[smoke], linear["smoke"] + 0.5, atol=1e-6)
    tree = al.Token("tree", recording.encoder.embed("tree"), metadata={"model": "tiny"})
    maps = al.ovam(recording, [tree, smoke])
    expected = al.ovam(recording, torch.stack([tree.value, smoke.value])).values
    np.testing.assert_array_equal(maps[smoke], expected[1])
    np.testing.assert_array_equal(maps["thing"], maps[smoke])
    assert smoke in maps and al.Token("other", smoke.value) not in maps
    np.testing.assert_array_equal(al.ovam(recording, ["tree", smoke])["tree"], expected[0])
    assert al.dbscan_mask(linear[smoke]).any()


def test_a_token_brings_its_background(recording, smoke):
    both = al.Token("thing", smoke.value, background=al.Token("rest", recording.encoder.embed("a house")))
    maps = al.ovam(recording, both)
    np.testing.assert_array_equal(maps[both], al.ovam(recording, [both.background, both])["thing"])
    np.testing.assert_allclose(maps[both] + maps["rest"], 1, atol=1e-5)
    with pytest.raises(ValueError, match="1 everywhere: give a background"):
        al.ovam(recording, smoke)


def test_names_of_several_words(recording, smoke):
    red = al.Token("a red thing", smoke.value, background=al.Token("the rest", recording.encoder.embed("tree")))
    maps = al.ovam(recording, red)
    assert maps["a red thing"].shape == maps[red].shape == (16, 16)


def test_labels_give_a_pixel_to_one_class_or_none():
    matrix = torch.eye(4).repeat(1, 1)  # four pixels, each a direction of its own
    linear = al.LinearMap(matrix, torch.zeros(4), (2, 2))
    tokens = {"a": al.Token("a", torch.tensor([2.0, 1, -1, -1])), "b": al.Token("b", torch.tensor([1.0, 2, -1, 3]))}
    assert linear.labels(tokens, 2).tolist() == [[1, 2], [0, 2]]
    for count in (0, 255):  # in uint8 the last ones would be ignored, or other classes
        with pytest.raises(ValueError, match=f"{count} tokens: give 1 to 254"):
            linear.labels({str(i): tokens["a"] for i in range(count)}, 2)
    assert linear.labels({str(i): tokens["a"] for i in range(254)}, 2).max() == 1


@pytest.mark.parametrize(
    ("token", "says"),
    [
        (
            al.Token("cat", torch.ones(768), metadata={"model": "sd"}),
            r"of sd, text width 768: .* fit tiny, text width 128",
        ),
        (al.Token("cat", torch.ones(128), metadata={"model": "other/tiny-plain"}), "of other/tiny-plain, .* fit tiny,"),
    ],
)
def test_a_token_of_another_model_is_refused(recording, token, says):
    for use in (lambda: al.linear_daam(recording)[token], lambda: al.ovam(recording, [token, token])):
        with pytest.raises(ValueError, match=says):
            use()


def test_other_settings_warn(recording):
    token = al.Token(
        "cat", torch.ones(128), metadata={"model": "tiny", "layers": ["a"], "size": [16, 16], "heads": None}
    )
    with pytest.warns(UserWarning, match="other layers: its zero level does not hold") as caught:
        al.linear_daam(recording)[token]
    assert caught[0].filename == __file__


def test_a_token_is_a_row_of_numbers():
    for value in (torch.ones(2, 3), torch.tensor([1.0, torch.nan]), torch.ones(0)):
        with pytest.raises(ValueError, match="row of finite numbers"):
            al.Token("cat", value)
    for value in ("ones", None, [[1], [2]], ["a"]):
        with pytest.raises(ValueError, match="row of finite numbers"):
            al.Token("cat", value)
    for background in (al.Token("rest", torch.ones(2)), "rest"):
        with pytest.raises(ValueError, match="the background of token 'cat' is a token of the same text width, 3"):
            al.Token("cat", torch.ones(3), background=background)
    with pytest.raises(ValueError, match="a library holds tokens, not 'cat'"):
        al.TokenLibrary(["cat"])


def test_a_token_has_a_name_and_a_bias():
    for name, bias in ((None, 0.0), ("", 0.0), ("cat", float("nan")), ("cat", "0"), ("cat", None)):
        with pytest.raises(ValueError, match="a name and a finite bias"):
            al.Token(name, torch.ones(3), bias)


def test_the_metadata_of_a_token_is_a_dict():
    for metadata in (None, [], {"model": 3}):
        with pytest.raises(ValueError, match="is a dict with the model's name"):
            al.Token("cat", torch.ones(3), metadata=metadata)


def test_the_name_of_a_background_is_taken(smoke, tmp_path):
    library = al.TokenLibrary([smoke, al.Token("thing/background", smoke.value)])
    with pytest.raises(ValueError, match="give the token another name"):
        library.save(tmp_path / "x.safetensors")


def test_a_library_survives_its_file(smoke, tmp_path):
    rest = al.Token("rest", -smoke.value, metadata={"model": "tiny"})
    metadata = {"model": "tiny", "losses": [0.5, 0.25], "size": [16, 16]}
    library = al.TokenLibrary([smoke, al.Token("traffic light", 2 * smoke.value, -1.5, rest, metadata)])
    path = library.save(tmp_path / "street.safetensors")
    again = al.TokenLibrary.load(path)
    assert list(again) == ["thing", "traffic light"] and len(list(tmp_path.iterdir())) == 1
    light = again["traffic light"]
    assert torch.equal(light.value, 2 * smoke.value) and light.bias == -1.5 and light.metadata == metadata
    assert light.background.name == "rest" and torch.equal(light.background.value, -smoke.value)
    with pytest.raises(KeyError, match="no token 'cat'; the library has 'thing', 'traffic light'"):
        again["cat"]
    with pytest.raises(ValueError, match="does not fit"):
        again.add(al.Token("cat", torch.ones(64)))


def test_plain_files_of_embeddings_are_read(tmp_path):
    path = tmp_path / "tokens.safetensors"
    save_file({"cat": torch.ones(768), "background": torch.zeros(768)}, path, {"model": "stable-diffusion-v1-5"})
    library = al.TokenLibrary.load(path)
    assert library["cat"].metadata == {"model": "stable-diffusion-v1-5"} and library["cat"].bias == 0
    assert al.TokenLibrary.load(path, model="mine")["cat"].metadata["model"] == "mine"
    save_file({"cat": torch.ones(2, 768)}, path)
    with pytest.raises(ValueError, match=r"tokens are \(text width,\) each"):
        al.TokenLibrary.load(path)


def test_tokens_as_ovam_published_them(recording, tmp_path):
    """An .npy file: a background and a token, or a token alone. Pickled ones are not opened."""
    rows = np.random.default_rng(0).normal(size=(2, 128)).astype(np.float32)
    np.save(tmp_path / "cat.npy", rows)
    cat = al.TokenLibrary.load(tmp_path / "cat.npy", model="tiny")["cat"]
    assert cat.value.tolist() == rows[1].tolist() and cat.background.value.tolist() == rows[0].tolist()
    np.testing.assert_array_equal(al.ovam(recording, cat)["cat"], al.ovam(recording, torch.from_numpy(rows))[1])
    np.save(tmp_path / "dog.npy", rows[1])
    dog = al.TokenLibrary.load(tmp_path / "dog.npy")["dog"]
    assert dog.value.tolist() == rows[1].tolist() and dog.background is None and dog.metadata == {}


class Armed:
    def __reduce__(self):
        return pytest.fail, ("something was unpickled",)


def test_what_is_no_token_of_ovams(tmp_path):
    path = tmp_path / "tokens.npy"
    for pickled in (np.array(Armed(), object), np.array([{"cat": Armed()}], object)):
        np.save(path, pickled, allow_pickle=True)
        with pytest.raises(ValueError, match=r"is a pickle, .* is not opened: .* save each of its tokens alone"):
            al.TokenLibrary.load(path)
    ones = np.ones((2, 8))
    for bad in (np.ones((3, 8)), np.ones((1, 2, 8)), ones.astype(int), ones * np.nan, np.ones(()), ones[:, :0]):
        np.save(path, bad)
        with pytest.raises(ValueError, match="tokens"):
            al.TokenLibrary.load(path)
    np.save(path, ones)
    whole = path.read_bytes()
    for damaged in (whole[:-8], b"", b"x" * 200, whole.replace(b"(2, 8)", b"(2, 8000000000000)"), whole[:20]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"tokens\.npy is damaged"):
            al.TokenLibrary.load(path)
    with pytest.raises(FileNotFoundError):
        al.TokenLibrary.load(tmp_path / "none.npy")


def test_bad_files(recording, smoke, tmp_path):
    with pytest.raises(FileNotFoundError, match="no file"):
        al.TokenLibrary.load(tmp_path / "none.safetensors")
    other = al.linear_daam(recording).save(tmp_path / "linear.safetensors")
    with pytest.raises(ValueError, match="holds LinearMap, not a TokenLibrary"):
        al.TokenLibrary.load(other)
    path = al.TokenLibrary([smoke]).save(tmp_path / "cut.safetensors")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        al.TokenLibrary.load(path)


def test_a_model_is_known_by_its_last_name(recording, smoke):
    for model in ("elsewhere/tiny", "/models/tiny", None):
        al.linear_daam(recording)[al.Token("thing", smoke.value, metadata={"model": model})]


def test_published_tokens_work_on_a_model_of_their_width(tmp_path):
    """A random-weight pipeline of Stable Diffusion 1.5's text width, and a file as OVAM's are."""
    pipe = _wide_pipeline()
    path, generator = tmp_path / "ovam.safetensors", al.seed(1)
    published = {name: torch.randn(768, generator=generator) for name in ("background", "cat")}
    save_file(published, path, {"model": "stable-diffusion-v1-5", "source": "vpulab/ovam"})
    library = al.TokenLibrary.load(path)
    with al.record(pipe) as recording:
        embeds = torch.randn(1, 77, 768, generator=al.seed(0))
        pipe(
            prompt_embeds=embeds, negative_prompt_embeds=embeds, num_inference_steps=2, output_type="latent",
            height=64, width=64, generator=al.seed(0),
        )  # fmt: skip
    maps = al.ovam(recording, list(library.values()))
    np.testing.assert_allclose(maps["cat"] + maps["background"], 1, atol=1e-5)
    assert al.linear_daam(recording)[library["cat"]].shape == maps["cat"].shape


def _wide_pipeline():
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=32, block_out_channels=(32, 32), layers_per_block=1, cross_attention_dim=768, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
                        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4)  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae,
        None,
        None,
        unet,
        DDIMScheduler(steps_offset=1, clip_sample=False),
        None,
        None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_an_encoder_that_was_copied_knows_its_tokens(pipe, smoke, tmp_path):
    folder = tmp_path / "copies" / "tiny"
    pipe.save_pretrained(folder)
    encoder = TextEncoder.named(folder)
    assert al.nearest_words(al.Token("x", encoder.embed("smoke"), metadata={"model": "tiny"}), encoder, count=1) == [
        ("smoke", pytest.approx(1, abs=1e-5))
    ]
    shutil.rmtree(folder)


def test_metadata_is_json(recording, smoke, tmp_path):
    mask = np.zeros((16, 16), bool)
    mask[:5, :5] = True
    token = al.fit_token(recording, [mask], "smoke")
    assert json.loads(json.dumps(token.metadata)) == token.metadata
