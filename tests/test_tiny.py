"""The bundled model and its training: resume without a jump, grounding's loss by hand, words that localize."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from attnlab.scenes import street
from attnlab.tiny import evaluate, loop
from attnlab.tiny.denoiser import grounding_loss
from attnlab.tiny.text import train_tokenizer

SCHEDULE = loop.Schedule(steps=30, rate=0.05, warmup=5, checkpoint=10)


def fit_line(folder, stop_at=None):
    """Train y = 2x - 1 from noisy batches; with `stop_at`, killed in the middle of that step."""
    model, calls = nn.Linear(1, 1), []
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)

    def loss(model, generator):
        calls.append(1)
        if stop_at is not None and len(calls) > stop_at:
            raise KeyboardInterrupt
        x = torch.randn(16, 1, generator=generator)
        return {"loss": ((model(x) - 2 * x + 1) ** 2).mean()}

    return loop.train(model, loss, SCHEDULE, folder)


def test_resumed_training_is_the_same_training(tmp_path):
    whole = fit_line(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit_line(tmp_path / "stopped", stop_at=17)  # after the checkpoint of step 10
    resumed = fit_line(tmp_path / "stopped")
    assert (tmp_path / "whole/curve.csv").read_text() == (tmp_path / "stopped/curve.csv").read_text()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    losses = np.loadtxt(tmp_path / "whole/curve.csv", delimiter=",", skiprows=1)[:, 1]
    assert len(losses) == 30 and losses[-1] < 0.5 * losses[0]


def test_grounding_loss_by_hand():
    """One word, its mask the upper half: attention spread evenly costs log 2, attention inside the mask nothing."""
    labels = torch.zeros(1, 64, 64, dtype=torch.uint8)
    labels[:, :32] = 1
    where, what = torch.tensor([[1]]), torch.tensor([[1]])
    visible, weight = torch.ones(1, 3, dtype=torch.bool), torch.ones(1)
    even = {"a": torch.zeros(1, 2, 256, 3), "b": torch.zeros(1, 2, 64, 3)}
    assert math.isclose(grounding_loss(even, labels, visible, where, what, weight), math.log(2), abs_tol=1e-3)
    inside = {name: torch.zeros_like(score) for name, score in even.items()}
    for score in inside.values():
        score[:, :, : score.shape[2] // 2, 1] = 20.0
        score[:, :, score.shape[2] // 2 :, 1] = -20.0
    assert grounding_loss(inside, labels, visible, where, what, weight) < 1e-3
    half = grounding_loss(even, labels, visible, where, what, 0.5 * weight)
    assert math.isclose(half, 0.5 * math.log(2), abs_tol=1e-3)
    for nothing in (
        {"what": torch.tensor([[-1]])},  # no class
        {"visible": torch.tensor([[True, False, True]])},  # the word is hidden
        {"labels": torch.zeros(1, 64, 64, dtype=torch.uint8)},  # the class is not in the scene
    ):
        given = {"labels": labels, "visible": visible, "where": where, "what": what, "weight": weight} | nothing
        assert grounding_loss(even, **given) == 0


def test_tokenizer_knows_the_words_it_was_trained_on(tmp_path):
    tokenizer = train_tokenizer(["a burning house", "two houses, smoke"], tmp_path)
    for word in ("a", "burning", "house", "houses", "two", "smoke", ","):
        assert len(tokenizer.tokenize(word)) == 1
    assert "".join(tokenizer.tokenize("boat")).replace("</w>", "") == "boat"
    assert {"vocab.json", "merges.txt"} <= {path.name for path in tmp_path.iterdir()}


def test_summary_by_hand():
    """Two words, each map right at 0.5 of its maximum; the threshold comes from the tuning scenes."""
    truth = np.zeros((8, 8), bool)
    truth[:4] = True
    good, bad = np.where(truth, 1.0, 0.3), np.where(truth, 0.3, 1.0)
    found = [evaluate.Case(0, "house", good, truth, bad), evaluate.Case(1, "car", good, truth, None)]
    result = evaluate.summary(found, found)
    assert 0.3 < result["threshold"] <= 1
    assert (result["word iou"], result["word pointing"]) == (1, 1)
    assert (result["shuffled word iou"], result["shuffled word pointing"]) == (0, 0)
    assert result["classes"]["car"] == {"maps": 1, "iou": 1.0, "pointing": 1.0}


def test_words_of_the_bundled_model_localize(pipe):
    """Far below the card's figures, far above the baseline: broken weights or maps would not pass."""
    found = evaluate.summary(evaluate.cases(pipe, evaluate.TUNING, 20), evaluate.cases(pipe, street.HELD_OUT, 30))
    assert found["word pointing"] > 0.75 > 0.4 > found["shuffled word pointing"]
    assert found["word iou"] > 0.4 > 0.25 > found["shuffled word iou"]
