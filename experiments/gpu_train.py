"""Train the bundled street models on one GPU within some minutes; the same call goes on where time was up.

    python -m experiments.gpu_train                  # everything, about 5 minutes on an H200
    python -m experiments.gpu_train --minutes 3      # after 3 minutes the denoisers write checkpoints and pause
    python -m experiments.gpu_train mmdit            # the joint-attention model alone, by `train_mmdit`, also 5 minutes

Weights and curves go to runs/tiny-gpu/models; what else `train_street` takes, --steps or --start for example, can be
given, too. Without a GPU it trains on the CPU, with the batches of a GPU, slowly.
"""

import sys
from collections.abc import Sequence

from .bundled import train_mmdit, train_street

__all__ = ["main"]

_STAGES = ("vae", "denoiser", "denoiser-plain", "segmenter", "export")


def main(arguments: Sequence[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else list(arguments)
    if {"-h", "--help"} & set(given):
        print(__doc__)
    if given[:1] == ["mmdit"]:
        return train_mmdit.main(["--preset", "gpu", *given[1:]])
    train_street.main([*_STAGES, "--preset", "gpu", *given])


if __name__ == "__main__":
    main()
