"""One training loop: cosine schedule with restarts, moving average, curve, checkpoints, resume, early stop.

A batch depends on the seed and the step number alone, so a run that was stopped and resumed draws the same batches.
"""

import csv
import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm


@dataclass(frozen=True)
class Schedule:
    steps: int  # optimizer steps in all
    lr: float  # highest learning rate
    cycles: int = 1  # of the cosine, which restarts at the highest rate (Loshchilov and Hutter, ICLR 2017)
    warmup: int = 100  # steps of linear rise at the beginning of a cycle
    ema: float = 0.998  # decay of the moving average that is shipped
    weight_decay: float = 0.01
    clip: float = 1.0  # largest gradient norm
    checkpoint: int = 250  # steps between checkpoints
    seed: int = 0

    def factor(self, step: int) -> float:
        """Share of the highest rate at a step."""
        length = self.steps / self.cycles
        within = step % length
        rise = min(1.0, (within + 1) / self.warmup)
        return rise * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * within / length)))


Loss = Callable[[torch.nn.Module, torch.Generator], dict[str, torch.Tensor]]


@contextmanager
def seeded(seed: int):
    """Within the block PyTorch's own randomness, which starting weights come from, follows from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def train(
    model: torch.nn.Module,
    loss: Loss,
    schedule: Schedule,
    folder: Path,
    check: Callable[[torch.nn.Module], float] | None = None,
    patience: int = 5,
) -> torch.nn.Module:
    """Train `model` in place and return its moving average.

    `loss(model, generator)` draws a batch with the generator and returns named terms; "loss" is minimized, all are
    written to `folder/curve.csv`. A checkpoint in `folder` is continued from.

    `check` judges the moving average on held-out data at every checkpoint, the lower the better: then the best one is
    returned, and training ends when `patience` checks in a row were no better. They are written to `folder/checks.csv`.

    FloatingPointError where the loss is not finite: the last checkpoint stays.
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
    for step in (bar := tqdm(range(first, schedule.steps), initial=first, total=schedule.steps, desc=folder.name)):
        if check and _is_over(folder, patience):
            break
        generator = torch.Generator().manual_seed(schedule.seed * 1_000_003 + step)
        with torch.autocast(device.type, torch.bfloat16):
            terms = loss(model, generator)
        values = {name: float(term.detach()) for name, term in terms.items()}
        if not math.isfinite(values["loss"]):
            last = step // schedule.checkpoint * schedule.checkpoint
            kept = f"step {last}" if last else "no step"
            raise FloatingPointError(
                f"the loss is {values['loss']} at step {step}; {folder} keeps {kept}: try a lower lr"
            )
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
            _save(state, step + 1, folder)
    if check:
        average.module.load_state_dict(torch.load(folder / "best.pt", weights_only=True))
    return average.module.eval()


def checks(folder: Path) -> list[tuple[int, float]]:
    """(steps done, held-out error) of each check so far."""
    path = folder / "checks.csv"
    rows = list(csv.reader(path.read_text().splitlines()))[1:] if path.exists() else []
    return [(int(step), float(error)) for step, error in rows]


def _compare(check, model, step, folder):
    """Judge a moving average, and keep it if it is the best so far."""
    earlier = [error for at, error in checks(folder) if at < step]
    error = check(model.eval())
    if not earlier or error < min(earlier):
        part = folder / "best.part"
        torch.save(model.state_dict(), part)
        part.replace(folder / "best.pt")
    _log(folder / "checks.csv", step, {"error": error})


def _is_over(folder, patience):
    errors = [error for _, error in checks(folder)]
    return bool(errors) and len(errors) - 1 - errors.index(min(errors)) >= patience


def _save(state, step, folder):
    part = folder / "checkpoint.part"
    torch.save({"step": step} | {name: part_.state_dict() for name, part_ in state.items()}, part)
    part.replace(folder / "checkpoint.pt")


def _resume(state, folder) -> int:
    """Load the checkpoint, if any; drop the curve's lines behind it; return the step to begin with."""
    path, curve = folder / "checkpoint.pt", folder / "curve.csv"
    if not path.exists():
        for stale in (curve, folder / "checks.csv"):
            stale.unlink(missing_ok=True)
        return 0
    saved = torch.load(path, map_location="cpu", weights_only=True)
    for name, part in state.items():
        part.load_state_dict(saved[name])
    _cut(curve, saved["step"] - 1)
    _cut(folder / "checks.csv", saved["step"])
    return saved["step"]


def _cut(path, last):
    """Drop the lines of steps after the last one, if there are any."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    kept = lines[:1] + [line for line in lines[1:] if int(line.split(",")[0]) <= last]
    if kept != lines:  # a finished run is only read, so that several processes can load it
        part = path.with_suffix(".part")
        part.write_text("".join(kept))
        part.replace(path)


def _log(path, step, values):
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(["step", *values])
        writer.writerow([step, *(f"{v:.5f}" for v in values.values())])


def averaged(folder: Path) -> tuple[int, dict[str, torch.Tensor]]:
    """Steps done and the moving average's parameters in the checkpoint in `folder`."""
    saved = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
    average = {k.removeprefix("module."): v for k, v in saved["average"].items() if k.startswith("module.")}
    return saved["step"], average


def thin_curve(source: Path, target: Path, rows: int = 200) -> None:
    """Copy a curve, mean values of blocks of steps, `rows` of them at most."""
    curve = np.genfromtxt(source, delimiter=",", names=True)
    blocks = np.array_split(np.stack([curve[n] for n in curve.dtype.names], 1), min(rows, len(curve)))
    with target.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(curve.dtype.names)
        writer.writerows([round(float(v), 5) for v in block.mean(0)] for block in blocks)
