"""Load a pipeline: the bundled model by name, a folder, or a model of the Hugging Face hub."""

import logging
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

__all__ = ["BUNDLED", "best_device", "bundled", "load_parts", "load_pipeline", "seed"]

BUNDLED = Path(__file__).parent / "models"
_DTYPES = ("float32", "float16", "bfloat16")


def load_pipeline(
    name: str | Path = "tiny",
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    **options,
) -> DiffusionPipeline:
    """Load a diffusers pipeline, ready to generate.

    Parameters
    ----------
    name : str or Path
        A bundled model ("tiny"), a folder saved by `save_pretrained`, or the hub id of a model
        ("stable-diffusion-v1-5/stable-diffusion-v1-5"). A bundled name goes before a folder: write "./tiny" for that.
    device : str or torch.device, optional
        Default: a GPU if there is one, else the CPU.
    dtype : torch.dtype or str, optional
        torch.bfloat16, or its name, "bfloat16". Default: float16 on a GPU, float32 on the CPU.
    **options
        As in `DiffusionPipeline.from_pretrained`, for example `revision=`, `safety_checker=None`.

    Raises
    ------
    FileNotFoundError
        If there is no such folder, or it holds no pipeline.
    ConnectionError
        If the hub could not be reached and the model is not in the local cache.
    ValueError
        If there is no such type.
    """
    device = torch.device(device or best_device())
    if isinstance(dtype, str) and dtype:
        if dtype not in _DTYPES:
            raise ValueError(f"dtype={dtype!r}: choose one of {', '.join(_DTYPES)}")
        dtype = getattr(torch, dtype)
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.float16)
    source = _source(name)
    # a download takes long and shows its progress, a folder does not
    with _quiet(bars=not isinstance(source, Path)), _reaching(source):
        pipe = DiffusionPipeline.from_pretrained(source, dtype=dtype, use_safetensors=True, **options)
    # what recordings note: the name as given, not where it lies
    pipe.register_to_config(_name_or_path=str(name), _revision=options.get("revision"))
    return pipe.to(device)


def load_parts(name: str | Path, parts: Sequence[str]) -> dict[str, object]:
    """Load some parts of a pipeline on the CPU in float32, and nothing else: {"tokenizer": ..., ...}.

    Parameters
    ----------
    name
        As in `load_pipeline`, whose errors are raised.
    parts : sequence of str
        Their names; a part that the pipeline does not have is None.
    """
    source = _source(name)
    with _reaching(source):
        config = DiffusionPipeline.load_config(source)
    without = {part: None for part, value in config.items() if isinstance(value, list) and part not in parts}
    pipe = load_pipeline(name, device="cpu", **without)
    return {part: getattr(pipe, part, None) for part in parts}


def seed(number: int) -> torch.Generator:
    """Return a seeded generator, on the CPU so that every device draws the same: `pipe(..., generator=seed(7))`."""
    return torch.Generator().manual_seed(number)


def best_device() -> str:
    """Return "cuda", "mps" or "cpu": the first that works here."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def bundled() -> dict[str, Path]:
    """Return the folders of the bundled pipelines by name."""
    return {path.name: path for path in BUNDLED.glob("*/") if (path / "model_index.json").exists()}


def _source(name: str | Path) -> Path | str:
    """Return the folder that holds a pipeline, or the hub id as it is."""
    known = bundled()
    if name in known:
        return known[name]
    folder, text = Path(name).expanduser(), str(name)
    if folder.is_dir():
        if not (folder / "model_index.json").exists():
            raise FileNotFoundError(f"{folder} is no pipeline: model_index.json is missing (use pipe.save_pretrained)")
        return folder
    if isinstance(name, str) and text.count("/") == 1 and text[0] not in "./~":  # looks like a hub id
        return text
    raise FileNotFoundError(
        f"no model {text!r}: neither bundled ({', '.join(sorted(known)) or 'none found'}), nor a folder, "
        "nor a hub id of the form owner/name"
    )


@contextmanager
def _reaching(source: Path | str):
    """Say what to do where a model of the hub cannot be had; errors of a folder stay as they are."""
    try:
        yield
    except OSError as error:
        if isinstance(source, Path):
            raise
        raise ConnectionError(
            f"could not get {source!r} from the Hugging Face hub, and it is not whole in the local cache. "
            "Check the spelling and the connection (a gated model needs `hf auth login`). Without a network, use "
            'load_pipeline("tiny"), or the path of a folder to which the pipeline was saved.'
        ) from error


@contextmanager
def _quiet(bars: bool):
    """Silence the warning of transformers that torchvision is missing and, without `bars`, progress bars."""
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
