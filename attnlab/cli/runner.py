"""Find notebooks, read their parameters, check what was typed for one, run one into runs/NN."""

import ast
import difflib
import json
import logging
import math
import os
import shlex
import shutil
import warnings
from pathlib import Path
from typing import NamedTuple

__all__ = ["Parameter", "RunFailed", "check_parameters", "find_notebooks", "pick_notebook", "read_parameters"]
__all__ += ["read_title", "run_notebook"]

_PROJECT = Path(__file__).resolve().parents[2] / "notebooks"  # where an editable install has them
_TYPES = {str: "a text", bool: "true or false", int: "a whole number", float: "a number", list: "a JSON list"}
_TYPES |= {dict: "a JSON object", type(None): "anything"}  # of a parameter, as they are called in help and errors


class Parameter(NamedTuple):
    """One line of a notebook's `parameters` cell: `name = default  # help`."""

    default: object
    kind: str  # type of its values, in words
    literal: str  # the default as JSON, as it is typed in a shell
    help: str


class RunFailed(Exception):
    """A notebook did not run to its end; the message says why and where the executed notebook lies."""


def find_notebooks(folder: str | None = None) -> list[Path]:
    """Find the notebooks in `folder`; without one, those in ./notebooks, else those beside the package."""
    for candidate in [Path(folder)] if folder else [Path("notebooks"), _PROJECT]:
        if found := sorted(candidate.glob("*.ipynb")):
            return found
    where = folder or "./notebooks"
    raise ValueError(f"no notebooks in {where}; go to the project's folder, or say where they are: --notebooks FOLDER")


def pick_notebook(notebooks: list[Path], wanted: str) -> Path:
    """Return the one notebook meant by `4`, `04`, `04_dbscan` or `notebooks/04_dbscan_masks.ipynb`."""
    stem = wanted.zfill(2) if wanted.isdigit() else Path(wanted).name.removesuffix(".ipynb")
    meant = [path for path in notebooks if path.stem == stem]
    meant = meant or [path for path in notebooks if stem and path.stem.startswith(stem)]
    if len(meant) != 1:
        names = "\n  ".join(path.stem for path in meant or notebooks)
        raise ValueError(f"{wanted!r} is {'more than one' if meant else 'no'} notebook; there is\n  {names}")
    return meant[0]


def _read_cells(path):
    """Read (tags, source) of each cell."""
    try:
        cells = json.loads(path.read_text("utf-8"))["cells"]
        return [(cell["metadata"].get("tags", []), "".join(cell["source"])) for cell in cells]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read as a notebook: {type(error).__name__} {error}") from None


def read_title(path: Path) -> str:
    """Return the first heading of a notebook, without its marks."""
    return next((source.splitlines()[0].strip("# ") for _, source in _read_cells(path) if source.startswith("#")), "")


