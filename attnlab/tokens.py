"""Learned words: a direction in the space of text embeddings, its zero level, and where both come from.

token = al.fit_token(recordings, masks, init="car")
al.linear_daam(other)[token] > 0                    # a mask, without a threshold to tune
library = al.TokenLibrary([token])
library.save("street.safetensors")
"""

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from . import storage

BESIDE = "/background"  # behind a token's name, in a file
SETTINGS = ("layers", "heads", "scaled", "size")  # of the maps a zero level was found on


@dataclass(frozen=True, eq=False)
class Token:
    """A learned word; it stands wherever a word does: `linear[token]`, `ovam(recording, [background, token])`.

    Attributes
    ----------
    name : what its map is called
    value : float32 (text width,), in the place of a word's embedding
    bias : added to its linear maps, so that 0 is where its mask begins; softmax maps do not have it
    background : the token that was learned beside it for everything else, or None
    metadata : how it was made: model, layers, heads, scaled and size of the maps, method, images, scores, losses, ...
    """

    name: str
    value: torch.Tensor
    bias: float = 0.0
    background: "Token | None" = None
    metadata: dict = field(default_factory=dict)

    def __post_init__(self):
        value = torch.as_tensor(self.value).detach().to("cpu", torch.float32).clone()
        if value.ndim != 1 or not value.isfinite().all():
            raise ValueError(f"the value of token {self.name!r} is a row of finite numbers, not {tuple(value.shape)}")
        if not (isinstance(self.name, str) and self.name) or not math.isfinite(self.bias):
            raise ValueError(f"a token has a name and a finite bias, not {self.name!r} and {self.bias}")
        object.__setattr__(self, "value", value)
        object.__setattr__(self, "bias", float(self.bias))

    def __repr__(self) -> str:
        model = self.metadata.get("model") or "an unknown model"
        return f"<Token {self.name!r} of {model}, text width {len(self.value)}>"

    def check(self, width: int, model: str | None, settings: Mapping | None = None) -> None:
        """ValueError where it was made for another text width or model; a warning for maps with other settings."""
        made = self.metadata.get("model")
        if len(self.value) != width or not same_model(made, model):
            raise ValueError(
                f"token {self.name!r} is of {made or 'an unknown model'}, text width {len(self.value)}: it does not "
                f"fit {model or 'an unknown model'}, text width {width}"
            )
        other = [
            s
            for s in SETTINGS
            if settings and s in self.metadata and _plain(self.metadata[s]) != _plain(settings.get(s))
        ]
        if other:
            warnings.warn(
                f"token {self.name!r} was learned on maps with other {', '.join(other)}: its zero level does not hold",
                UserWarning,
                stacklevel=3,  # the line with linear[token]
            )


class TokenLibrary(Mapping):
    """Learned words by name, and their file: `library["car"]`, `library.save(path)`, `TokenLibrary.load(path)`."""

    def __init__(self, tokens: Iterable[Token] = ()):
        self.tokens: dict[str, Token] = {}
        for token in tokens:
            self.add(token)

    def add(self, token: Token) -> None:
        """Put in a token, in the place of one of its name. ValueError for one of another width or model."""
        for known in self.tokens.values():
            token.check(len(known.value), known.metadata.get("model"))
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
        """Write to a safetensors file: of each token its value, its bias, its background and what is known of it."""
        tensors, metadata = {}, {}
        for name, token in self.tokens.items():
            if name.endswith(BESIDE) and name.removesuffix(BESIDE) in self.tokens:
                raise ValueError(f"{name!r} is how the file calls a token's background: give the token another name")
            tensors[name] = token.value
            metadata[name] = {"bias": token.bias, "about": token.metadata}
            if token.background is not None:
                tensors[name + BESIDE] = token.background.value
                metadata[name]["background"] = {"name": token.background.name, "bias": token.background.bias}
        return storage.write(path, "TokenLibrary", tensors, metadata)

    @classmethod
    def load(cls, path: str | Path, model: str | None = None) -> "TokenLibrary":
        """Read what `save` wrote, or a plain safetensors file of embeddings by name, such as OVAM's published tokens.

        Parameters
        ----------
        model : which the tokens are for, where the file does not say or says it by another name

        Raises
        ------
        FileNotFoundError : no such file
        ValueError : a file that is cut short, is something else, or holds tensors that are no tokens
        """
        found = _read(path)
        if model is not None:
            found = [replace(token, metadata={**token.metadata, "model": model}) for token in found]
        return cls(found)


def same_model(one: str | None, other: str | None) -> bool:
    """Whether two names may mean one model: by their last part, hub id or folder; an unknown one may be any."""
    return None in (one, other) or Path(one).name == Path(other).name


def _read(path):
    if storage.kind(path) is None:
        return _read_plain(path)
    file = storage.File(path, "TokenLibrary")
    return [_unpack(name, entry, file) for name, entry in file.metadata.items()]


def _unpack(name, entry, file):
    background = entry.get("background")
    if background is not None:
        value = file.read(name + BESIDE)
        background = Token(background["name"], value, background["bias"], metadata=entry["about"])
    return Token(name, file.read(name), entry["bias"], background, entry["about"])


def _read_plain(path):
    """Embeddings by name, with the model and the source in the header."""
    values = load_file(path)
    with safe_open(path, "pt") as file:
        header = file.metadata() or {}
    wrong = {name: tuple(value.shape) for name, value in values.items() if value.ndim != 1}
    if wrong or not values:
        raise ValueError(f"{path} holds {wrong or 'nothing'}: tokens are (text width,) each")
    known = {name: header[name] for name in ("model", "source") if name in header}
    return [Token(name, value, metadata=known) for name, value in values.items()]


def _plain(value):
    """Tuples as a file gives them back."""
    return list(value) if isinstance(value, tuple) else value
