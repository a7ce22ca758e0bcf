"""The contract of a task: from a batch to its loss, and to the numbers that say how good the model is.

The loop knows nothing of classes, tokens or pixels. It divides a global batch into micro-batches, asks the task for the
mean loss of each, and weighs them by their `count`, so that the gradient is that of the mean over the whole batch at
any number of ranks and of micro-batches. Metrics come from `sums`, which the loop adds over micro-batches and ranks.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ngd_dist.config import LikelihoodChoice
from ngd_workers.contract.errors import SpecError, UserCodeError
from ngd_workers.contract.events import Metric

__all__ = ["LOSS", "Batch", "Result", "Task", "logits_of", "unfit"]

Batch = Any
"""Tensors on the model's device: what the data's `collate` makes of samples. Of ours it is the pair (x, y)."""

LOSS = Metric(name="loss", label="loss", better="lower")


@dataclass(slots=True)
class Result:
    """What a task makes of one micro-batch.

    loss: the mean over the terms of the batch, a scalar; differentiable in training.
    count: the terms of that mean: samples, or the tokens that are no padding. None: the samples of the batch.
    output: what `likelihood` reads, [samples, ..., outputs]; None: nothing can be drawn from the model's prediction.
    ignored: true where the loss reads no prediction, in the output's shape without the outputs' dimension.
    sums: numbers to be added over batches and ranks; `Task.summarize` turns them into metrics. Tensors of any shape,
        the same for every batch, without gradient.
    """

    loss: Tensor
    count: Tensor | int | None = None
    output: Tensor | None = None
    ignored: Tensor | None = None
    sums: dict[str, Tensor] = field(default_factory=dict)


class Task(ABC):
    """What a job trains its model to do.

    metrics: those that `summarize` can return, the one that counts first; `LOSS` is among them.
    likelihood: of a label given the output; a sampled or exact Fisher needs it. None: such a Fisher is refused.
    counts_vary: whether micro-batches of equally many samples may differ in `count`; then the loop adds up the counts
        of all ranks before the first backward pass.

    >>> class Regression(Task):
    ...     metrics = (LOSS,)
    ...
    ...     def train_batch(self, model: nn.Module, batch: Batch) -> Result:
    ...         x, y = batch
    ...         return Result(nn.functional.mse_loss(model(x), y), count=len(x))
    >>> Regression().train_batch(nn.Linear(2, 1), (torch.ones(4, 2), torch.ones(4, 1))).count
    4
    """

    metrics: tuple[Metric, ...] = (LOSS,)
    likelihood: LikelihoodChoice | None = None
    counts_vary: bool = False

    def count(self, batch: Batch) -> Tensor | int:
        """Returns the terms of the batch's mean loss, before its forward pass. Needed where `counts_vary`."""
        raise NotImplementedError

    @abstractmethod
    def train_batch(self, model: nn.Module, batch: Batch) -> Result:
        """Returns the result of a micro-batch in training, with one call of the model."""

    def test_batch(self, model: nn.Module, batch: Batch) -> Result:
        """Returns the result of a batch of the test data; the model is in evaluation mode, without gradient."""
        return self.train_batch(model, batch)

    def summarize(self, sums: Mapping[str, Tensor], count: float) -> dict[str, float]:
        """Returns the metrics of a pass other than the loss, from its added `sums` and `count`; those that it can.

        sums: float64 on the CPU. "loss" is among them: the sum over all terms.
        """
        return {}


def logits_of(output: object) -> Tensor:
    """Returns the prediction in what a model returned: a tensor, or the `logits` of a ModelOutput or a dict.

    Raises: UserCodeError.
    """
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    if not isinstance(output, Tensor):
        raise UserCodeError(f"the model must return a tensor, or an object with logits, got {type(output).__name__}")
    return output


def unfit(task: str, needs: str, shape: object, *fitting: type) -> SpecError:
    """Returns the error for data of another shape than the task reads, which names the shapes that fit."""
    if shape is None:
        shapes = " or ".join(f"{each.__name__}(...)" for each in fitting)
        return SpecError(
            f"task {task} needs {needs}, and the data don't say what a sample is; return "
            f"ngd_workers.data.Dataset(train, test, shape) from your function, with {shapes} for the shape"
        )
    return SpecError(f"task {task} needs {needs}, got data of {shape}; choose another task")
