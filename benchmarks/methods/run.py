"""One training run, in a separate process; its outcome stays on disk."""

import hashlib
import json
import math
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.methods.catalogue import METHODS
from benchmarks.methods.data import IGNORED, Data
from benchmarks.methods.search import Point
from benchmarks.methods.tasks import Task, loss_of
from ngd_dist import NGD, part_of
from ngd_dist.errors import NgdError

__all__ = ["WARMUP", "Run", "outcome_of", "pace_of"]

WARMUP = 0.1  # of a run's steps, for every method whose lr is given
FIRST_STEPS, PACED_STEPS = 2, 30  # the first ones allocate; ours refresh at every third


@dataclass(frozen=True, slots=True)
class Run:
    """All that decides an outcome. point: the method's options and `steps`, the length of its schedule.

    If a method has an lr, it rises over the first tenth of the steps and falls linearly to 0 at the last. The run ends
    at its target.
    """

    task: str
    method: str
    point: Point
    seed: int

    @property
    def name(self) -> str:
        """Returns a file name: another setting is another name."""
        digest = hashlib.sha256(json.dumps(asdict(self)["point"], sort_keys=True).encode()).hexdigest()[:10]
        return f"{self.task}-{self.method}-{digest}-seed{self.seed}"

    @property
    def steps(self) -> int:
        return round(self.point["steps"])

    def lr_factor(self, step: int) -> float:
        """Returns the factor on lr at `step`, which counts from 1."""
        warmup = WARMUP * self.steps
        return min(1.0, step / warmup) * (1 - (step - 1) / self.steps)

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
                         for name, value in (self.point | {"steps": self.steps}).items())  # fmt: skip


def outcome_of(run: Run, task: Task, data: Data, work: Path) -> dict[str, Any]:
    """Returns the outcome of a run: from disk if it is there, otherwise from a forked process with one thread.

    The process is forked so that hundreds of runs share one copy of the data and one import of torch; this process
    must not have used autograd before. Raises: RuntimeError if the process ends without an outcome.
    """
    return _in_a_process(work / f"{run.name}.json", lambda: _train(run, task, data), f"{run.method}: {run}")


def pace_of(run: Run, task: Task, data: Data, work: Path, round: int) -> float:
    """Returns the CPU milliseconds of a step of this run, of its first steps but two, from disk or measured now."""
    path = work / f"{run.name}-pace{round}.json"
    outcome = _in_a_process(path, lambda: {"ms": _pace(run, task, data)}, f"{run.method}: {run}")
    return float(outcome["ms"])


def _in_a_process(path: Path, measure: Callable[[], dict[str, Any]], words: str) -> dict[str, Any]:
    if not path.exists():
        process = multiprocessing.get_context("fork").Process(target=_write, args=(path, measure))
        process.start()
        process.join()
    if not path.exists():
        raise RuntimeError(f"{path.stem} ({words}) left no outcome, exit code {process.exitcode}")
    outcome: dict[str, Any] = json.loads(path.read_text())
    return outcome


def _write(path: Path, measure: Callable[[], dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # a setting that makes a model too sure of itself is not made slow as well
    warnings.simplefilter("ignore")  # rivals' warnings about deprecated calls
    outcome = measure()
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(outcome))
    unfinished.rename(path)


def _train(run: Run, task: Task, data: Data) -> dict[str, Any]:
    model, optimizer = _built(run, task)
    first_lr = [float(group["lr"]) for group in optimizer.param_groups]
    curve: list[dict[str, float]] = []
    outcome: dict[str, Any] = {"task": run.task, "method": run.method, "setting": str(run), "seed": run.seed}
    outcome |= {"target_step": None, "target_seconds": None, "ending": "ran out"}
    seconds = 0.0
    batches = _batches(data, task.batch, run.seed)
    for step in range(1, run.steps + 1):
        if METHODS[run.method].has_schedule:
            for group, lr in zip(optimizer.param_groups, first_lr, strict=True):
                group["lr"] = lr * run.lr_factor(step)
        x, y = next(batches)
        start = time.process_time()
        try:
            loss = _step(model, optimizer, x, y)
        except (NgdError, torch.linalg.LinAlgError) as error:
            loss = math.nan
            outcome["message"] = str(error)[:200]
        seconds += time.process_time() - start
        if not math.isfinite(loss):
            outcome["ending"] = "diverged"
            break
        if step % task.every and step < run.steps:
            continue
        score = task.score(model, data)
        curve.append({"step": step, "seconds": round(seconds, 3), "loss": round(loss, 5), "score": score})
        if task.is_reached(score):
            outcome |= {"target_step": step, "target_seconds": seconds, "ending": "reached"}
            break
        if seconds > task.seconds:
            outcome["ending"] = "took too long"
            break
    return outcome | {"steps": step, "ms_per_step": 1000 * seconds / step, "curve": curve}


def _pace(run: Run, task: Task, data: Data) -> float:
    model, optimizer = _built(run, task)
    batches = _batches(data, task.batch, run.seed)
    if METHODS[run.method].has_schedule:
        for group in optimizer.param_groups:
            group["lr"] *= run.lr_factor(1)  # so that no setting diverges in these steps
    start = 0.0
    for step in range(FIRST_STEPS + PACED_STEPS):
        if step == FIRST_STEPS:
            start = time.process_time()
        try:
            _step(model, optimizer, *next(batches))
        except (NgdError, torch.linalg.LinAlgError):
            return math.nan  # of a setting that diverges at once, which reaches no target either
    return 1000 * (time.process_time() - start) / PACED_STEPS


def _built(run: Run, task: Task) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(run.seed)
    model = task.model()
    options = {name: value for name, value in run.point.items() if name != "steps"}
    return model, METHODS[run.method].build(model, options)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
    optimizer.zero_grad()
    output = model(x)
    loss = loss_of(output, y)
    if not isinstance(optimizer, NGD):
        loss.backward()
        optimizer.step()
        return float(loss)
    if optimizer.config.fisher.kind != "empirical":
        ignored = y == IGNORED
        optimizer.fisher_backward(output, ignored=ignored if bool(ignored.any()) else None)
    loss.backward()
    if optimizer.config.needs_objective:
        part_x, part_y = part_of((x, y), optimizer.config.statistics_fraction)

        def objective() -> tuple[Tensor, Tensor]:
            output = model(part_x)
            return loss_of(output, part_y), output

        optimizer.step(objective=objective)
    else:
        optimizer.step()
    return float(loss)


def _batches(data: Data, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields batches of shuffled epochs for ever; samples that do not fill a batch wait for the next shuffle."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(data.train_y), generator=generator).split(size):
            if len(rows) == size:
                yield data.train_x[rows], data.train_y[rows]
