"""Learned words: a direction in the space of text embeddings, its zero level, and how both were found.

token = al.fit_token(recordings, masks, init="car")
al.linear_daam(other)[token] > 0                    # a mask, without a threshold to tune
library = al.TokenLibrary([token])
library.save("street.safetensors")
"""

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from . import storage

__all__ = ["MAP_SETTINGS", "Token", "TokenLibrary", "same_model"]

MAP_SETTINGS = ("layers", "heads", "scaled", "size")  # how maps were made: a zero level holds for maps made alike
_BACKGROUND = "/background"  # in a file, a token's background is called by the token's name and this


@dataclass(frozen=True, eq=False)
class Token:
    """A learned word; it stands wherever a word does: `linear[token]`, `ovam(recording, [background, token])`.

    Attributes
    ----------
    name : str
        What its map is called.
    value : (text width,) tensor of float32
        What takes the place of a word's embedding.
    bias : float
        Added to its linear maps, so that its mask is where the map is above 0. Softmax maps do not use it.
    background : Token, optional
        Token that was learned together with it, for everything else in the images.
    metadata : dict
        How it was made: model, space, layers, heads, scaled and size of the maps, method, images, scores, losses, ...
    """

    name: str
    value: torch.Tensor
    bias: float = 0.0
    background: "Token | None" = None
    metadata: dict = field(default_factory=dict)

    def __post_init__(self):
        number = isinstance(self.bias, Real | torch.Tensor) and math.isfinite(self.bias)
        if not (isinstance(self.name, str) and self.name and number):
            raise ValueError(f"a token has a name and a finite bias, not {self.name!r} and {self.bias!r}")
        try:
            value = torch.as_tensor(self.value).detach().to("cpu", torch.float32).clone()
        except (TypeError, RuntimeError, ValueError):  # what is no numbers
            value = torch.empty(0)
        if value.ndim != 1 or not len(value) or not value.isfinite().all():
            raise ValueError(f"the value of token {self.name!r} is a row of finite numbers, not {tuple(value.shape)}")
        if not isinstance(self.metadata, dict) or not isinstance(self.metadata.get("model", ""), str | None):
            raise ValueError(f"metadata of token {self.name!r} is a dict with the model's name, not {self.metadata!r}")
        if self.background is not None and getattr(self.background, "value", torch.empty(0)).shape != value.shape:
            raise ValueError(f"the background of token {self.name!r} is a token of the same text width, {len(value)}")
        object.__setattr__(self, "value", value)
        object.__setattr__(self, "bias", float(self.bias))

    def __repr__(self) -> str:
        model = self.metadata.get("model") or "an unknown model"
        return f"<Token {self.name!r} of {model}, {self.space} width {len(self.value)}>"

    @property
    def space(self) -> str:
        """Where it lies: "text", among embeddings, or "output", among outputs of joint attention."""
        return self.metadata.get("space") or "text"

    def check(self, width: int, model: str | None, settings: Mapping | None = None, space: str = "text") -> None:
        """Raise ValueError for another width, model or `space` than the token's; warn where map settings differ."""
        made = self.metadata.get("model")
        if self.space != space:
            how = "it has a linear_daam of outputs alone" if space == "text" else "fit one to maps of this model"
            raise ValueError(
                f"token {self.name!r} lies in {self.space} space, of layers {self.metadata.get('layers')}, and does "
                f"not fit {space} space: {how}"
            )
        if len(self.value) != width or not same_model(made, model):
            raise ValueError(
                f"token {self.name!r} is of {made or 'an unknown model'}, text width {len(self.value)}: it does not "
                f"fit {model or 'an unknown model'}, text width {width}"
            )
        compared = [name for name in MAP_SETTINGS if settings and name in self.metadata]
        if other := [n for n in compared if _as_json(self.metadata[n]) != _as_json(settings.get(n))]:
            warnings.warn(
                f"token {self.name!r} was learned on maps with other {', '.join(other)}: its zero level does not hold",
                stacklevel=3,  # the line with linear[token]
            )


