"""Train the bundled model from nothing, stage by stage; a stage that is done or interrupted is continued.

    python -m attnlab.tiny.train --work runs/tiny vae           # 64 x 64 -> 16 x 16 x 4
    python -m attnlab.tiny.train --work runs/tiny denoiser
    python -m attnlab.tiny.train --work runs/tiny export        # to attnlab/tiny/models/tiny, fp16
    python -m attnlab.tiny.train --work runs/tiny oracle        # a segmenter, to attnlab/tiny/models/oracle

On 2 cores set GOMP_CPU_AFFINITY="0 1" OMP_PROC_BIND=true.
"""

import argparse
import json
import logging
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from transformers import CLIPTokenizer

from ..pipelines import load_oracle
from ..scenes import street
from . import data, denoiser, loop, oracle, text, vae

log = logging.getLogger(__name__)
MODELS = Path(__file__).parent / "models"
SIZE, SCENES = 64, 48_000
VAE = loop.Schedule(steps=3_500, rate=2e-3, weight_decay=0.0)
ORACLE = loop.Schedule(steps=1_000, rate=2e-3)
DENOISER = loop.Schedule(steps=4_600, rate=1e-3, ema=0.9985)


def run_vae(work: Path) -> None:
    scenes = data.cached(work, 0, SCENES, SIZE)
    model = vae.train_vae(scenes, VAE, work / "vae")
    model.save_pretrained(work / "vae" / "model")
    held_out = data.cached(work, street.HELD_OUT, 500, SIZE)
    log.info("PSNR on %d held-out scenes: %.2f dB", len(held_out), vae.psnr(model, held_out.images))


def run_oracle(work: Path) -> None:
    """Train the segmenter, measure it on held-out scenes, sharp and as the VAE restores them, and write it out."""
    scenes = data.cached(work, 0, SCENES, SIZE)
    autoencoder = AutoencoderKL.from_pretrained(work / "vae" / "model")
    model = oracle.train_oracle(scenes, oracle.restore(autoencoder, scenes.images[:6000]), ORACLE, work / "oracle")
    folder = MODELS / "oracle"
    model.to(torch.float16).save_pretrained(folder)
    (folder / "classes.json").write_text(json.dumps(street.CLASSES) + "\n")
    held_out = data.cached(work, street.HELD_OUT, 500, SIZE)
    for name, images in (("sharp", held_out.images), ("restored", oracle.restore(autoencoder, held_out.images))):
        log.info("%s: %s", name, json.dumps(oracle.measure(load_oracle(), images, held_out.labels), indent=1))


def run_denoiser(work: Path) -> None:
    scenes = data.cached(work, 0, SCENES, SIZE)
    tokenizer = text.train_tokenizer(scenes.captions, work / "tokenizer")
    autoencoder = AutoencoderKL.from_pretrained(work / "vae" / "model")
    batches = denoiser.Batches.of(scenes, autoencoder, tokenizer, cache=work / "latents.npy")
    model = denoiser.train_denoiser(batches, denoiser.Recipe(), DENOISER, work / "denoiser")
    model.text_encoder.save_pretrained(work / "denoiser" / "text_encoder")
    model.unet.save_pretrained(work / "denoiser" / "unet")


def export(work: Path) -> None:
    """Write the whole pipeline in half precision to attnlab/tiny/models/tiny."""
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    average = torch.load(work / "denoiser" / "checkpoint.pt", map_location="cpu", weights_only=True)["average"]
    model = denoiser.TextToLatent(tokenizer, side=SIZE // 4)
    model.load_state_dict({k.removeprefix("module."): v for k, v in average.items() if k.startswith("module.")})
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(work / "vae" / "model"),
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        unet=model.unet,
        scheduler=denoiser.new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(torch.float16)
    pipe.save_pretrained(MODELS / "tiny")
    for name in ("vocab.json", "merges.txt"):  # for readers that do not know tokenizer.json
        shutil.copy(work / "tokenizer" / name, MODELS / "tiny" / "tokenizer" / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("vae", "denoiser", "export", "oracle"))
    parser.add_argument("--work", type=Path, default=Path("runs/tiny"), help="scenes, checkpoints and curves go here")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    {"vae": run_vae, "denoiser": run_denoiser, "export": export, "oracle": run_oracle}[arguments.stage](arguments.work)


if __name__ == "__main__":
    main()
