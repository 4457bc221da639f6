"""Tensors and what is known of them in one safetensors file: written whole or not at all, and read lazily."""

import json
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

FORMAT = 1  # of files; those of a later one are refused


def write(path: str | Path, kind: str, tensors: Mapping[str, torch.Tensor], about: dict) -> Path:
    """Write a file of some kind ("Recording", ...); `about` holds JSON types."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    header = {"attnlab": kind, "format": str(FORMAT), "about": json.dumps(about)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part, header)
    part.replace(path)
    return path


def read_about(path: str | Path, kind: str) -> dict:
    """What `write` was told about a file.

    Raises
    ------
    FileNotFoundError : no such file
    ValueError : a file that is cut short, is of another kind, or was written by a later version
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"no file {path}")
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from error
    if header.get("attnlab") != kind:
        raise ValueError(f"{path} holds {header.get('attnlab', 'something else')}, not a {kind}")
    if int(header["format"]) > FORMAT:
        raise ValueError(
            f"{path} has format {header['format']}, this attnlab reads up to {FORMAT}: install a later one"
        )
    return json.loads(header["about"])


def names(path: str | Path) -> set[str]:
    """Names of a file's tensors."""
    with safe_open(path, "pt") as file:
        return set(file.keys())


def versions() -> dict[str, str]:
    """Of attnlab and the libraries that a recording depends on."""
    return {name: metadata.version(name) for name in ("attnlab", "torch", "diffusers", "transformers")}


def read(path: str | Path, name: str) -> torch.Tensor:
    """One tensor of a file."""
    with safe_open(path, "pt") as file:
        return file.get_tensor(name)


class Stored(Sequence):
    """The entries along the first axis of a tensor in a file, each read when it is asked for."""

    def __init__(self, path: str | Path, name: str):
        self.path, self.name = Path(path), name
        with safe_open(path, "pt") as file:
            self.count = file.get_slice(name).get_shape()[0]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> torch.Tensor:
        if not -self.count <= i < self.count:
            raise IndexError(f"entry {i} of {self.count}")
        with safe_open(self.path, "pt") as file:
            return file.get_slice(self.name)[i % self.count]
