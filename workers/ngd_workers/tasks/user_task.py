"""A task of the user's own: a training step, or a function that makes a task."""

import inspect
from typing import Any

from torch import Tensor, nn

from ngd_workers.contract.errors import UserCodeError
from ngd_workers.contract.spec import UserTask
from ngd_workers.functions import call_user, load_function
from ngd_workers.tasks.base import LOSS, Batch, Result, Task

__all__ = ["build"]

STEP = ["model", "batch"]


class Step(Task):
    """The loss that the user's training step returns, a mean over the samples of the batch; no other metric."""

    def __init__(self, choice: UserTask) -> None:
        self._address, self._options = choice.function, choice.options
        self._step = load_function(choice.function)

    def train_batch(self, model: nn.Module, batch: Batch) -> Result:
        loss = self._step(model, batch, **self._options)
        if not isinstance(loss, Tensor) or loss.ndim > 0:
            described = f"one of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise UserCodeError(
                f"{self._address!r} must return its loss as a scalar tensor, got {described}; a training step tells no "
                "other metric: for those, a function of the data's shape returns a ngd_workers.tasks.base.Task"
            )
        return Result(loss)


def build(choice: UserTask, shape: Any) -> Task:
    """Returns the task for data of this shape. Raises: UserCodeError."""
    signature = inspect.signature(load_function(choice.function))
    is_step = list(signature.parameters)[:2] == STEP
    try:
        signature.bind(*(STEP if is_step else [shape]), **choice.options)
    except TypeError as error:
        raise UserCodeError(
            f"{choice.function!r} can't be called as task.function with the options {choice.options}: {error}; a "
            "training step must name its first two parameters model and batch, and any other function takes the data's "
            "shape; task.options are the other arguments"
        ) from error
    if is_step:
        return Step(choice)
    task = call_user(choice.function, shape, **choice.options)
    if not isinstance(task, Task):
        raise UserCodeError(
            f"{choice.function!r} must return a ngd_workers.tasks.base.Task, got {type(task).__name__}; if it is a "
            "training step, name its first two parameters model and batch"
        )
    if LOSS.name not in [metric.name for metric in task.metrics]:
        raise UserCodeError(f"the metrics of {choice.function!r} must have LOSS among them, got {task.metrics}; add it")
    return task
