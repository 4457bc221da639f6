"""Train `tiny-mmdit`, in which text and image attend to one another, and ship it; the same call goes on.

    python -m experiments.bundled.train_mmdit --compiled       # on 2 cores: 81 minutes
    python -m experiments.bundled.train_mmdit --compiled --preset finish --start runs/mmdit-cpu/models/tiny-mmdit \\
        --out attnlab/models                                   # and then an hour
    python -m experiments.bundled.train_mmdit --preset gpu --minutes 6  # after which it pauses with a checkpoint
    python -m experiments.bundled.evaluate tiny-mmdit          # once it is in attnlab/models
    python -m experiments.studies.joint_maps                   # which of its layers, steps and shares

Its autoencoder, tokenizer and latents are those of `tiny-plain`, the tokens of its text encoder begin as those of that
model, and no mask takes part. A checkpoint is written every two minutes, so that a call which was killed loses no more.
It is trained twice: its image has tokens of 2 x 2 latents first, with which a step is faster, and then of one.
"""

import argparse
import logging
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from attnlab import training
from attnlab.pipelines import BUNDLED, best_device
from attnlab.storage import File, claim_folder, write

from . import data, shipping, vae
from .denoiser_training import Examples, TextToImageSettings, train_together
from .flow_training import FlowTraining
from .joint_denoiser import JointDenoiser, joint_pipeline, with_patch

__all__ = ["MMDIT_NAME", "MMDIT_PRESETS", "MMDITPreset", "MMDITTraining", "main"]

MMDIT_NAME = "tiny-mmdit"
_SIDE = 64  # of a scene, in pixels
_CARD = Path(__file__).with_name("tiny_mmdit_card.md")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MMDITPreset:
    """How many scenes are learned from, the batch, and the schedule."""

    scenes: int
    batch: int
    schedule: training.Schedule
    near: int = 0  # near views beside the scenes
    patch: int = 1  # latents a side that are one token: with 2 a step is 2.4 times faster, and maps are 8 x 8
    heads: int = 3  # of 64 channels each, so 192


MMDIT_PRESETS = {
    "cpu": MMDITPreset(
        20_000,
        64,
        training.Schedule(steps=5_000, lr=2e-3, warmup=100, ema=0.998),
        near=5_000,
        patch=2,
        heads=2,
    ),
    # 4 minutes on an H200, which makes 17 steps a second, after half a minute of rendering on 16 cores
    "gpu": MMDITPreset(24_000, 128, training.Schedule(steps=4_000, lr=2e-3, warmup=300, ema=0.998)),
    "finish": MMDITPreset(
        20_000, 32, training.Schedule(steps=3_600, lr=1e-3, warmup=100, ema=0.999, seed=1), near=15_000, heads=2
    ),
}


