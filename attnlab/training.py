"""Train a model: cosine schedule with restarts, moving average, curve, checkpoints, resume, early stop.

A batch depends on the seed and the step number alone, so a run that was stopped and resumed draws the same batches.
"""

import csv
import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from .storage import replacing, write_text

__all__ = ["Schedule", "checks", "run_training", "seeded"]


@dataclass(frozen=True)
class Schedule:
    """How long a model is trained, and at which learning rates."""

    steps: int  # optimizer steps in all
    lr: float  # highest learning rate
    cycles: int = 1  # of the cosine, which restarts at the highest rate (Loshchilov and Hutter, ICLR 2017)
    warmup: int = 100  # steps of linear rise at the beginning of a cycle
    ema: float = 0.998  # decay of the moving average that is returned
    weight_decay: float = 0.01
    clip: float = 1.0  # largest gradient norm
    checkpoint: int = 250  # steps between checkpoints
    seed: int = 0

    def factor(self, step: int) -> float:
        """Return the learning rate at a step as a fraction of the highest one."""
        length = self.steps / self.cycles
        within = step % length
        rise = min(1.0, (within + 1) / self.warmup)
        return rise * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * within / length)))


@contextmanager
def seeded(seed: int):
    """Seed PyTorch's global generator, which draws starting weights, within the block."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def run_training(
    model: torch.nn.Module,
    loss: Callable[[torch.nn.Module, torch.Generator], dict[str, torch.Tensor]],
    schedule: Schedule,
    folder: Path,
    check: Callable[[torch.nn.Module], float] | None = None,
    patience: int = 5,
) -> torch.nn.Module:
    """Train a model in place, or go on from the checkpoint in `folder`, and return its moving average.

    FloatingPointError where the loss is not finite: the last checkpoint stays.

    Parameters
    ----------
    model : torch.nn.Module
        What is trained.
    loss : callable
        Draws a batch, given (model, generator), and returns named terms: "loss" is minimized, all go to curve.csv.
    schedule, folder : Schedule, Path
        Steps and learning rates; where checkpoint.pt and curve.csv go, with `check` also checks.csv and best.pt.
    check : callable, optional
        Returns the error, on held-out data, of the moving average, at every checkpoint. The best average is returned.
    patience : int
        Training ends after so many checks in a row without a lower error.
    """
    folder.mkdir(parents=True, exist_ok=True)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(schedule.ema))
    decay = schedule.weight_decay
    optimizer = torch.optim.AdamW(model.parameters(), schedule.lr, (0.9, 0.99), weight_decay=decay, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.factor)
    state = {"model": model, "average": average, "optimizer": optimizer, "rate": scheduler}
    first = _resume(state, folder)
    model.train()
    device = next(model.parameters()).device
    bar = tqdm(range(first, schedule.steps), initial=first, total=schedule.steps, desc=folder.name)
    for step in bar:
        if check and _is_over(folder, patience):
            break
        generator = torch.Generator().manual_seed(schedule.seed * 1_000_003 + step)
        with torch.autocast(device.type, torch.bfloat16):
            terms = loss(model, generator)
        values = {name: float(term.detach()) for name, term in terms.items()}
        if not math.isfinite(values["loss"]):
            last = step // schedule.checkpoint * schedule.checkpoint
            kept = f"{folder} keeps step {last}" if last else f"{folder} keeps no step"
            raise FloatingPointError(f"the loss is {values['loss']} at step {step}; {kept}: try a lower lr")
        optimizer.zero_grad(set_to_none=True)
        terms["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), schedule.clip)
        optimizer.step()
        scheduler.step()
        average.update_parameters(model)
        bar.set_postfix({name: f"{value:.3f}" for name, value in values.items()}, refresh=False)
        _log(folder / "curve.csv", step, values)
        if (step + 1) % schedule.checkpoint == 0 or step + 1 == schedule.steps:
            if check:
                _compare(check, average.module, step + 1, folder)
            with replacing(folder / "checkpoint.pt") as part:
                torch.save({"step": step + 1} | {name: value.state_dict() for name, value in state.items()}, part)
    if check:
        average.module.load_state_dict(torch.load(folder / "best.pt", weights_only=True))
    return average.module.eval()


def checks(folder: Path) -> list[tuple[int, float]]:
    """Return (steps done, held-out error) of each check so far."""
    path = folder / "checks.csv"
    rows = list(csv.reader(path.read_text().splitlines()))[1:] if path.exists() else []
    return [(int(step), float(error)) for step, error in rows]


def _compare(check, model, step, folder):
    """Check a moving average, and keep it if it is the best so far."""
    earlier = [error for at, error in checks(folder) if at < step]
    error = check(model.eval())
    if not earlier or error < min(earlier):
        with replacing(folder / "best.pt") as part:
            torch.save(model.state_dict(), part)
    _log(folder / "checks.csv", step, {"error": error})


def _is_over(folder, patience):
    errors = [error for _, error in checks(folder)]
    return bool(errors) and len(errors) - 1 - errors.index(min(errors)) >= patience


def _resume(state, folder) -> int:
    """Load the checkpoint, if any, drop later lines of the curve, and return the step to begin with."""
    path, curve, compared = (folder / name for name in ("checkpoint.pt", "curve.csv", "checks.csv"))
    if not path.exists():
        curve.unlink(missing_ok=True)
        compared.unlink(missing_ok=True)
        return 0
    saved = torch.load(path, map_location="cpu", weights_only=True)
    for name, part in state.items():
        part.load_state_dict(saved[name])
    _cut(curve, saved["step"] - 1)
    _cut(compared, saved["step"])
    return saved["step"]


def _cut(path, last):
    """Drop the lines of steps after the last one, if there are any."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    kept = lines[:1] + [line for line in lines[1:] if int(line.split(",")[0]) <= last]
    if kept != lines:  # a finished run is only read, so that several processes can load it
        write_text(path, "".join(kept))


def _log(path, step, values):
    header = [] if path.exists() else [["step", *values]]
    with path.open("a", newline="") as file:
        csv.writer(file).writerows([*header, [step, *(f"{v:.5f}" for v in values.values())]])