def read_parameters(path: Path) -> dict[str, Parameter]:
    """Read {name: Parameter} of a notebook, in order, without running a line.

    `papermill.inspect_notebook` silently drops a parameter whose text or help holds a "=".
    """
    source = next((source for tags, source in _read_cells(path) if "parameters" in tags), "")
    lines, found = source.encode().splitlines(), {}  # ast counts columns in bytes
    try:
        for node in ast.parse(source).body:
            name = node.targets[0].id if isinstance(node, ast.Assign) else node.target.id
            comment = lines[node.end_lineno - 1][node.end_col_offset :].decode()
            default = ast.literal_eval(node.value)
            if type(default) not in _TYPES:
                raise ValueError(f"{name} is a {type(default).__name__}, which JSON lacks")
            literal = json.dumps(default, ensure_ascii=False)
            found[name] = Parameter(default, _TYPES[type(default)], literal, comment.strip("# "))
    except (SyntaxError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: its parameters are not plain lines of `name = value  # help`: {error}") from None
    return found


def _convert(name, text, parameter):
    """Convert what was typed for a parameter to the type of its default; a text is taken to the letter."""
    default, kind = parameter.default, type(parameter.default)
    try:
        value = kind(text) if kind in (str, int, float) else json.loads(text.lower() if kind is bool else text)
    except ValueError:
        value = text
    fits = default is None or (type(value) is kind and (kind is not float or math.isfinite(value)))
    if fits and kind is list and len(kinds := {type(item) for item in default}) == 1:  # a list of numbers stays one
        fits = {type(item) for item in value} <= kinds | ({int} if float in kinds else set())
    if not fits:
        example = shlex.quote(parameter.literal)
        raise ValueError(f"{name} is {parameter.kind}, for instance -p {name} {example}; {text!r} is not")
    return value


def check_parameters(path: Path, typed: list[tuple[str, str]]) -> dict[str, object]:
    """Convert typed (name, text) to {name: value}; ValueError for an unknown name or a text of another type."""
    known = read_parameters(path)
    for name, _ in typed:
        if name == "out" and name in known:
            raise ValueError("out is chosen by `attnlab run`; to put results elsewhere: --runs FOLDER")
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            has = ", ".join(other for other in known if other != "out") or "none"
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{path.stem} has no parameter {name!r}{hint}\n  its parameters: {has}")
    return {name: _convert(name, text, known[name]) for name, text in typed}


def run_notebook(path: Path, values: dict[str, object], runs: Path) -> Path:
    """Run a notebook and return its folder, runs/NN, with the executed notebook, its figures, metrics.json.

    The notebook writes to a temporary folder, which is renamed after the last cell, so runs/NN is always one whole
    result: the last good one. A run that fails becomes runs/NN.failed, where the notebook shows the error.
    """
    import papermill  # late: listing notebooks and refusing a parameter must be quick
    from ipykernel.kernelspec import get_kernel_dict
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec

    class ThisPython(AsyncKernelManager):  # this interpreter, even where another is registered as `python3`
        # no log of the kernel's own, no talk of frozen modules: what the notebook says is in its cells
        kernel_spec = KernelSpec(**get_kernel_dict(["--log-level=50"], ["-Xfrozen_modules=off"]))

    number = path.stem.split("_")[0]
    work, final = runs / f"{number}.partial-{os.getpid()}", runs / number
    try:
        work.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"cannot write results to {runs}: {error.strerror}; name another: --runs FOLDER") from None
    logging.getLogger("papermill").setLevel(logging.ERROR)  # it warns of lines that its own reader cannot parse
    if "out" in read_parameters(path):
        values = {**values, "out": work.as_posix()}
    kernel = {"kernel_name": "python3", "language": "python", "kernel_manager_class": ThisPython}
    try:
        with warnings.catch_warnings(action="ignore"):  # of the libraries that start the kernel, not of the notebook
            papermill.execute_notebook(path, work / path.name, values, **kernel)
    except (Exception, KeyboardInterrupt) as error:
        final = runs / f"{number}.failed"
        if hasattr(error, "exec_count"):  # papermill's account of an exception in a cell, which it has marked
            fault = f"In [{error.exec_count}]: {error.ename}: {error.evalue}"
        else:
            fault = "interrupted" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"
            _mark(work / path.name, path, fault)
        _settle(work, final)
        kind = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else RunFailed
        message = f"{path.stem} failed: {fault}\n  the notebook, with the error marked: {final / path.name}"
        raise kind(message) from error
    _settle(work, final)
    return final


def _mark(executed, original, text):
    """Write into the notebook where it stopped: papermill does so for an exception, not for a kernel that died."""
    content = json.loads((executed if executed.exists() else original).read_text("utf-8"))
    started = [n for n, cell in enumerate(content["cells"]) if cell["metadata"].get("papermill", {}).get("start_time")]
    note = {"cell_type": "markdown", "id": "stopped-here", "metadata": {}, "source": f"## Stopped here: {text}"}
    content["cells"].insert(max(started, default=0), note)
    executed.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")


def _settle(work, final):
    """Give a folder its final name, also inside its files; only then delete the folder that had this name."""
    for file in [*work.glob("*.ipynb"), *work.glob("*.json")]:
        file.write_bytes(file.read_bytes().replace(work.as_posix().encode(), final.as_posix().encode()))
    old = final.with_name(f"{work.name}-old")
    if final.exists():
        final.rename(old)
    work.rename(final)
    shutil.rmtree(old, ignore_errors=True)
