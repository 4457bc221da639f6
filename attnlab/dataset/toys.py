"""Tell whether a model draws toys: small images of a rendered world, as those that come with attnlab do."""

import json
from pathlib import Path

from ..pipelines import bundled
from .recipe import Recipe

__all__ = ["toy_note"]

_SMALL = 128  # pixels of a side below which images are toys, whatever they show
_DENOISERS = ("unet", "transformer")  # whose geometry, with that of the VAE, no other model shares with a bundled one


def toy_note(recipe: Recipe) -> str:
    """Return the first line of a data set's card where its images are toys, else nothing.

    A model is known by its geometry, not by its name, so that a copy in another folder is found, and another model in a
    folder of the same name is not. What is on the hub is not looked at.
    """
    folder = bundled().get(recipe.model, Path(recipe.model).expanduser())
    geometry = _geometry(folder)
    if recipe.photos or geometry is None:
        return ""
    side = geometry[0]["sample_size"] * 2 ** (len(geometry[1]["block_out_channels"]) - 1)
    height, width = recipe.size or (side, side)
    rendered = any(_same(geometry, _geometry(own)) for own in bundled().values())
    if not rendered and max(height, width) >= _SMALL:
        return ""
    kind = "Toy images of a rendered world" if rendered else "Toy images"
    return f"**{kind}, {height} x {width}: for trying out, not for training on photographs.**\n\n"


def _geometry(folder):
    """Read how denoiser and VAE of a pipeline are built; None where they do not tell the size of its images."""
    found = [_config(folder / part) for part in _DENOISERS if (folder / part).is_dir()] + [_config(folder / "vae")]
    told = len(found) == 2 and isinstance(found[0].get("sample_size"), int) and found[1].get("block_out_channels")
    return found if told else None


def _config(folder):
    path = folder / "config.json"
    found = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return {name: x for name, x in found.items() if name not in ("_diffusers_version", "_name_or_path")}


def _same(first, second):
    """Whether configurations agree in all that both say: later versions of diffusers say more."""
    if second is None:
        return False
    return all(a[name] == b[name] for a, b in zip(first, second, strict=True) for name in a.keys() & b.keys())
