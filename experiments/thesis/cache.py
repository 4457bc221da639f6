"""Keep what was made in a folder, in files whose names are hashes of everything that it was made from."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import attnlab
from attnlab import storage

__all__ = ["Cache", "hash_array", "hash_code", "hash_weights"]

_WITHOUT_EFFECT = {"cli", "dataset", "joint", "plots", "widgets", "__init__.py", "__main__.py"}
"""What of attnlab only draws, asks, starts notebooks or makes data sets: a change there leaves all results valid."""


class Cache:
    """A folder of results of one model, call and version of the code.

    Parameters
    ----------
    folder : str or Path
        Where the folder is made.
    model : str
        The first part of its name.
    made_from : dict
        What all results depend on, beside the code and the libraries: hashes of weights, settings, ...
    """

    def __init__(self, folder: str | Path, model: str, made_from: dict):
        made_from = made_from | {"code": hash_code(), "versions": storage.versions()}
        self.folder = Path(folder) / f"{model}-{_digest(made_from)}"

    def example(self, track: str, name: str, number: int) -> Path:
        """Return the path of an example of a class, by its seed."""
        return self.folder / track / f"{name.replace(' ', '_')}_{number:04d}.safetensors"

    def kept(self, kind: str, made_from: dict, make: Callable[[Path], object]) -> Path:
        """Return the path of a result made from something; `make` writes it there if it is missing."""
        path = self.folder / kind / f"{_digest(made_from)}.safetensors"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            make(path)
        return path


def hash_array(array: np.ndarray) -> str:
    """Hash the values of an array."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def hash_weights(parts: dict) -> str:
    """Hash all weights of those parts of a pipeline that have weights."""
    found = hashlib.sha256()
    for name, part in sorted(parts.items()):
        if isinstance(part, torch.nn.Module):
            for key, value in sorted(part.state_dict().items()):
                found.update(f"{name}.{key}".encode())
                found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def hash_code(package: Path = Path(attnlab.__file__).parent) -> str:
    """Hash the code that results depend on: this folder's, and attnlab's in all folders but `_WITHOUT_EFFECT`."""
    found = hashlib.sha256()
    own = [Path(__file__).with_name(f"{name}.py") for name in ("cache", "examples", "gallery")]
    for path in [*sorted(package.rglob("*.py")), *own]:
        if path in own or path.relative_to(package).parts[0] not in _WITHOUT_EFFECT:
            found.update(path.read_bytes())
    return found.hexdigest()[:16]


def _digest(made_from):
    return hashlib.sha256(json.dumps(made_from, sort_keys=True, default=str).encode()).hexdigest()[:16]
