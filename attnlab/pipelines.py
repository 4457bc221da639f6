"""Load a pipeline: the bundled model by name, a folder, one file, or a model of the Hugging Face hub."""

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from numbers import Integral
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import (
    SingleFileComponentError,
    fetch_diffusers_config,
    load_single_file_checkpoint,
)
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError, safe_open
from transformers.utils import logging as transformers_logging

__all__ = ["BUNDLED", "DTYPES", "as_device", "best_device", "bundled", "has_bfloat16", "load_parts"]
__all__ += ["load_pipeline", "mixed_precision", "seed"]

BUNDLED = Path(__file__).parent / "models"
DTYPES = ("float32", "float16", "bfloat16")  # of weights, by name
_MISFITS = (LookupError, ValueError, RuntimeError, TypeError, AttributeError, SingleFileComponentError)
_PICKLES = (".ckpt", ".pt", ".pth", ".bin")
_CONVERT_FILE = (
    "import torch, safetensors.torch as s; s.save_file({{k: v.clone(memory_format=torch.contiguous_format) for k, v in "
    "torch.load({path!r}, 'cpu', weights_only=True)['state_dict'].items() if torch.is_tensor(v)}}, {to!r})"
)
_CONVERT_FOLDER = "from diffusers import DiffusionPipeline as P; P.from_pretrained({path!r}).save_pretrained({to!r})"


def load_pipeline(
    name: str | Path = "tiny",
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    config: str | Path | None = None,
    **options,
) -> DiffusionPipeline:
    """Load a diffusers pipeline, ready to generate.

    Parameters
    ----------
    name : str or Path
        A bundled model ("tiny"), a folder saved by `save_pretrained`, a .safetensors file of Stable Diffusion or XL
        with all parts, or the hub id of a model ("stable-diffusion-v1-5/stable-diffusion-v1-5"). A bundled name goes
        before a folder: write "./tiny" for that.
    device : str or torch.device, optional
        Default: a GPU if there is one, else the CPU.
    dtype : torch.dtype or str, optional
        torch.bfloat16, or its name, "bfloat16". Default: float32 on the CPU; on a GPU float16, or bfloat16 for
        transformers, whose numbers grow too large for float16.
    config : str or Path, optional
        Of one file: folder or hub id of a pipeline made alike, whose configurations and tokenizers are read, not its
        weights. Default: that of the hub which the file's tensors tell.
    **options
        As in `DiffusionPipeline.from_pretrained`, for example `revision=`, `safety_checker=None`.

    Raises
    ------
    FileNotFoundError
        If there is no such folder or file, or it holds no pipeline, or not all of its parts.
    ConnectionError
        If the hub could not be reached and the model is not in the local cache.
    ValueError
        If weights are pickles, which could run any code, or damaged; if there is no such type, or no such device here.
    """
    dtype, named = options.pop("torch_dtype", dtype), dtype
    if named not in (None, dtype):
        raise ValueError(f"dtype={named} and torch_dtype={dtype}: give one of them")
    if options.pop("use_safetensors", None) is False:
        raise ValueError("use_safetensors=False: weights are read from safetensors alone, as pickles can run any code")
    device = as_device(device or best_device())
    dtype, source = _dtype(dtype), _source(name)
    # a download takes long and shows its progress, a folder does not
    with _quiet(bars=not isinstance(source, Path)), _reaching(source):
        dtype = dtype or _usual_dtype(source, device)
        if isinstance(source, Path) and source.is_file():
            pipe = _load_file(source, config, dtype=dtype, **options)
        else:
            if config is not None:
                raise ValueError(f"config={config} is for one .safetensors file; {name} has its own: leave it out")
            if isinstance(source, Path):
                _check_folder(source, options)
                options = _left_out(source) | options
            pipe = DiffusionPipeline.from_pretrained(source, dtype=dtype, use_safetensors=True, **options)
    # what recordings note: the name as given, not where it lies
    pipe.register_to_config(_name_or_path=str(name), _revision=options.get("revision"))
    return pipe.to(device)


def as_device(device: str | torch.device) -> torch.device:
    """Return a device by its name; ValueError where it does not work here.

    Parameters
    ----------
    device : str or torch.device
        "cpu", "cuda", "cuda:1", "mps", ...
    """
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={device!r} does not work here, {best_device()!r} does: {reason}") from error


def has_bfloat16(device: str | torch.device) -> bool:
    """Return whether a device has instructions for bfloat16.

    One without them imitates each, and takes some twenty times as long as in float32.
    """
    kind = torch.device(device).type
    if kind == "cpu":
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()  # what torch's own compiler asks
    return kind != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def mixed_precision(device: str | torch.device, **options) -> AbstractContextManager:
    """Return a block in which models compute in bfloat16, where the device has it; it changes nothing elsewhere.

    Parameters
    ----------
    device : str or torch.device
        Of the models.
    **options
        As in `torch.autocast`, for example `cache_enabled=`.
    """
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, **options) if has_bfloat16(device) else nullcontext()


def _dtype(dtype) -> torch.dtype | None:
    """Return a type of weights by itself or by its name; ValueError for what is none."""
    if isinstance(dtype, str) and dtype:
        dtype = getattr(torch, dtype) if dtype in DTYPES else dtype
    if dtype and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype={dtype!r}: choose one of {', '.join(DTYPES)}")
    return dtype or None


def _usual_dtype(source: Path | str, device: torch.device) -> torch.dtype:
    """Return the type of weights that a kind of model is used with on a device."""
    if device.type == "cpu":
        return torch.float32
    file = isinstance(source, Path) and source.is_file()  # of Stable Diffusion
    transformer = not file and "transformer" in DiffusionPipeline.load_config(source)
    return torch.bfloat16 if transformer and has_bfloat16(device) else torch.float16


