"""One training run of `steps_to_target`, in a separate process; its outcome stays on disk."""

import hashlib
import json
import math
import multiprocessing
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.target_methods import Setting, build
from benchmarks.target_tasks import Data, Task
from ngd_dist import NGD
from ngd_dist.errors import NgdError

__all__ = ["Run", "outcome_of"]

EVALUATION_BATCH = 2500


@dataclass(frozen=True, slots=True)
class Run:
    """All that decides an outcome. `stops`: whether the run ends at its targets, or goes on to complete its curve."""

    task: str
    batch: int
    method: str
    setting: Setting
    seed: int
    stops: bool

    @property
    def name(self) -> str:
        """Returns a file name: another setting is another name."""
        digest = hashlib.sha256(json.dumps(asdict(self.setting), sort_keys=True).encode()).hexdigest()[:10]
        ending = "" if self.stops else "-whole"
        return f"{self.task}-{self.batch}-{self.method}-{digest}-seed{self.seed}{ending}"


def outcome_of(run: Run, task: Task, data: Data, work: Path) -> dict[str, Any]:
    """Returns the outcome of a run: from disk if it is there, otherwise from a forked process with one thread.

    The process is forked so that hundreds of runs share one copy of the data and one import of torch; this process
    must not have used autograd before. Raises: RuntimeError if the process ends without an outcome.
    """
    path = work / f"{run.name}.json"
    if not path.exists():
        process = multiprocessing.get_context("fork").Process(target=_train_and_write, args=(run, task, data, path))
        process.start()
        process.join()
    if not path.exists():
        raise RuntimeError(f"{run.name} ({run.method}: {run.setting}) left no outcome, exit code {process.exitcode}")
    outcome: dict[str, Any] = json.loads(path.read_text())
    return outcome


def _train_and_write(run: Run, task: Task, data: Data, path: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # rivals' warnings about deprecated calls
    outcome = _train(run, task, data)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(outcome))
    unfinished.rename(path)


def _train(run: Run, task: Task, data: Data) -> dict[str, Any]:
    torch.manual_seed(run.seed)
    model = task.model()
    optimizer = build(run.method, model, run.setting.options)
    first_lr = [float(group["lr"]) for group in optimizer.param_groups]
    chooses_lr = isinstance(optimizer, NGD) and optimizer.config.length.kind == "quadratic_model"
    curve: list[dict[str, float]] = []
    losses: list[float] = []
    outcome: dict[str, Any] = {"method": run.method, "setting": str(run.setting), "batch": run.batch, "seed": run.seed}
    outcome |= {
        "accuracy_step": None,
        "accuracy_seconds": None,
        "loss_step": None,
        "loss_seconds": None,
        "ending": "ran out",
    }
    seconds = 0.0
    batches = _batches(data, run.batch, run.seed)
    for step in range(1, run.setting.steps + 1):
        if not chooses_lr:
            for group, lr in zip(optimizer.param_groups, first_lr, strict=True):
                group["lr"] = lr * run.setting.lr_factor(step)
        x, y = next(batches)
        start = time.process_time()
        try:
            losses.append(_step(model, optimizer, x, y))
        except (NgdError, torch.linalg.LinAlgError) as error:
            losses.append(math.nan)
            outcome["message"] = str(error)[:200]
        seconds += time.process_time() - start
        if not math.isfinite(losses[-1]):
            outcome["ending"] = "diverged"
            break
        if step % task.evaluate_every[run.batch] and step < run.setting.steps:
            continue
        loss, losses = sum(losses) / len(losses), []
        accuracy = _accuracy(model, data)
        curve.append({"step": step, "seconds": round(seconds, 3), "loss": round(loss, 5), "accuracy": accuracy})
        for target, is_reached in (("accuracy", accuracy >= task.accuracy), ("loss", loss <= task.loss)):
            if is_reached and outcome[f"{target}_step"] is None:
                outcome[f"{target}_step"], outcome[f"{target}_seconds"] = step, seconds
        if run.stops and outcome["accuracy_step"] and outcome["loss_step"]:
            outcome["ending"] = "reached"
            break
    return outcome | {"steps": step, "ms_per_step": 1000 * seconds / step, "curve": curve}


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
    optimizer.zero_grad()
    output = model(x)
    loss = F.cross_entropy(output, y)
    if not isinstance(optimizer, NGD):
        loss.backward()
        optimizer.step()
        return float(loss)
    if optimizer.config.fisher.kind != "empirical":
        optimizer.fisher_backward(output)
    loss.backward()
    if optimizer.config.needs_objective:

        def objective() -> tuple[Tensor, Tensor]:
            output = model(x)
            return F.cross_entropy(output, y), output

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


@torch.no_grad()
def _accuracy(model: nn.Module, data: Data) -> float:
    model.eval()
    batches = zip(data.test_x.split(EVALUATION_BATCH), data.test_y.split(EVALUATION_BATCH), strict=True)
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches)
    model.train()
    return right / len(data.test_y)
