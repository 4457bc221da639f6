"""Tokens in output space, beside their words: fitted to some scenes, measured on others, against a draw by hand."""

import json

import numpy as np
import pytest

import attnlab as al
from attnlab import metrics, training
from attnlab.learning.fit import Whitening
from attnlab.maps import minmax
from attnlab.scenes import street
from experiments.bundled.joint_denoiser import JointDenoiser, joint_pipeline
from experiments.studies import joint_tokens
from experiments.studies.few_shot import interval_over_draws


@pytest.fixture(scope="module")
def study():
    """Two draws of one scene each, for two classes, in the last block of a small model of random weights."""
    base = al.load_pipeline("tiny-plain", device="cpu")
    with training.seeded(0):
        model = JointDenoiser.new(base.tokenizer, blocks=2, heads=1, patch=2)
        for weight in model.transformer.parameters():
            weight.data += 0.1 * training.torch.randn(weight.shape)
    pipe = joint_pipeline(model, base.tokenizer, base.vae)
    layers = joint_tokens.chosen_layers(pipe, 1, 1)
    return joint_tokens.JointTokensStudy(pipe, layers, ("building", "ground"), shots=1, draws=2, tests=8, scenes=9)


def shown(name, first):
    return [n for n in range(first, first + 9) if street.render(n).mask(name).mean() >= 0.01]


def recorded(study, number):
    scene = street.render(number)
    read = {"timesteps": (100, 300, 500), "texts": ["house", "grass"], "outputs": True, "layers": study.layers}
    return al.linear_daam(al.record_image(study.pipe, scene.image, scene.caption, generator=al.seed(number), **read))


def test_a_draw_by_hand(study):
    assert study.layers == ["transformer_blocks.1.attn"]
    rows = study.run()
    fitted, carried = joint_tokens.FIRST_FITTED, joint_tokens.FIRST_CARRIED_TO
    one, tests = shown("building", fitted)[1], shown("building", carried)[:8]  # of the second draw
    there = np.isfinite(rows["word"][:, :, 0])
    assert [list(np.flatnonzero(draw) + carried) for draw in there] == [tests] * 2
    unlabeled = Whitening.of([recorded(study, fitted + k) for k in range(9)])
    seen, truth = recorded(study, one), street.render(one).mask("building")
    token = al.fit_token([seen], [truth], "house", unlabeled=unlabeled)
    by_word = minmax(seen["house"][None], truth.shape)
    cut = metrics.best_threshold(metrics.THRESHOLDS, metrics.miou_curve(by_word, [truth]))
    for number in tests[:2]:
        maps, mask, k = recorded(study, number), street.render(number).mask("building"), number - carried
        assert rows["token above 0"][1, k, 0] == pytest.approx(
            metrics.iou(maps.upscaled(token, 64) > 0, mask), abs=0.01
        )
        assert rows["word"][1, k, 0] == pytest.approx(metrics.iou(minmax(maps["house"], 64) > cut, mask), abs=0.01)
    assert not np.array_equal(rows["token"][0], rows["token"][1], equal_nan=True)  # another draw, another scene
    found = study.summary(rows)
    assert found["IoU"]["word"] == interval_over_draws(rows["word"])
    assert found["gain over the word"]["token"] == interval_over_draws(rows["token"], rows["word"])
    assert found["classes"]["ground"]["token"] == pytest.approx(np.nanmean(rows["token"][..., 1]))
    assert joint_tokens.tokens_table(found).count("(") == 5  # three rows with intervals, two gains


def test_the_command_takes_what_joint_maps_chose(study, tmp_path, monkeypatch):
    (tmp_path / "maps.json").write_text(
        json.dumps({"model": "tiny-mmdit", "chosen": {"output": {"first": 0, "last": 1}}})
    )
    monkeypatch.setattr(joint_tokens, "JOINT_MAPS_RESULTS", tmp_path / "maps.json")
    monkeypatch.setattr(joint_tokens.al, "load_pipeline", lambda name: study.pipe)
    asked = []
    monkeypatch.setattr(joint_tokens.JointTokensStudy, "run", lambda self: asked.append(self) or {
        row: np.full((4, 240, 16), 0.5) for row in ("word", "token", "token above 0")})  # fmt: skip
    joint_tokens.main(["--out", str(tmp_path / "found.json")])
    assert list(asked[0].layers) == ["transformer_blocks.0.attn", "transformer_blocks.1.attn"]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["IoU"]["token"][0] == 0.5 and found["gain over the word"]["token"][0] == 0 and found["draws"] == 4
    with pytest.raises(ValueError, match="shots=0"):
        joint_tokens.main(["--shots", "0", "--out", str(tmp_path / "found.json")])
    with pytest.raises(ValueError, match="layers 1 to 2: the model has blocks 0 to 1"):
        joint_tokens.main(["--layers", "1", "2"])
    with pytest.raises(SystemExit):
        joint_tokens.main(["--model", "another"])
