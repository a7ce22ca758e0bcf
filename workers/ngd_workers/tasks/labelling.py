"""One class for each position of a sample: segmentation of images, tags of tokens."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ngd_dist.config import Categorical
from ngd_workers.contract.errors import InvalidDataError, SpecError, UserCodeError
from ngd_workers.contract.events import Metric
from ngd_workers.contract.spec import Labelling
from ngd_workers.tasks.base import LOSS, Batch, Result, Task, logits_of

__all__ = ["build"]


class LabellingTask(Task):
    """Batches (x, y): x as the model takes it, y int64 [N, ...positions], `ignore` where nothing is to be learned.

    mean_iou is the mean over classes of: positions that have the class and are given it, divided by those that have it
    or are given it. A class that neither occurs nor is predicted does not count.
    """

    metrics = (
        Metric(name="mean_iou", label="mean IoU", better="higher", unit="share"),
        Metric(name="accuracy", label="accuracy", better="higher", unit="share"),
        LOSS,
    )
    counts_vary = True

    def __init__(self, choice: Labelling, classes: int) -> None:
        self._ignore, self._class_dim, self._classes = choice.ignore, choice.class_dim, classes
        self.likelihood = Categorical(class_dim=choice.class_dim)

    def count(self, batch: Batch) -> Tensor:
        _, y = batch
        self._check(y)
        labelled: Tensor = y != self._ignore
        return labelled.sum()

    def train_batch(self, model: nn.Module, batch: Batch) -> Result:
        x, y = batch
        output = logits_of(model(x))
        logits = output.movedim(self._class_dim, 1) if output.ndim > 1 else output
        if tuple(logits.shape) != (wanted := (len(y), self._classes, *y.shape[1:])):
            raise UserCodeError(
                f"the model must return logits of shape {wanted} for labels of shape {tuple(y.shape)}, classes in "
                f"dimension task.class_dim ({self._class_dim}) of the output, got an output of {tuple(output.shape)}"
            )
        ignored = y == self._ignore
        count = ignored.numel() - ignored.sum()
        total = F.cross_entropy(logits, y, ignore_index=self._ignore, reduction="sum")
        sums = self._sums(logits.detach().argmax(1), y, ignored)
        return Result(total / count.clamp(min=1), count, output, ignored, sums)  # no position at all: a loss of 0

    def test_batch(self, model: nn.Module, batch: Batch) -> Result:
        if batch[1].device.type == "cpu":  # a GPU would have to wait; there cross_entropy itself finds a wrong label
            self._check(batch[1])
        return self.train_batch(model, batch)

    def summarize(self, sums: Mapping[str, Tensor], count: float) -> dict[str, float]:
        common, either = sums["common"], sums["true"] + sums["predicted"] - sums["common"]
        occurring = either > 0
        mean_iou = float((common[occurring] / either[occurring]).mean())
        return {"mean_iou": mean_iou, "accuracy": float(common.sum()) / count if count else float("nan")}

    def _sums(self, predicted: Tensor, y: Tensor, ignored: Tensor) -> dict[str, Tensor]:
        """Returns, for each class, the positions that have it, those that are given it, and those of both."""
        nothing = self._classes
        counted = {
            "true": y.masked_fill(ignored, nothing),
            "predicted": predicted.masked_fill(ignored, nothing),
            "common": y.masked_fill(ignored | (predicted != y), nothing),
        }
        return {name: self._of_each_class(classes.flatten()) for name, classes in counted.items()}

    def _of_each_class(self, classes: Tensor) -> Tensor:
        # bincount would wait for the device.
        counts = classes.new_zeros(self._classes + 1)
        return counts.scatter_add_(0, classes, torch.ones_like(classes))[: self._classes]

    def _check(self, y: Tensor) -> None:
        wrong = (y != self._ignore) & ((y < 0) | (y >= self._classes))
        if wrong.any():
            raise InvalidDataError(
                f"labels must be in [0, {self._classes}) or task.ignore ({self._ignore}), got {int(y[wrong][0])}; set "
                "task.ignore to the label of positions that count for nothing, or task.classes"
            )


def build(choice: Labelling, shape: Any) -> Task:
    """Returns the task for data of this shape. Raises: SpecError."""
    classes = choice.classes or getattr(shape, "outputs", None)
    if classes is None:
        raise SpecError(f"task labelling needs the number of classes, and data of {shape} don't tell; set task.classes")
    return LabellingTask(choice, classes)
