"""Load a pipeline: the bundled model by name, a folder, or a model of the Hugging Face hub; and the bundled oracle."""

import json
import logging
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline, UNet2DModel
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

BUNDLED = Path(__file__).parent / "models"


def load_pipeline(
    name: str | Path = "tiny",
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    **options,
) -> DiffusionPipeline:
    """A diffusers pipeline, ready to generate.

    Parameters
    ----------
    name : a bundled model ("tiny"), a folder saved by `save_pretrained`, or the hub id of a model
        ("stable-diffusion-v1-5/stable-diffusion-v1-5"). A bundled name goes before a folder: write "./tiny" for that
    device : a GPU if there is one, else the CPU, unless given
    dtype : float16 on a GPU and float32 on the CPU, unless given
    options : passed on to `DiffusionPipeline.from_pretrained`, for example `revision=`, `safety_checker=None`

    Raises
    ------
    FileNotFoundError : no such folder, or a folder that holds no pipeline
    ConnectionError : the hub could not be reached and the model is not in the local cache
    """
    device = torch.device(device or best_device())
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.float16)
    source = _source(name)
    with _quiet(bars=not isinstance(source, Path)):  # a download takes long and shows its progress, a folder does not
        try:
            pipe = DiffusionPipeline.from_pretrained(source, dtype=dtype, use_safetensors=True, **options)
        except OSError as error:
            if isinstance(source, Path):
                raise
            raise ConnectionError(_unreachable(source)) from error
    # what recordings note: the name as given, not where it lies
    pipe.register_to_config(_name_or_path=str(name), _revision=options.get("revision"))
    return pipe.to(device)


def load_parts(name: str | Path, parts: Sequence[str]) -> dict[str, object]:
    """Some parts of a pipeline, those of them that it has, on the CPU in float32: {"tokenizer": ..., ...}.

    `name` and the errors are those of `load_pipeline`; nothing else is loaded.
    """
    source = _source(name)
    try:
        config = DiffusionPipeline.load_config(source)
    except OSError as error:
        if isinstance(source, Path):
            raise
        raise ConnectionError(_unreachable(source)) from error
    without = {part: None for part, value in config.items() if isinstance(value, list) and part not in parts}
    pipe = load_pipeline(name, device="cpu", **without)
    return {part: getattr(pipe, part, None) for part in parts}


class Oracle:
    """A segmenter of the rendered world: what an image shows, class by class.

    Attributes
    ----------
    classes : names behind the numbers of its labels
    """

    def __init__(self, model: UNet2DModel, classes: tuple[str, ...]):
        self.model, self.classes = model.eval(), classes

    @torch.no_grad()
    def segment(self, images, batch: int = 50) -> np.ndarray:
        """Labels uint8 (image, row, column) of images uint8 (image, row, column, rgb), or of PIL images, of one size.

        Raises
        ------
        ValueError : images of another form
        """
        pixels = np.stack([np.asarray(image) for image in images])
        if pixels.ndim != 4 or pixels.shape[3] != 3 or pixels.dtype != np.uint8:
            raise ValueError(f"images are uint8 (image, row, column, rgb), not {pixels.dtype} {pixels.shape}")
        device, labels = self.model.device, []
        for i in range(0, len(pixels), batch):
            x = torch.from_numpy(pixels[i : i + batch]).to(device, self.model.dtype).permute(0, 3, 1, 2) / 127.5 - 1
            labels.append(self.model(x, 0).sample.argmax(1).byte().cpu())
        return torch.cat(labels).numpy()


def load_oracle(device: str | torch.device | None = None) -> Oracle:
    """The bundled segmenter of rendered street scenes, for judging generated images and as a stand-in for their truth.

    `device`: a GPU if there is one, else the CPU, unless given. FileNotFoundError where its weights are missing.
    """
    folder = BUNDLED / "oracle"
    if not (folder / "classes.json").exists():
        raise FileNotFoundError(
            f"{folder} holds no oracle: install attnlab again, or train it: "
            "python -m experiments.bundled.train_street oracle"
        )
    with _quiet(bars=False):
        model = UNet2DModel.from_pretrained(folder, dtype=torch.float32)
    return Oracle(model.to(device or best_device()), tuple(json.loads((folder / "classes.json").read_text())))


def seed(number: int) -> torch.Generator:
    """A generator that repeats: `pipe(..., generator=seed(7))`; on the CPU, so that every device draws the same."""
    return torch.Generator().manual_seed(number)


def best_device() -> str:
    """ "cuda", "mps" or "cpu": the first that works here."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def bundled() -> dict[str, Path]:
    """Folders of the bundled pipelines by name."""
    return {path.name: path for path in BUNDLED.glob("*/") if (path / "model_index.json").exists()}


def _source(name: str | Path) -> Path | str:
    """A folder that holds a pipeline, or a hub id as it is."""
    known = bundled()
    if name in known:
        return known[name]
    folder, text = Path(name).expanduser(), str(name)
    if folder.is_dir():
        if not (folder / "model_index.json").exists():
            raise FileNotFoundError(
                f"{folder} holds no pipeline: model_index.json is missing (save one by pipe.save_pretrained)"
            )
        return folder
    looks_like_hub_id = isinstance(name, str) and text.count("/") == 1 and text[0] not in "./~"
    if looks_like_hub_id:
        return text
    raise FileNotFoundError(
        f"no model {text!r}: neither bundled ({', '.join(sorted(known)) or 'none found'}), nor a folder, "
        "nor a hub id of the form owner/name"
    )


def _unreachable(name):
    return (
        f"could not get {name!r} from the Hugging Face hub, and it is not whole in the local cache. "
        "Check the spelling and the connection (a gated model needs `hf auth login`). Without a network, use "
        'load_pipeline("tiny"), or the path of a folder to which the pipeline was saved.'
    )


@contextmanager
def _quiet(bars: bool):
    """No word of torchvision, which is not wanted here; without `bars`, no progress bars either."""
    logger = logging.getLogger("transformers")
    before = logger.level
    shown = [log for log in (diffusers_logging, transformers_logging) if log.is_progress_bar_enabled() and not bars]
    logger.setLevel(logging.ERROR)
    for log in shown:
        log.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(before)
        for log in shown:
            log.enable_progress_bar()