@dataclass(frozen=True)
class MMDITTraining:
    """The training of a joint-attention model on rendered streets."""

    preset: MMDITPreset
    work: Path  # folder of scenes, latents, the checkpoint and the curve
    models: Path  # folder of the exported model
    device: torch.device
    base: Path = BUNDLED / "tiny-plain"  # pipeline whose autoencoder and tokenizer are taken
    start: Path | None = None  # exported model that goes on
    compiled: bool = False  # whether blocks are compiled, for which a C++ compiler has to be there

    @property
    def checkpoint(self) -> Path:
        """File of the checkpoint, beside which the curve is written."""
        return self.work / "checkpoint.safetensors"

    def claim(self) -> None:
        """Make the folder this training's; ValueError if it holds another one's, before anything is rendered."""
        settings = {name: getattr(self.preset, name) for name in ("scenes", "near", "batch", "patch", "heads")}
        settings |= {"seed": self.preset.schedule.seed, "goes on": bool(self.start)}
        claim_folder(self.work, settings)  # steps and rate may change on the way

    def autoencoder(self) -> AutoencoderKL:
        """Read the autoencoder."""
        return AutoencoderKL.from_pretrained(self.base / "vae", dtype=torch.float32).to(self.device)

    def tokenizer(self) -> CLIPTokenizer:
        """Read the tokenizer."""
        return CLIPTokenizer.from_pretrained(self.base / "tokenizer")

    def examples(self) -> Examples:
        """Render and encode the training scenes, or read what an earlier call left."""
        scenes = data.training_scenes(self.work, self.preset.scenes, self.preset.near, _SIDE)
        path = self.work / "latents.safetensors"
        if not path.exists():
            autoencoder = self.autoencoder()
            latents = vae.encode_images(autoencoder, scenes.images) * autoencoder.config.scaling_factor
            write(path, "Latents", {"latents": latents}, {})
        captions = list(zip(scenes.captions, scenes.words, strict=True))
        return Examples.of(File(path, "Latents").read("latents"), captions, self.tokenizer())

    def begin(self, examples: Examples) -> FlowTraining:
        """Make the model with its starting weights, or those of the checkpoint, ready to be trained."""
        settings = TextToImageSettings(batch=self.preset.batch, grounding=0.0)
        given = examples, settings, self.preset.schedule, self.checkpoint, self.device
        run = FlowTraining(self._model(), *given)
        for block in run.model.transformer.transformer_blocks if self.compiled else ():
            block.compile()
        return run

    def train(self, deadline: float = float("inf"), interval: float = 120.0) -> None:
        """Train to the end or to `deadline`, in seconds as `time.time` counts; write checkpoints every `interval`."""
        run = self.begin(self.examples())
        train_together([run], deadline, interval)
        run.write_curve(self.work / "curve.csv")

    def _model(self) -> JointDenoiser:
        with training.seeded(self.preset.schedule.seed):
            sizes = {"patch": self.preset.patch, "heads": self.preset.heads}
            model = JointDenoiser.new(self.tokenizer(), **sizes, words=self._words())
        if self.start:
            kinds = {"transformer": SD3Transformer2DModel}
            kinds |= dict.fromkeys(("text_encoder", "text_encoder_2"), CLIPTextModelWithProjection)
            for name, kind in kinds.items():
                setattr(model, name, kind.from_pretrained(self.start / name, dtype=torch.float32))
            if model.transformer.config.patch_size != self.preset.patch:
                model.transformer = with_patch(model.transformer, self.preset.patch)
        return model

    def _words(self) -> torch.Tensor:
        """Return what the text encoder beside the autoencoder learned of each token: (token, width)."""
        encoder = CLIPTextModel.from_pretrained(self.base / "text_encoder", dtype=torch.float32)
        return encoder.embeddings.token_embedding.weight.detach()

    def export(self) -> None:
        """Write the finished model in half precision as a pipeline, its curve and its card; or say what is missing."""
        model, steps = self._model(), self.preset.schedule.steps
        done = training.load_checkpoint(self.checkpoint, {"average": model})["done"]
        if done < steps:
            _log.warning("%s is at step %d of %d: not exported; the same call goes on", MMDIT_NAME, done, steps)
            return
        folder, part = self.models / MMDIT_NAME, self.work / "exported"
        shutil.rmtree(part, ignore_errors=True)
        self.write_pipeline(model, part)
        curves = [self.start / "curve.csv"] if self.start else []
        shipping.thin_curve([*curves, self.work / "curve.csv"], part / "curve.csv")
        shutil.copy(_CARD, part / "README.md")  # without what was measured of earlier weights
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists():
            shutil.rmtree(folder)
        shutil.move(part, folder)
        _log.info("%s is in %s", MMDIT_NAME, folder)

    def write_pipeline(self, model: JointDenoiser, folder: Path) -> None:
        """Write a model as the pipeline that draws with it, in half precision."""
        pipe = joint_pipeline(model, self.tokenizer(), self.autoencoder()).to(torch.float16)
        pipe.save_pretrained(folder)
        shipping.forget_origin(folder)
        for part in ("tokenizer", "tokenizer_2"):  # for readers that do not know tokenizer.json
            for name in ("vocab.json", "merges.txt"):
                shutil.copy(self.base / "tokenizer" / name, folder / part / name)


def main(arguments: Sequence[str] | None = None) -> None:
    start, device = time.time(), best_device()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=MMDIT_PRESETS, default="gpu" if device == "cuda" else "cpu")
    parser.add_argument("--work", type=Path, help="scenes, checkpoint and curve go here; default runs/mmdit-PRESET")
    parser.add_argument(
        "--out", type=Path, help="the exported model goes here; default: models in the folder of --work"
    )
    parser.add_argument("--start", type=Path, help="folder of an exported model that goes on")
    for name in ("scenes", "near", "batch", "patch", "heads", "steps", "seed", "lr"):
        parser.add_argument(f"--{name}", type=float if name == "lr" else int, help="in place of the preset's")
    parser.add_argument("--compiled", action="store_true", help="compile blocks: 1.2 times as fast on a CPU")
    parser.add_argument("--device", default=device)
    parser.add_argument("--minutes", type=float, default=math.inf, help="after which the training pauses")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    preset, changed = MMDIT_PRESETS[given.preset], {k: v for k, v in vars(given).items() if v is not None}
    schedule = replace(preset.schedule, **{k: changed[k] for k in ("steps", "seed", "lr") if k in changed})
    sizes = {k: changed[k] for k in ("scenes", "near", "batch", "patch", "heads") if k in changed}
    preset = replace(preset, schedule=schedule, **sizes)
    work = given.work or Path("runs") / f"mmdit-{given.preset}"
    models, device = given.out or work / "models", torch.device(given.device)
    run = MMDITTraining(preset, work, models, device, start=given.start, compiled=given.compiled)
    run.claim()
    run.train(start + 60 * given.minutes)
    run.export()


if __name__ == "__main__":
    main()
