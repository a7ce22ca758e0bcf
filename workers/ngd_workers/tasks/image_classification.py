"""One class for each image: cross-entropy, and the share of images whose class is among the model's best guesses."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ngd_dist.config import Categorical
from ngd_workers.contract.errors import SpecError, UserCodeError
from ngd_workers.contract.events import Metric
from ngd_workers.contract.spec import ImageClassification
from ngd_workers.data import Images, Vectors
from ngd_workers.tasks.base import LOSS, Batch, Result, Task, logits_of, unfit
from ngd_workers.tasks.mixing import Mixer, erased

__all__ = ["build"]


class Classification(Task):
    """Batches (images, class of each): x float32 [N, channels, height, width], or [N, width]; y int64 [N].

    Under mixup the training's accuracy is that of the label with the larger share.
    """

    likelihood = Categorical()

    def __init__(self, choice: ImageClassification, classes: int) -> None:
        self._choice = choice
        self._classes = classes
        self._mixer = None if choice.mixup is None else Mixer(choice.mixup)
        named = [(f"top{k}_accuracy", f"top-{k} accuracy") if k > 1 else ("accuracy", "accuracy") for k in choice.top]
        self.metrics = (*(Metric(name=n, label=label, better="higher", unit="share") for n, label in named), LOSS)

    def train_batch(self, model: nn.Module, batch: Batch) -> Result:
        x, y = batch
        target = y
        if self._mixer is not None:
            x, target = self._mixer(x, F.one_hot(y, self._classes).to(x.dtype))
        if self._choice.erasing is not None:
            x = erased(self._choice.erasing, x)
        logits = self._logits(model, x)
        loss = F.cross_entropy(logits, target, label_smoothing=self._choice.label_smoothing)
        return Result(loss, len(y), logits, sums=self._found(logits, y))

    def test_batch(self, model: nn.Module, batch: Batch) -> Result:
        x, y = batch
        logits = self._logits(model, x)
        return Result(F.cross_entropy(logits, y), len(y), sums=self._found(logits, y))

    def summarize(self, sums: Mapping[str, Tensor], count: float) -> dict[str, float]:
        return {metric.name: float(sums[metric.name]) / count for metric in self.metrics if metric.name in sums}

    def _logits(self, model: nn.Module, x: Tensor) -> Tensor:
        logits = logits_of(model(x))
        if tuple(logits.shape) != (len(x), self._classes):
            raise UserCodeError(
                f"the model must return logits of shape {(len(x), self._classes)}, one per class, "
                f"got {tuple(logits.shape)}"
            )
        return logits

    def _found(self, logits: Tensor, y: Tensor) -> dict[str, Tensor]:
        best = logits.detach().topk(max(self._choice.top), dim=1).indices == y.unsqueeze(1)
        found = {("accuracy" if k == 1 else f"top{k}_accuracy"): best[:, :k].sum() for k in self._choice.top}
        return found


def build(choice: ImageClassification, shape: Any) -> Task:
    """Returns the task for data of this shape. Raises: SpecError."""
    if not isinstance(shape, Images | Vectors):
        raise unfit("image_classification", "labelled images or rows", shape, Images, Vectors)
    if not isinstance(shape, Images) and choice.erasing is not None:
        raise SpecError(f"task.erasing takes rectangles out of images, got data of {shape}; leave it out")
    if max(choice.top) > shape.outputs:
        raise SpecError(f"task.top must be at most the number of classes, {shape.outputs}, got {max(choice.top)}")
    return Classification(choice, shape.outputs)
