"""Write what goes with the thesis's figures: a page that shows them all, and a record of how they were made."""

import hashlib
import json
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from PIL import Image

from attnlab import storage

from .experiment import Experiment
from .tables import Table

__all__ = ["captions", "contents", "manifest"]


def captions(folder: str | Path) -> dict[str, str]:
    """Read the captions that `save_figure` put into the figures of notebook 07 in a folder, by file name."""
    found = {}
    for path in sorted(Path(folder).glob("07_*.png")):
        with Image.open(path) as figure:
            found[path.name] = getattr(figure, "text", {}).get("Description", "")
    return found


def contents(folder: str | Path, tables: Sequence[Table], about: str) -> str:
    """Write all figures with their captions, and all tables, as Markdown for the same folder."""
    parts = ["# The thesis's figures and tables, made again", about]
    parts += [f"![{caption}]({name})\n\n`{name}`: {caption}" for name, caption in captions(folder).items()]
    parts += [f"## {table.name}\n\n{table.markdown.rstrip()}" for table in tables]
    return "\n\n".join(parts) + "\n"


def manifest(folder: str | Path, parameters: dict, experiments: Sequence[Experiment], seconds: float) -> str:
    """Write how a run's files were made, as JSON: parameters, seeds, models, versions, time, SHA-256 of each file."""
    files = sorted(path for path in Path(folder).glob("07_*.*") if path.suffix in (".png", ".pdf", ".csv", ".md"))
    about = {
        "parameters": parameters,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "python": platform.python_version(),
        "versions": storage.versions(),
        "models": {x.model: {"kept in": x.gallery.cache.folder.name, **x.gallery.call} for x in experiments},
        "seeds": {
            f"{track}, {name}": [e.number for e in found] for (track, name), found in experiments[0].sets.items()
        },
        "sha256": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
    }
    return json.dumps(about, indent=1) + "\n"
