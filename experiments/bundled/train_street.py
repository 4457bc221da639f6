"""Train the bundled models from nothing, stage by stage; an interrupted stage is continued.

    python -m experiments.bundled.train_street vae              # images to latents of a quarter of their side
    python -m experiments.bundled.train_street denoiser         # attention grounded in exact masks: `tiny`
    python -m experiments.bundled.train_street denoiser-plain   # the same by the diffusion loss alone: `tiny-plain`
    python -m experiments.bundled.train_street segmenter        # the reference segmenter
    python -m experiments.bundled.train_street export           # half-precision weights, curves: attnlab/models

With `--preset gpu`, scenes of 128 pixels and larger batches, exported to the run's own folder.
On 2 cores set GOMP_CPU_AFFINITY="0 1" OMP_PROC_BIND=true.
"""

import argparse
import logging
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTokenizer

from attnlab import training
from attnlab.pipelines import BUNDLED
from attnlab.scenes import street
from attnlab.segmentation import Segmenter

from . import data, shipping, street_segmenter, text_encoder as text, text_to_image as denoiser, vae

__all__ = ["DENOISERS", "STREET_PRESETS", "StreetPreset", "StreetTraining", "main"]

_log = logging.getLogger(__name__)
DENOISERS = {"denoiser": "tiny", "denoiser-plain": "tiny-plain"}  # stage -> bundled model


@dataclass(frozen=True)
class StreetPreset:
    """The training scenes, the size of the denoiser, and the schedule of each part."""

    size: int  # side of a scene in pixels
    scenes: int
    channels: tuple[int, ...]  # of the denoiser
    settings: denoiser.TextToImageSettings
    vae: training.Schedule
    denoiser: training.Schedule
    segmenter: training.Schedule


STREET_PRESETS = {
    "cpu": StreetPreset(
        size=64,
        scenes=48_000,
        channels=(64, 96, 160),
        settings=denoiser.TextToImageSettings(batch=32),
        vae=training.Schedule(steps=3_500, lr=2e-3, weight_decay=0.0),
        denoiser=training.Schedule(steps=10_000, lr=1e-3, cycles=2, ema=0.9985),
        segmenter=training.Schedule(steps=1_200, lr=2e-3),
    ),
    "gpu": StreetPreset(
        size=128,
        scenes=100_000,
        channels=(64, 96, 160),
        settings=denoiser.TextToImageSettings(batch=256),
        vae=training.Schedule(steps=12_000, lr=1e-3, weight_decay=0.0),
        denoiser=training.Schedule(steps=20_000, lr=1e-3, ema=0.9995),
        segmenter=training.Schedule(steps=3_000, lr=2e-3),
    ),
}


@dataclass(frozen=True)
class StreetTraining:
    """The training of all street models."""

    preset: StreetPreset
    work: Path  # folder of scenes, checkpoints and curves
    models: Path  # folder of exported models
    device: torch.device

    @property
    def scenes(self) -> data.Scenes:
        """The training scenes."""
        return data.cached_scenes(self.work, 0, self.preset.scenes, self.preset.size)

    @property
    def autoencoder(self) -> AutoencoderKL:
        """The trained autoencoder."""
        return AutoencoderKL.from_pretrained(self.work / "vae" / "model").to(self.device)

    @property
    def latents(self) -> Path:
        """File of the latents of the training scenes."""
        return self.work / "latents.npy"

    def vae(self) -> None:
        """Train the autoencoder."""
        model = vae.train_vae(self.scenes, self.preset.vae, self.work / "vae", self.device)
        model.save_pretrained(self.work / "vae" / "model")
        self.latents.unlink(missing_ok=True)  # those of an earlier autoencoder

    def train_denoiser(self, stage: str) -> None:
        """Train the denoiser and its text encoder; the plain one differs by the weight of grounding alone."""
        scenes = self.scenes
        tokenizer = text.train_tokenizer(scenes.captions, self.work / "tokenizer")
        batches = denoiser.Batches.of(scenes, self.autoencoder, tokenizer, cache=self.latents)
        settings = self.preset.settings if stage == "denoiser" else replace(self.preset.settings, grounding=0.0)
        with training.seeded(self.preset.denoiser.seed):
            model = denoiser.TextToLatent.new(tokenizer, self.preset.size // 4, self.preset.channels).to(self.device)
        denoiser.train_denoiser(model, batches, settings, self.preset.denoiser, self.work / stage)

    def segmenter(self) -> None:
        """Train the reference segmenter."""
        scenes, folder = self.scenes, self.work / "segmenter"
        restored = street_segmenter.restore(self.autoencoder, scenes.images[:6000])
        model = street_segmenter.train_street_segmenter(scenes, restored, self.preset.segmenter, folder, self.device)
        Segmenter(model, street.CLASSES).save_pretrained(folder / "model")

    def export(self) -> None:
        """Write every finished model in half precision, and the curves of its training beside it."""
        for stage, name in DENOISERS.items():
            if (self.work / stage / "checkpoint.safetensors").exists():
                self._export_pipeline(stage, self.models / name)
        if (self.work / "segmenter" / "model").exists():
            folder = self.models / "street-segmenter"
            Segmenter.from_pretrained(self.work / "segmenter" / "model").save_pretrained(folder, torch.float16)
            shipping.thin_curve(self.work / "segmenter" / "curve.csv", folder / "curve.csv")

    def _export_pipeline(self, stage: str, folder: Path) -> None:
        steps, average = shipping.averaged(self.work / stage)
        if steps < self.preset.denoiser.steps:
            _log.warning("%s is at step %d of %d: not exported", stage, steps, self.preset.denoiser.steps)
            return
        from diffusers import StableDiffusionPipeline  # only here: its import warns of torchvision, which is not wanted

        tokenizer = CLIPTokenizer.from_pretrained(self.work / "tokenizer")
        model = denoiser.TextToLatent.new(tokenizer, self.preset.size // 4, self.preset.channels)
        model.load_state_dict(average)
        pipe = StableDiffusionPipeline(
            vae=AutoencoderKL.from_pretrained(self.work / "vae" / "model"),
            text_encoder=model.text_encoder,
            tokenizer=tokenizer,
            unet=model.unet,
            scheduler=denoiser.new_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).to(torch.float16)
        pipe.save_pretrained(folder)
        for name in ("vocab.json", "merges.txt"):  # for readers that do not know tokenizer.json
            shutil.copy(self.work / "tokenizer" / name, folder / "tokenizer" / name)
        shipping.thin_curve(self.work / stage / "curve.csv", folder / "curve.csv")
        shipping.thin_curve(self.work / "vae" / "curve.csv", folder / "vae" / "curve.csv")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("vae", *DENOISERS, "segmenter", "export"))
    parser.add_argument("--preset", choices=STREET_PRESETS, default="cpu")
    parser.add_argument("--work", type=Path, help="scenes, checkpoints and curves go here; default runs/tiny-PRESET")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    work = given.work or Path("runs") / f"tiny-{given.preset}"
    models = BUNDLED if given.preset == "cpu" else work / "models"
    run = StreetTraining(STREET_PRESETS[given.preset], work, models, torch.device(given.device))
    run.train_denoiser(given.stage) if given.stage in DENOISERS else getattr(run, given.stage)()


if __name__ == "__main__":
    main()