def _check_folder(folder: Path, options: dict) -> None:
    """Raise before anything is loaded where a part is missing, or its weights are pickles."""
    parts = [part for part, kind in DiffusionPipeline.load_config(folder).items() if isinstance(kind, list) and kind[0]]
    parts = [part for part in parts if part not in options]
    if lost := [part for part in parts if not (folder / part).is_dir()]:
        raise FileNotFoundError(f"{folder} is not whole: its model_index.json names {', '.join(lost)}, not there")
    for part in parts:
        files = {path.suffix for path in (folder / part).iterdir()}
        if ".bin" in files and ".safetensors" not in files:
            raise _pickle_error(folder / part, _CONVERT_FOLDER, folder, folder.with_name(f"{folder.name}-safetensors"))


def _left_out(folder: Path) -> dict[str, None]:
    """Return the readers of text that a pipeline was saved without, which diffusers wants to be told again.

    Stable Diffusion 3 works without T5, for example.
    """
    parts = DiffusionPipeline.load_config(folder).items()
    return {name: None for name, kind in parts if name.startswith(("text_", "tokenizer")) and kind == [None, None]}


def _pickle_error(what, convert, path, to):
    command = convert.format(path=str(path), to=str(to))
    return ValueError(
        f"{what} holds weights as a pickle, which can run any code, and is not opened. This command runs nothing of it "
        f'and writes {to}: python -c "{command}"'
    )


def _load_file(path: Path, config, **options) -> DiffusionPipeline:
    """Load a pipeline from one file in the layout of the original Stable Diffusion."""
    with safe_open(path, "pt") as file:
        if not any(name.startswith("model.diffusion_model.") for name in file.keys()):
            raise ValueError(
                f"{path} has no tensors model.diffusion_model..., so it is no checkpoint of Stable Diffusion with all "
                "its parts (a LoRA or an embedding is loaded into a pipeline: pipe.load_lora_weights, "
                "pipe.load_textual_inversion)"
            )
    if config is None:
        config = fetch_diffusers_config(load_single_file_checkpoint(str(path)))["pretrained_model_name_or_path"]
    source, hub = _source(config), {key: options[key] for key in ("cache_dir", "revision", "token") if key in options}
    try:
        kind = getattr(diffusers, DiffusionPipeline.load_config(source, **hub)["_class_name"])
        return kind.from_single_file(str(path), config=str(source), **options)
    except OSError as error:
        raise ConnectionError(
            f"the configuration of {path} is {config}, of which not all can be had: {error}. Give config=, a folder "
            "with model_index.json and each part's configuration and tokenizer, as pipe.save_pretrained makes it; "
            "weights in it are not needed"
        ) from error
    except _MISFITS as error:
        raise ValueError(f"{path} is not as the configuration {config} says, or not whole: {error}") from error


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
    if isinstance(source, Path) and source.is_file():
        pipe = load_pipeline(name, device="cpu")
        return {part: getattr(pipe, part, None) for part in parts}
    with _reaching(source):
        config = DiffusionPipeline.load_config(source)
    without = {part: None for part, value in config.items() if isinstance(value, list) and part not in parts}
    pipe = load_pipeline(name, device="cpu", **without)
    return {part: getattr(pipe, part, None) for part in parts}


def seed(number: int) -> torch.Generator:
    """Return a seeded generator, on the CPU so that every device draws the same: `pipe(..., generator=seed(7))`.

    ValueError for what is no whole number of 64 bits.
    """
    if not isinstance(number, Integral) or not -(2**63) <= number < 2**64:
        raise ValueError(f"seed({number!r}): give a whole number from 0 to 2**64 - 1")
    return torch.Generator().manual_seed(int(number))


def best_device() -> str:
    """Return "cuda", "mps" or "cpu": the first that works here."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def bundled() -> dict[str, Path]:
    """Return the folders of the bundled pipelines by name."""
    return {path.name: path for path in BUNDLED.glob("*/") if (path / "model_index.json").exists()}


def _source(name: str | Path) -> Path | str:
    """Return the folder or file that holds a pipeline, or the hub id as it is."""
    known = bundled()
    if name in known:
        return known[name]
    folder, text = Path(name).expanduser(), str(name)
    if folder.is_dir():
        if not (folder / "model_index.json").exists():
            raise FileNotFoundError(f"{folder} is no pipeline: model_index.json is missing (use pipe.save_pretrained)")
        return folder
    if folder.is_file():
        if folder.suffix in _PICKLES:
            raise _pickle_error(folder, _CONVERT_FILE, folder, folder.with_suffix(".safetensors"))
        if folder.suffix != ".safetensors":
            raise ValueError(f"{folder} is no .safetensors file of Stable Diffusion, and no folder with a pipeline")
        return folder
    if isinstance(name, str) and text.count("/") == 1 and text[0] not in "./~" and text[-1] != "/":  # a hub id?
        return text
    raise FileNotFoundError(
        f"no model {text!r}: neither bundled ({', '.join(sorted(known)) or 'none found'}), nor a folder or file, "
        "nor a hub id of the form owner/name"
    )


@contextmanager
def _reaching(source: Path | str):
    """Say what to do where a model of the hub cannot be had; errors of a folder stay as they are."""
    try:
        yield
    except (AttributeError, KeyError) as error:
        raise ValueError(f"{source} is no pipeline that this diffusers knows: {error}") from error
    except SafetensorError as error:
        raise ValueError(f"{source} has weights that are no whole safetensors file: {error}") from error
    except OSError as error:
        if isinstance(source, Path):
            raise
        if "necessary `safetensors` weights" in str(error):
            raise _pickle_error(source, _CONVERT_FOLDER, source, Path(source).name) from error
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
