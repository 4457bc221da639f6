"""Tell whether a model draws toys: small images of a rendered world, as those that come with attnlab do."""

import json
from pathlib import Path

from ..pipelines import bundled
from .recipe import Recipe

__all__ = ["toy_note"]

_SMALL = 128  # pixels of a side below which images are toys, whatever they show
_PARTS = ("unet", "vae")  # whose geometry no other model shares with a bundled one


def toy_note(recipe: Recipe) -> str:
    """Return the first line of a data set's card where its images are toys, else nothing.

    A model is known by its geometry, not by its name, so that a copy in another folder is found, and another model in a
    folder of the same name is not. What is on the hub is not looked at.
    """
    folder = bundled().get(recipe.model, Path(recipe.model).expanduser())
    configs = _geometry(folder)
    if recipe.photos or not all(configs):
        return ""
    side = configs[0]["sample_size"] * 2 ** (len(configs[1]["block_out_channels"]) - 1)
    height, width = recipe.size or (side, side)
    rendered = any(_same(configs, _geometry(own)) for own in bundled().values())
    if not rendered and max(height, width) >= _SMALL:
        return ""
    kind = "Toy images of a rendered world" if rendered else "Toy images"
    return f"**{kind}, {height} x {width}: for trying out, not for training on photographs.**\n\n"


def _geometry(folder):
    """Read how the parts of a pipeline are built; of a part without the sizes that are asked for, nothing."""
    found = []
    for part in _PARTS:
        path = folder / part / "config.json"
        config = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        whole = isinstance(config.get("sample_size"), int) and config.get("block_out_channels")
        found.append({name: x for name, x in config.items() if not name.startswith("_")} if whole else {})
    return found


def _same(first, second):
    """Whether configurations agree in all that both say: later versions of diffusers say more."""
    return all(a[name] == b[name] for a, b in zip(first, second, strict=True) for name in a.keys() & b.keys())
