"""Train the bundled models from nothing, stage by stage; an interrupted stage is continued.

    python -m experiments.bundled.train_street vae              # images to latents of a quarter of their side
    python -m experiments.bundled.train_street denoiser         # attention grounded in exact masks: `tiny`
    python -m experiments.bundled.train_street denoiser-plain   # the same by the diffusion loss alone: `tiny-plain`
    python -m experiments.bundled.train_street segmenter        # the reference segmenter
    python -m experiments.bundled.train_street export           # half-precision weights and curves

Several stages may be named at once; both denoisers are trained side by side then, which fills a GPU better. The preset
is "gpu" where there is one, with larger batches. Exported models go to the run's own folder: to make them the bundled
ones, give `--out attnlab/models`. On 2 cores set GOMP_CPU_AFFINITY="0 1" OMP_PROC_BIND=true.
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
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from attnlab import training
from attnlab.scenes import street
from attnlab.segmentation import Segmenter
from attnlab.storage import File, write

from . import data, shipping, street_segmenter, text_encoder as text, vae
from .denoiser_training import DenoiserTraining, Examples, TextToImageSettings, train_together
from .text_to_image import TextToLatent, new_scheduler

__all__ = ["DENOISERS", "SIZE", "STREET_PRESETS", "StreetPreset", "StreetTraining", "main"]

_log = logging.getLogger(__name__)
DENOISERS = {"denoiser": "tiny", "denoiser-plain": "tiny-plain"}  # stage -> bundled model


@dataclass(frozen=True)
class StreetPreset:
    """The training scenes, the batches, and the schedule of each part."""

    scenes: int
    settings: TextToImageSettings
    vae: training.Schedule
    vae_batch: int
    denoiser: training.Schedule
    segmenter: training.Schedule
    near: int = 0  # near views beside the scenes, for the denoisers


STREET_PRESETS = {
    "cpu": StreetPreset(
        scenes=48_000,
        settings=TextToImageSettings(batch=32),
        vae=training.Schedule(steps=3_500, lr=2e-3, weight_decay=0.0),
        vae_batch=16,
        denoiser=training.Schedule(steps=10_000, lr=1e-3, ema=0.9985),
        segmenter=training.Schedule(steps=1_200, lr=2e-3),
    ),
    "gpu": StreetPreset(
        scenes=48_000,
        settings=TextToImageSettings(batch=128),
        vae=training.Schedule(steps=2_500, lr=2e-3, weight_decay=0.0, checkpoint=500),
        vae_batch=64,
        denoiser=training.Schedule(steps=2_255, lr=1e-3, ema=0.998),
        segmenter=training.Schedule(steps=1_500, lr=2e-3, checkpoint=500),
    ),
    "finish": StreetPreset(
        scenes=24_000,
        settings=TextToImageSettings(batch=32),
        vae=training.Schedule(steps=3_500, lr=1e-3, weight_decay=0.0),
        vae_batch=16,
        denoiser=training.Schedule(steps=4_000, lr=6e-4, ema=0.998, seed=1),
        segmenter=training.Schedule(steps=1_200, lr=1e-3),
    ),
}
SIZE = 64  # side of a scene in pixels


@dataclass(frozen=True)
class StreetTraining:
    """The training of all street models."""

    preset: StreetPreset
    work: Path  # folder of scenes, checkpoints and curves
    models: Path  # folder of exported models
    device: torch.device
    start: Path | None = None  # folder of exported models whose autoencoder is kept and whose denoisers go on
    text_layers: int = 1  # of the text encoders; a start of fewer gets those that it lacks
    anew: bool = False  # whether denoisers begin from nothing all the same

    @property
    def scenes(self) -> data.Scenes:
        """The training scenes of the autoencoder and the segmenter."""
        return data.cached_scenes(self.work, 0, self.preset.scenes, SIZE)

    @property
    def all_scenes(self) -> data.Scenes:
        """The training scenes of the denoisers: those, and near views."""
        return data.training_scenes(self.work, self.preset.scenes, self.preset.near, SIZE)

    @property
    def autoencoder(self) -> AutoencoderKL:
        """The trained autoencoder."""
        folder = self.start / DENOISERS["denoiser"] / "vae" if self.start else self.work / "vae" / "model"
        return AutoencoderKL.from_pretrained(folder, dtype=torch.float32).to(self.device)

    def vae(self) -> None:
        """Train the autoencoder."""
        model = vae.train_vae(self.scenes, self.preset.vae, self.work / "vae", self.device, self.preset.vae_batch)
        model.save_pretrained(self.work / "vae" / "model")
        (self.work / "latents.safetensors").unlink(missing_ok=True)  # those of an earlier autoencoder

    def latents(self) -> torch.Tensor:
        """Encode the training scenes, or read what an earlier run left: (scene, channel, row, column)."""
        path, autoencoder = self.work / "latents.safetensors", self.autoencoder
        if not path.exists():
            latents = vae.encode_images(autoencoder, self.all_scenes.images) * autoencoder.config.scaling_factor
            write(path, "Latents", {"latents": latents}, {})
        return File(path, "Latents").read("latents")

    def train_denoisers(self, stages: Sequence[str], deadline: float = float("inf")) -> None:
        """Train denoisers and their text encoders; the plain one differs by the weight of grounding alone."""
        scenes, preset = self.all_scenes, self.preset
        tokenizer = self._tokenizer(scenes.captions)
        captions = list(zip(scenes.captions, scenes.words, strict=True))
        examples = Examples.of(self.latents(), captions, tokenizer, scenes.labels).to(self.device)
        runs = []
        for stage in stages:
            settings = preset.settings if stage == "denoiser" else replace(preset.settings, grounding=0.0)
            with training.seeded(preset.denoiser.seed):
                model = self._exported(stage) if self.start and not self.anew else self._new(tokenizer)
            path = self.work / stage / "checkpoint.safetensors"
            path.parent.mkdir(exist_ok=True)
            runs.append(DenoiserTraining(model, examples, settings, preset.denoiser, path, self.device))
        train_together(runs, deadline)
        for run in runs:
            run.write_curve(run.path.parent / "curve.csv")

    def _tokenizer(self, captions: Sequence[str]) -> CLIPTokenizer:
        if not self.start:
            return text.train_tokenizer(captions, self.work / "tokenizer")
        tokenizer = CLIPTokenizer.from_pretrained(self.start / DENOISERS["denoiser"] / "tokenizer")
        shutil.copytree(self.start / DENOISERS["denoiser"] / "tokenizer", self.work / "tokenizer", dirs_exist_ok=True)
        return tokenizer

    def _new(self, tokenizer: CLIPTokenizer) -> TextToLatent:
        return TextToLatent.new(tokenizer, text_layers=self.text_layers)

    def _exported(self, stage: str) -> TextToLatent:
        folder = self.start / DENOISERS[stage]
        text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
        text_encoder = text.deepen(text_encoder, self.text_layers)
        return TextToLatent(text_encoder, UNet2DConditionModel.from_pretrained(folder / "unet", dtype=torch.float32))

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
            shipping.forget_origin(folder)
            shipping.thin_curve([self.work / "segmenter" / "curve.csv"], folder / "curve.csv")

    def _export_pipeline(self, stage: str, folder: Path) -> None:
        tokenizer = CLIPTokenizer.from_pretrained(self.work / "tokenizer")
        model = self._new(tokenizer)
        done = training.load_checkpoint(self.work / stage / "checkpoint.safetensors", {"average": model})["done"]
        if done < self.preset.denoiser.steps:
            steps = self.preset.denoiser.steps
            _log.warning("%s is at step %d of %d: not exported; the same call goes on", stage, done, steps)
            return
        from diffusers import StableDiffusionPipeline  # only here: its import warns of torchvision, which is not wanted

        pipe = StableDiffusionPipeline(
            vae=self.autoencoder,
            text_encoder=model.text_encoder,
            tokenizer=tokenizer,
            unet=model.unet,
            scheduler=new_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).to(torch.float16)
        pipe.save_pretrained(folder)
        shipping.forget_origin(folder)
        for name in ("vocab.json", "merges.txt"):  # for readers that do not know tokenizer.json
            shutil.copy(self.work / "tokenizer" / name, folder / "tokenizer" / name)
        curves, own = [self.work / stage / "curve.csv"], self.work / "vae" / "curve.csv"
        if self.start:
            before = self.start / DENOISERS[stage]
            curves, own = curves if self.anew else [before / "curve.csv", *curves], before / "vae" / "curve.csv"
        shipping.thin_curve(curves, folder / "curve.csv")
        shipping.thin_curve([own], folder / "vae" / "curve.csv")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=("vae", *DENOISERS, "segmenter", "export"), metavar="STAGE")
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--preset", choices=STREET_PRESETS, default="gpu" if on_gpu else "cpu")
    parser.add_argument("--work", type=Path, help="scenes, checkpoints and curves go here; default runs/tiny-PRESET")
    parser.add_argument("--out", type=Path, help="exported models go here; default: models in the folder of --work")
    parser.add_argument("--start", type=Path, help="folder of exported models from which the denoisers go on")
    parser.add_argument(
        "--text-layers", type=int, default=1, help="of the text encoders, default 1; a start may lack some"
    )
    parser.add_argument("--steps", type=int, help="of the denoisers, in place of the preset's")
    parser.add_argument("--seed", type=int, help="of the denoisers' batches and starts, in place of the preset's")
    parser.add_argument("--anew", action="store_true", help="of --start keep the autoencoder and the tokenizer alone")
    parser.add_argument("--scenes", type=int, help="to learn from, in place of the preset's")
    parser.add_argument("--near", type=int, help="near views to learn from beside the scenes, default 0")
    parser.add_argument("--price", type=float, help="of attention that is not on the start token, default 0")
    parser.add_argument("--contextless", type=float, help="share of texts that bypass the encoder's layers")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--minutes", type=float, default=math.inf, help="after which the denoisers pause")
    start, given = time.time(), parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    work = given.work or Path("runs") / f"tiny-{given.preset}"
    places = work, given.out or work / "models", torch.device(given.device), given.start, given.text_layers
    preset = STREET_PRESETS[given.preset]

    def changed(*names):
        return {name: value for name in names if (value := getattr(given, name)) is not None}

    denoiser = replace(preset.denoiser, **changed("steps", "seed"))
    settings = replace(preset.settings, **changed("price", "contextless"))
    preset = replace(preset, denoiser=denoiser, settings=settings, **changed("scenes", "near"))
    run = StreetTraining(preset, *places, anew=given.anew)
    for stage in ("vae", "denoisers", "segmenter", "export"):
        if stage == "denoisers" and (stages := [one for one in DENOISERS if one in given.stages]):
            run.train_denoisers(stages, start + 60 * given.minutes)
        elif stage in given.stages:
            getattr(run, stage)()


if __name__ == "__main__":
    main()
