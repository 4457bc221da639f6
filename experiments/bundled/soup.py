"""Average the weights of bundled models that went on from the same one by different ways: a model soup.

    python -m experiments.bundled.soup runs/branch-a3/models runs/branch-b2/models --out attnlab/models

Each of the folders holds the same pipelines. Trained from one start, they lie close enough together for the mean of
their weights to be a model as well, and often a better one than each: what chance did to one alone is thinned
(Wortsman et al., ICML 2022). It takes no longer to run. All but the weights, the curve of its training too, is the
first one's; a card and measurements that lie in --out stay.
"""

import argparse
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

__all__ = ["average_weights", "main"]

_log = logging.getLogger(__name__)


def average_weights(sources: Sequence[Path], target: Path) -> None:
    """Write the mean of pipelines' weights, computed in float32 and stored as the first one's, and all else of that.

    ValueError where they are not of one kind, before anything is written.
    """
    files = {path.relative_to(sources[0]) for path in sources[0].rglob("*.safetensors")}
    for other in sources[1:]:
        found = {path.relative_to(other) for path in other.rglob("*.safetensors")}
        if differing := files ^ found:
            raise ValueError(f"{sources[0]} and {other} are not of one kind: one has {', '.join(map(str, differing))}")
        for file in files:
            if _shapes(sources[0] / file) != _shapes(other / file):
                raise ValueError(f"{file} of {sources[0]} and of {other} hold tensors of other names or sizes")
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=target.parent) as folder:
        part = shutil.copytree(sources[0], Path(folder) / target.name)
        for file in files:
            with safe_open(sources[0] / file, "pt") as first:
                metadata = first.metadata()
            save_file(_mean([load_file(source / file) for source in sources]), part / file, metadata)
        shutil.copytree(part, target, dirs_exist_ok=True)


def _shapes(file):
    with safe_open(file, "pt") as tensors:
        return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}


def _mean(states):
    means = {name: torch.stack([state[name].float() for state in states]).mean(0) for name in states[0]}
    return {name: mean.to(states[0][name].dtype) for name, mean in means.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Average every pipeline that all folders hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="folders of exported models, two or more")
    parser.add_argument("--out", type=Path, required=True, help="folder to which the averages go")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    named = [{path.parent.name for path in folder.glob("*/model_index.json")} for folder in given.folders]
    if len(named) < 2 or not set.intersection(*named):
        parser.error("name two folders or more that hold the same pipeline, such as tiny/model_index.json")
    for name in sorted(set.intersection(*named)):
        average_weights([folder / name for folder in given.folders], given.out / name)
        _log.info("%s is in %s", name, given.out)


if __name__ == "__main__":
    main()
