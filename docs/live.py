"""Write the data of the live page: `python docs/live.py` draws six images and stores what docs/live/index.html shows.

`docs/live/data.js` is JavaScript of one line, since a page that is opened as a file may load scripts and nothing else.
It holds the images, the matrix of each one's `LinearMap`, and the embedding of every word by itself.
"""

import base64
import io
import json
import sys
from pathlib import Path

import numpy as np
import torch

import attnlab as al
from attnlab.scenes.captions import CLASS_OF, COLORS
from attnlab.storage import write_text

__all__ = ["CALL", "FILE", "PROMPTS", "WORDS", "draw", "main", "read", "unpack"]

FILE = Path(__file__).parent / "live/data.js"
MODEL = "tiny"
CALL = {"num_inference_steps": 20, "guidance_scale": 4}
PROMPTS = (  # with seeds whose images show what was asked
    ("a burning house with fire, thick smoke, a tree and grass at night", 1),
    ("a red car and a person in blue on a road with trees and mountains", 0),
    ("a cyclist on a red bicycle, a street, buildings, trees and a blue sky in a city", 3),
    ("a traffic light on a pole, a yellow car, a sidewalk and buildings at dusk", 2),
    ("a flooded neighbourhood with houses, trees and water on a cloudy day", 2),
    ("a river, mountains, a tree, snow and a white sky in winter", 0),
)
WORDS = {  # all words of the captions, in the groups that the page shows
    "Things": (*CLASS_OF, "shirt"),
    "Colors": (*COLORS, "dark"),
    "Where, when": tuple(
        "city town urban countryside neighbourhood environment day night dusk evening winter sunny cloudy snowy".split()
    ),
    "Others": tuple(
        "two three near next beside left right front behind thick photo picture image view "
        "a an the and with of in on at to".split()
    ),
}
_HEAD = "const DATA = "


def draw(pipe, prompt: str, seed: int):
    """Draw an image of a prompt; return it and the `LinearMap` of its recording."""
    with al.record(pipe, keep="sum") as recording:
        image = pipe(prompt, generator=al.seed(seed), **CALL).images[0]
    return image, al.linear_daam(recording)


def main() -> int:
    """Draw the images and write the file."""
    pipe = al.load_pipeline(MODEL)
    pipe.set_progress_bar_config(disable=True)
    drawn = [draw(pipe, *chosen) for chosen in PROMPTS]
    vectors = torch.stack([drawn[0][1].embed(word) for group in WORDS.values() for word in group])
    highest = max(float((linear @ vectors).max()) for _, linear in drawn)
    data = {"model": MODEL, "words": WORDS, "vectors": _pack(vectors), "highest": highest, "images": []}
    for (prompt, seed), (image, linear) in zip(PROMPTS, drawn, strict=True):
        matrix = torch.cat([linear.matrix, linear.bias[:, None]], 1)  # the bias is the last column
        shown = {"png": _png(image), "size": linear.size, "matrix": _pack(matrix)}
        data["images"].append({"prompt": prompt, "seed": seed, **shown})
    write_text(FILE, f"{_HEAD}{json.dumps(data)};\n")
    print(f"{FILE}: {FILE.stat().st_size / 1e3:.0f} kB, {len(vectors)} words, highest score {highest:.2f}")
    return 0


def read(file: Path = FILE) -> dict:
    """Read what `main` wrote, as JSON types."""
    return json.loads(file.read_text("utf-8").removeprefix(_HEAD).rstrip(";\n"))


def unpack(packed: dict) -> np.ndarray:
    """Return a packed matrix, float32 (row, column)."""
    numbers = np.frombuffer(base64.b64decode(packed["float16"]), "<f2").astype(np.float32)
    return numbers.reshape(-1, packed["columns"]) * packed["scale"]


def _pack(matrix: torch.Tensor) -> dict:
    """Return a matrix in half precision as JSON types, its largest number 1: small ones would lose digits."""
    scale = float(matrix.abs().max())
    numbers = (matrix / scale).numpy().astype("<f2")
    return {"columns": matrix.shape[1], "scale": scale, "float16": base64.b64encode(numbers.tobytes()).decode()}


def _png(image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


if __name__ == "__main__":
    sys.exit(main())
