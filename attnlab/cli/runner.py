"""Find notebooks, read their parameters, check what was typed for one, run one into runs/NN."""

import ast
import difflib
import errno
import hashlib
import itertools
import json
import logging
import math
import os
import re
import shlex
import shutil
import warnings
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

__all__ = ["CHECKOUT", "Parameter", "RunFailed", "check_parameters", "find_notebooks", "needs_checkout"]
__all__ += ["pick_notebook", "read_parameters", "read_title", "result_folders", "run_notebook"]

CHECKOUT = Path(__file__).resolve().parents[2]  # the repository's folder, unless this is of a wheel
_TYPES = {str: "a text", bool: "true or false", int: "a whole number", float: "a number", list: "a JSON list"}
_TYPES |= {dict: "a JSON object", type(None): "anything"}  # of a parameter, as they are called in help and errors
_WRITTEN = ".written.json"  # in a folder of results: the files that its run wrote


class Parameter(NamedTuple):
    """One line of a notebook's `parameters` cell: `name = default  # help`."""

    default: object
    kind: str  # type of its values, in words
    literal: str  # the default as JSON, as it is typed in a shell
    help: str


class RunFailed(Exception):
    """A notebook did not run to its end; the message says why and where the executed notebook lies."""


def find_notebooks(folder: str | None = None) -> list[Path]:
    """Find the notebooks in `folder`; without one, those in ./notebooks, else a wheel's, else those of the checkout."""
    usual = [Path("notebooks"), CHECKOUT / "attnlab/notebooks", CHECKOUT / "notebooks"]
    for candidate in [Path(folder)] if folder else usual:
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


def needs_checkout(path: Path) -> bool:
    """Tell whether a notebook imports experiments/, of which a wheel has nothing, and there is none here."""
    if any((place / "experiments/__init__.py").exists() for place in (Path(), CHECKOUT)):
        return False
    return any(re.search(r"^(from|import) experiments\b", source, re.M) for _, source in _read_cells(path))


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


def result_folders(path: Path, values: dict[str, object], runs: Path) -> tuple[Path, Path]:
    """Return where a notebook works, runs/NN.unfinished-<hash of notebook and parameters>, and where its results go.

    ValueError where no folder can be made there.
    """
    number = path.stem.split("_")[0]
    defaults = {name: parameter.default for name, parameter in read_parameters(path).items()}
    meant = json.dumps([path.stem, {**defaults, **values}], sort_keys=True)
    work = runs / f"{number}.unfinished-{hashlib.sha256(meant.encode()).hexdigest()[:8]}"
    for folder in (work, runs / number):
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            raise ValueError(f"{folder} is a link or a file, and a folder goes there: move it, or use --runs FOLDER")
    try:
        runs.mkdir(parents=True, exist_ok=True)
        if not os.access(runs, os.W_OK):
            raise PermissionError(errno.EACCES, "it is read-only")
    except OSError as error:
        raise ValueError(f"cannot write results to {runs}: {error.strerror}; name another: --runs FOLDER") from None
    return work, runs / number


def run_notebook(path: Path, values: dict[str, object], runs: Path) -> tuple[Path, Path | None]:
    """Run a notebook; return its folder, runs/NN, with the executed notebook, its figures, metrics.json.

    The notebook works in a folder of its own, which is renamed after the last cell: runs/NN is always one whole result,
    the last good one. Where a run fails or is killed that folder stays, and the same parameters go on in it; if nothing
    was written yet, the notebook alone is kept, as runs/NN.failed.ipynb.

    An earlier runs/NN is replaced if it is as its run left it. If something was added or changed it is kept, as
    runs/NN.kept-1, -2, ...: that is the second path, otherwise None.
    """
    work, final = result_folders(path, values, runs)
    try:
        with FileLock(runs / f".{final.name}.lock", timeout=0):
            work.mkdir(exist_ok=True)
            _execute(path, work, values)
            return final, _settle(work, final)
    except Timeout:
        raise RunFailed(f"{final} is being made by another run: wait for it, or name a place: --runs FOLDER") from None


