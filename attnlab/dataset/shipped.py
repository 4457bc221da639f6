"""Find the recipes that come with attnlab: in the folder recipes/ of a checkout, in a wheel within the package."""

import difflib
from pathlib import Path

__all__ = ["find_recipe", "known_recipes"]

_PACKAGE = Path(__file__).resolve().parents[1]


def known_recipes() -> dict[str, Path]:
    """Return the files of the recipes that come with attnlab, by name, in alphabetical order.

    A recipe's name is that of its file, without the ending. Those that end in "-tiny" are for the bundled model; the
    others are for a Stable Diffusion, which is downloaded.
    """
    for folder in (_PACKAGE / "recipes", _PACKAGE.parent / "recipes"):  # of a wheel, of a checkout
        if found := sorted(folder.glob("*.yaml")):
            return {path.stem: path for path in found}
    return {}


def find_recipe(name: str | Path) -> Path:
    """Return the file of a recipe: one that comes with attnlab, by its name, or any other by its path.

    FileNotFoundError where there is neither; it says which names there are, and what each of them makes.

    Parameters
    ----------
    name : str or Path
        "flood-tiny", or "mine.yaml". A known name goes before a file: write "./flood-tiny" for that.
    """
    known, path = known_recipes(), Path(name).expanduser()
    if str(name) in known:
        return known[str(name)]
    if path.is_file():
        return path
    near = difflib.get_close_matches(path.stem, known, 1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    listed = "".join(f"\n  {name:14} {_purpose(file)}" for name, file in known.items())
    raise FileNotFoundError(
        f"no recipe {str(name)!r}, and no such file{hint}; recipes that come with attnlab:{listed or ' none'}"
    )


def _purpose(path):
    """Read what a recipe makes: its first line, up to the first colon or the end."""
    return path.read_text("utf-8").partition("\n")[0].removeprefix("#").strip()
