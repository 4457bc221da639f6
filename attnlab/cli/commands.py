"""List the notebooks of attnlab, run them with parameters, check the installation; make labeled data sets.

attnlab list
attnlab run 04 -p prompt "forest fire with smoke" -p word smoke -p seed 3
attnlab check
attnlab dataset make flood-tiny floods
"""

import argparse
import os
import re
import signal
import subprocess
import sys
from importlib import metadata, util
from pathlib import Path

from . import runner
from .dataset import add_dataset_command, run_dataset

__all__ = ["list_files", "main"]

_CHECKOUT = "needs the repository, whose folder experiments/ it imports: run it in a checkout, after pip install -e ."


def _list(paths):
    """Print each notebook with its parameters: name, type, default, help; return 0."""
    for path in paths:
        print(f"{path.stem}  {runner.read_title(path)}")
        if runner.needs_checkout(path):
            print(f"  {_CHECKOUT}")
        rows = [(f"  {name}", *parameter[1:]) for name, parameter in runner.read_parameters(path).items()]
        widths = [min(max(len(row[column]) for row in rows), 44) for column in range(3)] if rows else []
        for *cells, text in rows:
            print(*(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)), text, sep="  ")
        print(flush=True)
    return 0


def _run(paths, typed, runs):
    """Run notebooks one after another and return how many failed; all that was typed is checked first."""
    jobs = [(path, runner.check_parameters(path, typed)) for path in paths]
    if lacking := [path.stem for path in paths if runner.needs_checkout(path)]:
        raise ValueError(f"{', '.join(lacking)}: {_CHECKOUT}; `attnlab list` shows which do not")
    for job in jobs:
        runner.result_folders(*job, runs)
    failed = 0
    for path, values in jobs:
        print(f"{path.stem}: running", flush=True)
        try:
            folder, kept = runner.run_notebook(path, values, runs)
            files = [file for file in list_files(folder) if file != folder / path.name]
            print(f"{path.stem}: done; the notebook with its results, and the files it made:")
            print("", folder / path.name, *files, sep="\n  ", end="\n\n")
            if kept:
                print(f"{folder} had files that were added or changed after its run: it is kept as {kept}\n")
        except runner.RunFailed as error:
            failed += 1
            print(f"attnlab: {error}", file=sys.stderr)
    if failed and len(jobs) > 1:
        print(f"attnlab: {failed} of {len(jobs)} notebooks failed", file=sys.stderr)
    return failed


def list_files(folder: Path, most: int | None = None) -> list[Path | str]:
    """List the files in a folder and in those below it, sorted; below it, only the number of more than a dozen.

    Files whose names begin with a dot are left out.
    """
    files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    below = [entry for each in sorted(f for f in folder.iterdir() if f.is_dir()) for entry in list_files(each, 12)]
    return [*(files if most is None or len(files) <= most else [f"{folder}/ ({len(files)} files)"]), *below]


def _check(model):
    """Print versions, device, model, and what is left for the user to do; return how many things that is."""
    todo = []
    constraints = runner.CHECKOUT / "constraints.txt"
    tested = dict(re.findall(r"^(\S+)==(\S+)$", constraints.read_text(), re.M)) if constraints.exists() else {}
    print(f"{'python':14} {sys.version.split()[0]}")
    required = "\n".join(line for found in metadata.distributions(name="attnlab") for line in found.requires or ())
    for name in dict.fromkeys(["attnlab", *re.findall(r"^[\w-]+(?=[^;\n]*$)", required, re.M)]):  # installs may be two
        try:
            version = metadata.version(name)
            other = tested.get(name, version.split("+")[0]) != version.split("+")[0]
            print(f"{name:14} {version}" + (f"  (tested with {tested[name]})" if other else ""))
        except metadata.PackageNotFoundError:
            todo.append(f"{name} is missing: pip install {'-c constraints.txt -e .' if tested else name}")
    if util.find_spec("torchvision"):  # in a process of its own, since half an import cannot be taken back
        probe = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, text=True)
        reason = (probe.stderr.strip().splitlines() or [f"exit status {probe.returncode}"])[-1]
        print(f"{'torchvision':14} {'not needed, does no harm' if probe.returncode == 0 else 'broken: ' + reason}")
        if probe.returncode:
            todo.append("torchvision breaks diffusers with this torch and is not needed: pip uninstall torchvision")
    if not todo:
        try:
            import torch

            from ..pipelines import load_pipeline
            from .hardware import describe_hardware

            for name, text in describe_hardware():
                print(f"{name:14} {text}", flush=True)
            pipe = load_pipeline(model)
            print(f"{'device':14} {pipe.device}, {torch.get_num_threads()} CPU threads")
            print(f"{'model':14} {model}: found")
        except Exception as error:  # whatever stops the model from loading is what the user has to know
            todo.append(f"model {model}: {error}")
    numbered = [f"  {number}. {line}" for number, line in enumerate(todo, 1)]
    print("\nto do:" if todo else "all is well", *numbered, sep="\n")
    return len(todo)


def main(argv: list[str] | None = None) -> int:
    """Run a command line; return 0, 1 for a failed run or check, 2 for a line that cannot be run.

    And as shells do, 130 on Ctrl-C, 141 where nobody reads on.
    """
    parser = argparse.ArgumentParser("attnlab", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--version", action="version", version=f"attnlab {sys.modules['attnlab'].__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="list | run | check | dataset")
    lister = commands.add_parser("list", help="the notebooks and their parameters, with defaults and help")
    run = commands.add_parser("run", help="run notebooks; results go to runs/NN/")
    check = commands.add_parser("check", help="versions, device, model: all well, or what to do")
    run.add_argument("notebook", nargs="+", help="number or name, as `attnlab list` shows them, or all")
    run.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="set a parameter")
    run.add_argument("--runs", type=Path, default=Path("runs"), metavar="FOLDER", help="where results go (runs)")
    for each in (lister, run):
        each.add_argument("--notebooks", metavar="FOLDER", help="where the notebooks are (notebooks)")
    check.add_argument("--model", default="tiny", help="the model to look for: name, folder or hub id (tiny)")
    add_dataset_command(commands)
    args = parser.parse_args(argv)
    try:
        if args.command == "check":
            return min(_check(args.model), 1)
        if args.command == "dataset":
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            return run_dataset(args)
        found = runner.find_notebooks(args.notebooks)
        if args.command == "list":
            return _list(found)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a cluster's way to say Ctrl-C: keep what ran so far
        chosen = found if args.notebook == ["all"] else [runner.pick_notebook(found, name) for name in args.notebook]
        return min(_run(chosen, args.p, args.runs), 1)
    except BrokenPipeError:  # who read this, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would fail once more at its end
        return 141
    except (ValueError, OSError, ImportError) as error:
        print(f"attnlab: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"\nattnlab: {str(stop) or 'stopped'}", file=sys.stderr)
        return 130
