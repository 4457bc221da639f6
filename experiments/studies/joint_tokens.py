"""Measure tokens that are fitted to a few masks in joint attention's output space, beside the words they start from.

Rendered scenes are noised at three levels and read beside every word, in the blocks whose outputs were best in
`joint_maps` (at whatever level of noise). A token is fitted to two scenes of its class, several times to others, and
measured on scenes that no token saw. "token" and "word" have the threshold, a fraction of each map's range, that is
best on the same two scenes; "token above 0" has none: it is the zero level that the fit found.

    python -m experiments.studies.joint_tokens                # of `tiny-mmdit`
    python -m experiments.studies.joint_tokens --model FOLDER --layers 1 2
"""

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

import attnlab as al
from attnlab.learning.fit import Whitening
from attnlab.metrics import check_counts
from attnlab.recording.adapters import adapter_of
from attnlab.recording.checks import own_size
from attnlab.scenes import street
from attnlab.storage import write_text

from ..bundled.cards import markdown_table
from ..bundled.localize import TIMESTEPS
from .few_shot import CAPTION_WORDS, FIRST_TRAIN_SEED, ScenePool, interval_over_draws
from .joint_maps import JOINT_MAPS_RESULTS

__all__ = ["FIRST_CARRIED_TO", "FIRST_FITTED", "JointTokensStudy", "chosen_layers", "main", "tokens_table"]

FIRST_FITTED = FIRST_TRAIN_SEED  # first seed of the scenes that tokens are fitted to
FIRST_CARRIED_TO = street.HELD_OUT + 900_000  # and of those that they are measured on
_ROWS = ("word", "token", "token above 0")
_RESULTS = Path(__file__).parents[1] / "results" / "joint_tokens.json"
_log = logging.getLogger(__name__)


def chosen_layers(pipe, first: int, last: int) -> list[str]:
    """Return the names of joint attentions from a number to another one; ValueError where one is not there."""
    names = list(adapter_of(pipe).attentions)
    if not 0 <= first <= last < len(names):
        raise ValueError(f"layers {first} to {last}: the model has blocks 0 to {len(names) - 1}, the first one first")
    return names[first : last + 1]


@dataclass(frozen=True)
class JointTokensStudy:
    """A model, the blocks that are read, and how many scenes of each class."""

    pipe: object
    layers: Sequence[str]
    names: Sequence[str] = street.CLASSES
    shots: int = 2  # scenes that a token is fitted to
    draws: int = 4  # times, of other scenes each
    tests: int = 30  # scenes of each class that it is measured on, at most
    scenes: int = 240  # that are rendered to find these among, for fits and for tests

    def __post_init__(self):
        check_counts(shots=self.shots, draws=self.draws, tests=self.tests, scenes=self.scenes)

    def pool(self, first: int) -> ScenePool:
        """Render and record the scenes with seeds first, first + 1, ..., each read beside the word of every class."""
        texts = list(dict.fromkeys(CAPTION_WORDS.get(name, name) for name in self.names))
        options = {"timesteps": TIMESTEPS, "layers": list(self.layers), "texts": texts, "outputs": True}
        found, size = ScenePool([]), own_size(self.pipe)
        for number in tqdm(range(first, first + self.scenes), desc="scenes"):
            scene = street.render(number, size)
            recording = al.record_image(self.pipe, scene.image, scene.caption, generator=al.seed(number), **options)
            found.scenes.append(scene)
            found.maps.append(al.linear_daam(recording))
        return found

    def run(self) -> dict[str, np.ndarray]:
        """Return the IoU (draw, scene, class) of words and tokens, NaN where a scene is no test of a class."""
        fitted, others = self.pool(FIRST_FITTED), self.pool(FIRST_CARRIED_TO)
        unlabeled = Whitening.of(fitted.maps)
        rows = {row: np.full((self.draws, self.scenes, len(self.names)), np.nan) for row in _ROWS}
        for k, name in enumerate(tqdm(self.names, desc="classes")):
            word, numbers = CAPTION_WORDS.get(name, name), others.examples(name)[: self.tests]
            tests = [others.maps[i] for i in numbers], others.masks(name, numbers)
            for draw in range(self.draws):
                some = fitted.examples(name, self.shots, draw)
                seen = [fitted.maps[i] for i in some], fitted.masks(name, some)
                token = al.fit_token(*seen, word, name=name, unlabeled=unlabeled)
                for row, one in (("word", word), ("token", token)):
                    cut = al.best_words(*seen, [one])[0].threshold
                    rows[row][draw, numbers, k] = al.transfer_matrix([one], *tests, cut)[0]
                rows["token above 0"][draw, numbers, k] = al.transfer_matrix([token], *tests)[0]
        return rows

    def summary(self, rows: dict[str, np.ndarray]) -> dict:
        """Return means over classes with 95% intervals over draws and scenes, gains over words, means of classes."""
        found = {row: interval_over_draws(values) for row, values in rows.items()}
        gains = {row: interval_over_draws(rows[row], rows["word"]) for row in _ROWS[1:]}
        classes = {
            name: {row: float(np.nanmean(values[..., k])) for row, values in rows.items()}
            for k, name in enumerate(self.names)
        }
        counts = {name: getattr(self, name) for name in ("shots", "draws", "tests", "scenes")}
        return {"layers": list(self.layers), **counts, "IoU": found, "gain over the word": gains, "classes": classes}


def tokens_table(found: dict) -> str:
    """Tabulate words and tokens: mean IoU over classes, and the gain over words, with 95% intervals."""
    rows = []
    for row, value in found["IoU"].items():
        gain = found["gain over the word"].get(row)
        rows.append([row, "{:.3f} ({:.3f} to {:.3f})".format(*value)])
        rows[-1].append("" if gain is None else "{:+.3f} ({:+.3f} to {:+.3f})".format(*gain))
    return markdown_table(["", "IoU", "gain"], rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-mmdit", help="as load_pipeline takes it")
    parser.add_argument(
        "--layers", type=int, nargs=2, metavar=("FIRST", "LAST"), help="blocks by number; what joint_maps chose"
    )
    for name in ("shots", "draws", "tests", "scenes"):
        parser.add_argument(f"--{name}", type=int, default=getattr(JointTokensStudy, name))
    parser.add_argument("--out", type=Path, default=_RESULTS, help="file of results")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    pipe = al.load_pipeline(given.model)
    span = given.layers
    if span is None:
        found = json.loads(JOINT_MAPS_RESULTS.read_text())
        if found["model"] != str(given.model):
            parser.error(f"which blocks are best is known of {found['model']} alone: give --layers, or run joint_maps")
        span = [found["chosen"]["output"][name] for name in ("first", "last")]
    counts = {name: getattr(given, name) for name in ("shots", "draws", "tests", "scenes")}
    study = JointTokensStudy(pipe, chosen_layers(pipe, *span), **counts)
    found = {"model": str(given.model), **study.summary(study.run())}
    write_text(given.out, json.dumps(found, indent=1) + "\n")
    _log.info("%s", tokens_table(found))


if __name__ == "__main__":
    main()
