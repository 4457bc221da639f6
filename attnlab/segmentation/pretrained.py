"""Start a segmenter from weights of SegFormer that somebody trained on something else."""

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import SegformerConfig, SegformerForSemanticSegmentation
from transformers.utils import logging

from .folders import check_classes
from .model import IMAGENET, Segmenter, check_weights, read_scaling

__all__ = ["start_segmenter"]

_HEAD, _LAST = "decode_head.", "decode_head.classifier."
_OTHER_HEAD = "classifier."  # of the weights that ImageNet's classes were learned with


def start_segmenter(folder: str | Path, classes: Sequence[str], seed: int = 0) -> Segmenter:
    """Return a segmenter of some classes with the weights of a folder, as far as they fit.

    The encoder is as it was trained, and so is the head, where the folder has one for these very classes. For other
    classes the head's last layer is new; where the folder has no head, as that of nvidia/mit-b0, all of it is new. A
    UserWarning says what is new. Images are scaled as the folder's preprocessor_config.json says, without one as
    ImageNet's photographs are.

    Parameters
    ----------
    folder : str or Path
        As transformers saves a SegFormer: config.json, weights as .safetensors, preprocessor_config.json.
    classes : sequence of str
        Names of the labels 0, 1, ...
    seed : int
        What new weights are drawn from.

    Raises
    ------
    FileNotFoundError
        If there is no such folder, or no config.json in it.
    ValueError
        If it holds another model, or files are damaged or missing.
    """
    folder = Path(folder).expanduser()
    check_classes(classes)
    config, named = _read_config(folder)
    mean, std = read_scaling(folder, IMAGENET)
    config.id2label = dict(enumerate(classes))
    config.label2id = {name: label for label, name in config.id2label.items()}
    check_weights(folder)
    with torch.random.fork_rng(devices=[]), _quietly():
        torch.manual_seed(seed)
        try:
            model, about = SegformerForSemanticSegmentation.from_pretrained(
                folder, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True,
                ignore_mismatched_sizes=True, local_files_only=True,
            )  # fmt: skip
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            raise ValueError(f"{folder}: its weights and config.json are damaged or do not fit: {error}") from error
        whole = _has_head(folder, about)
        if named != tuple(classes):
            model.decode_head.classifier.reset_parameters()
    if not whole or named != tuple(classes):
        new = f"the last layer, for {', '.join(classes)}, is new" if whole else "the folder has no head: it is new"
        warnings.warn(f"{folder}: {new}, and has to be trained", UserWarning, stacklevel=3)
    return Segmenter(model, classes, mean, std)


def _read_config(folder):
    """Read a SegFormer's configuration, and the classes of its labels in their order; refuse any other folder."""
    if not (folder / "config.json").is_file():
        hint = "name one that has" if folder.is_dir() else "`hf download nvidia/mit-b0 --local-dir mit-b0` makes one"
        raise FileNotFoundError(f"start={str(folder)!r}: there is no folder with a config.json; {hint}")
    named = folder / "classes.json"  # of `Segmenter.save_pretrained`
    try:
        found = json.loads((folder / "config.json").read_text("utf-8"))
        if found.get("model_type") != "segformer":
            raise ValueError(f"it is of a {found.get('model_type') or found.get('_class_name')}, not of a segformer")
        config = SegformerConfig.from_pretrained(folder)
        return config, tuple(json.loads(named.read_text("utf-8")) if named.exists() else config.id2label.values())
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} cannot be started from: {error}") from error


def _has_head(folder, about):
    """Whether weights have a head for segmentation; ValueError where others than a head's are missing or too many."""
    missing, more = set(about["missing_keys"]), set(about["unexpected_keys"])
    odd = [name for name in missing if not name.startswith(_HEAD)]
    odd += [name for name in more if not name.startswith(_OTHER_HEAD)]
    odd += [name for name, *_ in about["mismatched_keys"] if not name.startswith(_LAST)]
    if odd:
        raise ValueError(f"{folder}: weights are missing or of another model, {', '.join(sorted(odd)[:3])} among them")
    return not missing


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep transformers from telling what is new in its own way, with a table."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