def _execute(path, work, values):
    """Run a notebook in a folder; RunFailed or KeyboardInterrupt where it does not run to its end."""
    import papermill  # late: listing notebooks and refusing a parameter must be quick
    from ipykernel.kernelspec import get_kernel_dict
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec

    class ThisPython(AsyncKernelManager):  # this interpreter, even where another is registered as `python3`
        # no log of the kernel's own, no talk of frozen modules: what the notebook says is in its cells
        kernel_spec = KernelSpec(**get_kernel_dict(["--log-level=50"], ["-Xfrozen_modules=off"]))

    logging.getLogger("papermill").setLevel(logging.ERROR)  # it warns of lines that its own reader cannot parse
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # it tells of the cell that an interrupted run leaves
    if "out" in read_parameters(path):
        values = {**values, "out": work.as_posix()}
    kernel = {"kernel_name": "python3", "language": "python", "kernel_manager_class": ThisPython}
    executed = work / path.name
    try:
        with warnings.catch_warnings(action="ignore"):  # of the libraries that start the kernel, not of the notebook
            papermill.execute_notebook(path, executed, values, **kernel)
    except (Exception, KeyboardInterrupt) as error:
        if hasattr(error, "exec_count"):  # papermill's account of an exception in a cell, which it has marked
            fault = f"In [{error.exec_count}]: {error.ename}: {error.evalue}"
        else:
            fault = "interrupted" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"
            _mark(executed, path, fault)
        go_on = "\n  the same parameters go on with what lies there"
        if [*work.iterdir()] == [executed]:  # nothing to go on with
            executed, go_on = executed.replace(work.with_suffix(".failed.ipynb")), ""
            work.rmdir()
        kind = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else RunFailed
        message = f"{path.stem} failed: {fault}\n  the notebook, with the error marked: {executed}{go_on}"
        raise kind(message) from error


def _mark(executed, original, text):
    """Write into the notebook where it stopped: papermill does so for an exception, not for a kernel that died."""
    content = json.loads((executed if executed.exists() else original).read_text("utf-8"))
    started = [n for n, cell in enumerate(content["cells"]) if cell["metadata"].get("papermill", {}).get("start_time")]
    note = {"cell_type": "markdown", "id": "stopped-here", "metadata": {}, "source": f"## Stopped here: {text}"}
    content["cells"].insert(max(started, default=0), note)
    executed.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")


def _settle(work, final):
    """Give a folder its final name, also inside its files; return where an earlier one is kept, or None."""
    for file in [*work.glob("*.ipynb"), *work.glob("*.json")]:
        file.write_bytes(file.read_bytes().replace(work.as_posix().encode(), final.as_posix().encode()))
    (work / _WRITTEN).write_text(json.dumps(_files(work)), "utf-8")
    replaced, kept = final.with_name(f".{final.name}.replaced"), None
    shutil.rmtree(replaced, ignore_errors=True)  # of a run that was killed in the lines below
    if final.exists():
        if not _untouched(final):
            numbered = (final.with_name(f"{final.name}.kept-{k}") for k in itertools.count(1))
            kept = next(path for path in numbered if not path.exists())
        final.rename(kept or replaced)
    work.rename(final)
    shutil.rmtree(replaced, ignore_errors=True)
    return kept


def _files(folder):
    """Tell the files of a folder: {name: [size, time of last change]}; JupyterLab's own copies do not count."""
    paths = [path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()]
    names = {path.relative_to(folder): path.lstat() for path in paths}
    return {
        name.as_posix(): [stat.st_size, stat.st_mtime_ns]
        for name, stat in names.items()
        if name.name != _WRITTEN and ".ipynb_checkpoints" not in name.parts
    }


def _untouched(folder):
    """Return whether a folder has no other files than its run wrote, and these unchanged."""
    try:
        return _files(folder).items() <= json.loads((folder / _WRITTEN).read_text("utf-8")).items()
    except (OSError, ValueError, AttributeError):
        return False
