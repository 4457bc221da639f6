"""Tensors and what is known of them in one safetensors file: written whole or not at all, and read lazily."""

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

FORMAT = 1  # of files; those of a later one are refused


def write(path: str | Path, kind: str, tensors: Mapping[str, torch.Tensor], metadata: dict) -> Path:
    """Write a file of some kind ("Recording", ...); `metadata` holds JSON types."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    header = {"attnlab": kind, "format": str(FORMAT), "about": json.dumps(metadata)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part, header)
    part.replace(path)
    return path


def versions() -> dict[str, str]:
    """Of attnlab and the libraries that a recording depends on."""
    return {name: version(name) for name in ("attnlab", "torch", "diffusers", "transformers")}


def kind(path: str | Path) -> str | None:
    """Which kind of file `write` made; None for another safetensors file, errors as those of `File`."""
    return _open(path)[1].get("attnlab")


def _open(path):
    """A handle and the header."""
    if not Path(path).exists():
        raise FileNotFoundError(f"no file {path}")
    try:
        handle = safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from error
    return handle, handle.metadata() or {}


class File:
    """A file that `write` made, open for reading: one that is replaced meanwhile goes on to give what it held.

    Attributes
    ----------
    metadata : what `write` was told
    names : of its tensors

    Raises
    ------
    FileNotFoundError : no such file
    ValueError : a file that is cut short, is of another kind, or was written by a later version
    """

    def __init__(self, path: str | Path, kind: str):
        self.handle, header = _open(path)
        if header.get("attnlab") != kind:
            raise ValueError(f"{path} holds {header.get('attnlab', 'something else')}, not a {kind}")
        if int(header["format"]) > FORMAT:
            raise ValueError(
                f"{path} has format {header['format']}, this attnlab reads up to {FORMAT}: install a later one"
            )
        self.metadata, self.names = json.loads(header["about"]), frozenset(self.handle.keys())

    def read(self, name: str) -> torch.Tensor:
        """One tensor."""
        return self.handle.get_tensor(name)

    def stored(self, name: str) -> "Stored":
        """The entries along a tensor's first axis, each read when it is asked for."""
        return Stored(self.handle, name)


class Stored(Sequence):
    """The entries along the first axis of a tensor in an open file, each read when it is asked for."""

    def __init__(self, handle: safe_open, name: str):
        self.handle, self.name = handle, name
        self.count = handle.get_slice(name).get_shape()[0]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> torch.Tensor:
        if not -self.count <= i < self.count:
            raise IndexError(f"entry {i} of {self.count}")
        return self.handle.get_slice(self.name)[i % self.count]