class TokenLibrary(Mapping):
    """Learned words by name, and their file: `library["car"]`, `library.save(path)`, `TokenLibrary.load(path)`."""

    def __init__(self, tokens: Iterable[Token] = ()):
        self.tokens: dict[str, Token] = {}
        for token in tokens:
            self.add(token)

    def add(self, token: Token) -> None:
        """Add a token; it replaces one of the same name. ValueError for one of another text width, model or space."""
        if not isinstance(token, Token):
            raise ValueError(f"a library holds tokens, not {token!r}")
        for present in self.tokens.values():
            token.check(len(present.value), present.metadata.get("model"), space=present.space)
        self.tokens[token.name] = token

    def __getitem__(self, name: str) -> Token:
        if name not in self.tokens:
            raise KeyError(f"no token {name!r}; the library has {', '.join(map(repr, self.tokens)) or 'none'}")
        return self.tokens[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tokens)

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        return f"<TokenLibrary of {', '.join(map(repr, self.tokens)) or 'nothing'}>"

    def save(self, path: str | Path) -> Path:
        """Write each token's value, bias, background and metadata to a safetensors file, and return its path."""
        tensors, metadata = {}, {}
        for name, token in self.tokens.items():
            if name.endswith(_BACKGROUND) and name.removesuffix(_BACKGROUND) in self.tokens:
                raise ValueError(f"{name!r} is how the file calls a token's background: give the token another name")
            tensors[name] = token.value
            metadata[name] = {"bias": token.bias, "about": token.metadata}  # "about": the key in files
            if token.background is not None:
                tensors[name + _BACKGROUND] = token.background.value
                metadata[name]["background"] = {"name": token.background.name, "bias": token.background.bias}
        return storage.write(path, "TokenLibrary", tensors, metadata)

    @classmethod
    def load(cls, path: str | Path, model: str | None = None) -> "TokenLibrary":
        """Read what `save` wrote, a plain safetensors file of embeddings by name, or a token of OVAM's, an .npy file.

        `model` is the tokens' model, where the file does not name it, or names it otherwise. OVAM's files hold a
        background and a token, (2, text width), or a token alone; it gets the file's name. FileNotFoundError, or
        ValueError for a file that is cut short, damaged, something else or a pickle, or holds what is no token.
        """
        if Path(path).suffix == ".npy":
            found = _read_npy(path)
        else:
            found = _read_plain(path) if storage.kind(path) is None else _read(path)
        if model is not None:
            found = [replace(token, metadata={**token.metadata, "model": model}) for token in found]
        return cls(found)


def same_model(one: str | None, other: str | None) -> bool:
    """Return whether two names, hub ids or folders may mean one model: their last parts are equal, or one is None.

    Parameters
    ----------
    one, other : str, optional
        Names of models; None for an unknown one, which may be any.
    """
    return None in (one, other) or Path(one).name == Path(other).name


def _read(path):
    file, found = storage.File(path, "TokenLibrary"), []
    with storage.intact(path):
        for name, entry in file.metadata.items():
            background = None
            if saved := entry.get("background"):
                background = Token(saved["name"], file.read(name + _BACKGROUND), saved["bias"], metadata=entry["about"])
            found.append(Token(name, file.read(name), entry["bias"], background, entry["about"]))
    return found


def _read_plain(path):
    """Return the tokens of a file of embeddings by name, whose header may name the model and the source."""
    with safe_open(path, "pt") as file:
        header = file.metadata() or {}
        values = {name: file.get_tensor(name) for name in file.keys()}
    wrong = {name: tuple(value.shape) for name, value in values.items() if value.ndim != 1}
    if wrong or not values:
        raise ValueError(f"{path} holds {wrong or 'nothing'}: tokens are (text width,) each")
    metadata = {name: header[name] for name in ("model", "source") if name in header}
    return [Token(name, value, metadata=metadata) for name, value in values.items()]


def _read_npy(path):
    """Return the token of a file as OVAM's `np.save` wrote it, which is named by its file."""
    path = Path(path)
    with storage.intact(path):
        with path.open("rb") as file:  # a damaged header may promise any size: only what is there is mapped
            if b"'descr': '|O'" in file.read(200):
                raise ValueError(
                    f"{path} is a pickle, which can run any code, and is not opened: where you trust it, save each of "
                    "its tokens alone, np.save('cat.npy', np.load(path, allow_pickle=True).item()['cat'])"
                )
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
        if rows.ndim not in (1, 2) or (rows.ndim == 2 and len(rows) > 2) or rows.dtype.kind != "f":
            raise ValueError(f"a token is (text width,), or (2, text width) with its background, not {rows.shape}")
        *background, token = torch.from_numpy(np.atleast_2d(rows).astype(np.float32))
        rest = Token(f"background of {path.stem}", background[0]) if background else None
        return [Token(path.stem, token, background=rest)]


def _as_json(value):
    """Return a value as it comes back from a file: tuples as lists."""
    return list(value) if isinstance(value, tuple) else value
