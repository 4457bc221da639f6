"""Train a model: cosine schedule with restarts, moving average, curve, checkpoints, resume, early stop.

A batch depends on the seed and the step number alone, so a run that was stopped and resumed draws the same batches.
"""

import csv
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from .metrics import check_counts
from .pipelines import mixed_precision
from .storage import File, write, write_text

__all__ = ["Schedule", "checks", "load_checkpoint", "run_training", "save_checkpoint", "seeded"]


@dataclass(frozen=True)
class Schedule:
    """How long a model is trained, and at which learning rates; ValueError where a number is out of range."""

    steps: int  # optimizer steps in all
    lr: float  # highest learning rate
    cycles: int = 1  # of the cosine, which restarts at the highest rate (Loshchilov and Hutter, ICLR 2017)
    warmup: int = 100  # steps of linear rise at the beginning of a cycle
    ema: float = 0.998  # decay of the moving average that is returned
    weight_decay: float = 0.01
    clip: float = 1.0  # largest gradient norm
    checkpoint: int = 250  # steps between checkpoints
    seed: int = 0

    def __post_init__(self):
        check_counts(steps=self.steps, cycles=self.cycles, warmup=self.warmup, checkpoint=self.checkpoint)
        check_counts(0, seed=self.seed)
        tiny, limits = 1e-30, {"lr": math.inf, "clip": math.inf, "weight_decay": math.inf, "ema": 1, "seed": 10**12}
        for name, limit in limits.items():
            value, least = getattr(self, name), tiny if name in ("lr", "clip") else 0
            if not isinstance(value, Real) or not least <= value < limit:
                raise ValueError(f"{name}={value!r}: give a number {'above' if least else 'from'} 0, below {limit}")

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

    FloatingPointError where the loss, or the error of `check`, is not finite: the last checkpoint stays. ValueError
    where the folder has a checkpoint of another model, or of more steps.

    Parameters
    ----------
    model : torch.nn.Module
        What is trained.
    loss : callable
        Draws a batch, given (model, generator), and returns named terms: "loss" is minimized, all go to curve.csv.
    schedule, folder : Schedule, Path
        Steps and learning rates; where checkpoint.safetensors and curve.csv go, with `check` also checks.csv and
        best.safetensors.
    check : callable, optional
        Returns the error, on held-out data, of the moving average, at every checkpoint. The best average is returned.
    patience : int
        Training ends after so many checks in a row without a lower error.
    """
    check_counts(patience=patience)
    folder.mkdir(parents=True, exist_ok=True)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(schedule.ema))
    decay = schedule.weight_decay
    optimizer = torch.optim.AdamW(model.parameters(), schedule.lr, (0.9, 0.99), weight_decay=decay, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.factor)
    modules = {"model": model, "average": average}
    first = _resume(folder, modules, optimizer, scheduler)
    if first > schedule.steps:
        raise ValueError(f"{folder} has a training of {first} steps, longer than steps={schedule.steps}: name another")
    model.train()
    device = next(model.parameters()).device
    bar = tqdm(range(first, schedule.steps), initial=first, total=schedule.steps, desc=folder.name)
    for step in bar:
        if check and _is_over(folder, patience):
            break
        generator = torch.Generator().manual_seed(schedule.seed * 1_000_003 + step)
        with mixed_precision(device):
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
            metadata = {"step": step + 1, "rate": scheduler.state_dict()}
            save_checkpoint(folder / "checkpoint.safetensors", modules, optimizer, metadata)
    if check:
        load_checkpoint(folder / "best.safetensors", {"average": average.module})
    return average.module.eval()


def save_checkpoint(
    path: Path, modules: Mapping[str, torch.nn.Module], optimizer: torch.optim.Optimizer | None = None, metadata=None
) -> Path:
    """Write weights, and the optimizer's state, to one safetensors file, whole or not at all; return its path.

    Parameters
    ----------
    path, modules : Path, mapping from str to torch.nn.Module
        The file; what has weights, by name.
    optimizer : torch.optim.Optimizer, optional
        What the training goes on with.
    metadata : dict, optional
        What else is to be known, in JSON types.
    """
    parts, groups = {name: module.state_dict() for name, module in modules.items()}, []
    if optimizer:
        state = optimizer.state_dict()
        parts |= {f"optimizer/{number}": values for number, values in state["state"].items()}
        groups = [{k: float(v) if torch.is_tensor(v) else v for k, v in one.items()} for one in state["param_groups"]]
    # copies, as the format refuses tensors that share memory
    tensors = {f"{part}/{name}": x.cpu().clone() for part, values in parts.items() for name, x in values.items()}
    return write(path, "Checkpoint", tensors, (metadata or {}) | {"groups": groups})


def load_checkpoint(
    path: Path, modules: Mapping[str, torch.nn.Module], optimizer: torch.optim.Optimizer | None = None
) -> dict:
    """Load what `save_checkpoint` wrote into the same modules and optimizer; return the metadata.

    FileNotFoundError where there is no file; ValueError where it is damaged or of another model.

    Parameters
    ----------
    path, modules, optimizer
        As in `save_checkpoint`.
    """
    file, parts = File(path, "Checkpoint"), defaultdict(dict)
    for name in file.names:
        part, _, key = name.rpartition("/")
        parts[part][key] = file.read(name)
    try:
        for name, module in modules.items():
            module.load_state_dict(parts[name])
    except RuntimeError as error:
        raise ValueError(f"{path} is of another model: name another folder") from error
    if optimizer:
        parameters = [one for group in optimizer.param_groups for one in group["params"]]
        state = {int(part.split("/")[1]): values for part, values in parts.items() if part.startswith("optimizer/")}
        # fused optimizers take for granted that averages lie in memory as their parameter does
        state = {n: {k: _laid_out_as(parameters[n], x) for k, x in values.items()} for n, values in state.items()}
        optimizer.load_state_dict({"state": state, "param_groups": file.metadata["groups"]})
    return file.metadata


def _laid_out_as(parameter, values):
    same = values.shape == parameter.shape
    return torch.empty_like(parameter, dtype=values.dtype, requires_grad=False).copy_(values) if same else values


def checks(folder: Path) -> list[tuple[int, float]]:
    """Return (steps done, held-out error) of each check so far."""
    path = folder / "checks.csv"
    rows = list(csv.reader(path.read_text().splitlines()))[1:] if path.exists() else []
    return [(int(step), float(error)) for step, error in rows]


def _compare(check, model, step, folder):
    """Check a moving average, and keep it if it is the best so far."""
    earlier = [error for at, error in checks(folder) if at < step]
    error = check(model.eval())
    if not math.isfinite(error):
        raise FloatingPointError(f"the error on held-out data is {error} at step {step}: try a lower lr")
    if not earlier or error < min(earlier):
        save_checkpoint(folder / "best.safetensors", {"average": model})
    _log(folder / "checks.csv", step, {"error": error})


def _is_over(folder, patience):
    errors = [error for _, error in checks(folder)]
    return bool(errors) and len(errors) - 1 - errors.index(min(errors)) >= patience


def _resume(folder, modules, optimizer, scheduler) -> int:
    """Load the checkpoint, if any, drop later lines of the curve, and return the step to begin with."""
    path, curve, compared = (folder / name for name in ("checkpoint.safetensors", "curve.csv", "checks.csv"))
    if not path.exists():
        if (folder / "checkpoint.pt").exists():
            raise ValueError(f"{folder} has a checkpoint.pt, which earlier versions wrote: name another folder")
        curve.unlink(missing_ok=True)
        compared.unlink(missing_ok=True)
        return 0
    metadata = load_checkpoint(path, modules, optimizer)
    wanted, rate = scheduler.base_lrs, metadata["rate"]
    scheduler.load_state_dict(rate | {"base_lrs": wanted})  # the rate may have been lowered since
    for group, new, old in zip(optimizer.param_groups, wanted, rate["base_lrs"], strict=True):
        group["lr"] *= new / old
    _cut(curve, metadata["step"] - 1)
    _cut(compared, metadata["step"])
    return metadata["step"]


def _cut(path, last):
    """Drop the lines of steps after the last one, and one that is not whole, if there are any."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    kept = lines[:1] + [line for line in lines[1:] if line.endswith("\n") and int(line.split(",")[0]) <= last]
    if kept != lines:  # a finished run is only read, so that several processes can load it
        write_text(path, "".join(kept))


def _log(path, step, values):
    header = [] if path.exists() else [["step", *values]]
    with path.open("a", newline="") as file:
        csv.writer(file).writerows([*header, [step, *(f"{v:.5f}" for v in values.values())]])
