"""Numbers for each sample: the mean squared error."""

from collections.abc import Mapping
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ngd_dist.config import Gaussian
from ngd_workers.contract.errors import SpecError, UserCodeError
from ngd_workers.contract.events import Metric
from ngd_workers.contract.spec import Regression
from ngd_workers.tasks.base import LOSS, Batch, Result, Task, logits_of

__all__ = ["build"]


class RegressionTask(Task):
    """Batches (x, y): x as the model takes it, y numbers [N, ...], `outputs` for each sample.

    rmse: the root of the mean squared error over samples and outputs, in the unit of y. r2: 1 - (squared error) /
    (squared distance from the mean of the test data), the mean over outputs; of the test data alone, and NaN if an
    output is the same in all of them.
    """

    metrics = (
        Metric(name="rmse", label="RMSE", better="lower"),
        Metric(name="r2", label="R2", better="higher"),
        LOSS,
    )

    def __init__(self, outputs: int) -> None:
        self._outputs = outputs
        # The loss of a sample is the mean over its outputs, |f - y|^2 / outputs = |f - y|^2 / (2 variance).
        self.likelihood = Gaussian(variance=outputs / 2)

    def train_batch(self, model: nn.Module, batch: Batch) -> Result:
        predicted, y = self._pair(model, batch)
        return Result(F.mse_loss(predicted, y), len(y), predicted)

    def test_batch(self, model: nn.Module, batch: Batch) -> Result:
        predicted, y = self._pair(model, batch)
        wide = y.double()
        error = (predicted.double() - wide).square().sum(0)
        sums = {"error": error, "y": wide.sum(0), "y_squared": wide.square().sum(0)}
        return Result(F.mse_loss(predicted, y), len(y), sums=sums)

    def summarize(self, sums: Mapping[str, Tensor], count: float) -> dict[str, float]:
        metrics = {"rmse": sqrt(float(sums["loss"]) / count)} if count else {}
        if "error" in sums:
            spread = (sums["y_squared"] - sums["y"].square() / count).clamp(min=0)
            r2 = torch.where(spread > 0, 1 - sums["error"] / spread, torch.nan)
            metrics["r2"] = float(r2.mean())
        return metrics

    def _pair(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns predictions and targets, both [N, outputs]."""
        x, y = batch
        output = logits_of(model(x))
        wanted = len(y) * self._outputs
        if output.numel() != wanted or y.numel() != wanted or len(output) != len(y):
            raise UserCodeError(
                f"task.outputs is {self._outputs}, so model and data must give {self._outputs} numbers for each "
                f"of {len(y)} samples, got an output of shape {tuple(output.shape)} and targets of {tuple(y.shape)}"
            )
        return output.reshape(len(y), -1), y.reshape(len(y), -1).to(output.dtype)


def build(choice: Regression, shape: Any) -> Task:
    """Returns the task for data of this shape. Raises: SpecError."""
    outputs = choice.outputs or getattr(shape, "outputs", None)
    if outputs is None:
        raise SpecError(
            f"task regression needs the number of outputs of a sample, and data of {shape} don't tell; set task.outputs"
        )
    return RegressionTask(outputs)
