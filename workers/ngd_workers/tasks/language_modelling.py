"""The next token of a text, at each position: cross-entropy over tokens, and perplexity."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ngd_dist.config import Categorical
from ngd_workers.contract.errors import UserCodeError
from ngd_workers.contract.events import Metric
from ngd_workers.contract.spec import LanguageModelling
from ngd_workers.data import TokenSequences
from ngd_workers.tasks.base import LOSS, Batch, Result, Task, logits_of, unfit

__all__ = ["PERPLEXITY", "build", "of_tokens", "perplexity"]

PERPLEXITY = Metric(name="perplexity", label="perplexity", better="lower")
NO_LABEL = -100


class NextToken(Task):
    """Batches (x, y): tokens int64 [N, P], and the token that follows each of them, or -100.

    The model is causal: called with x, it returns logits [N, P, C], C at least the vocabulary.
    """

    metrics = (PERPLEXITY, LOSS)
    likelihood = Categorical()

    def __init__(self, shape: TokenSequences) -> None:
        self._vocabulary = shape.vocabulary
        self.counts_vary = shape.varies

    def count(self, batch: Batch) -> Tensor:
        count: Tensor = (batch[1] != NO_LABEL).sum()
        return count

    def train_batch(self, model: nn.Module, batch: Batch) -> Result:
        return self._result(model, batch, varies=self.counts_vary)

    def test_batch(self, model: nn.Module, batch: Batch) -> Result:
        return self._result(model, batch, varies=True)

    def summarize(self, sums: Mapping[str, Tensor], count: float) -> dict[str, float]:
        return {"perplexity": perplexity(sums, count)}

    def _result(self, model: nn.Module, batch: Batch, *, varies: bool) -> Result:
        x, y = batch
        logits = logits_of(model(x))
        if logits.shape[:-1] != y.shape or logits.shape[-1] < self._vocabulary:
            raise UserCodeError(
                f"the model must return logits of shape {(*y.shape, self._vocabulary)}, or of more tokens, got "
                f"{tuple(logits.shape)}"
            )
        return of_tokens(logits, y, NO_LABEL if varies else None)


def of_tokens(logits: Tensor, y: Tensor, ignore: int | None) -> Result:
    """Returns the mean cross-entropy over tokens; `ignore` is the label that counts for nothing, if there may be any.

    logits: [N, P, C]. y: int64 [N, P].
    """
    if ignore is None:
        return Result(F.cross_entropy(logits.flatten(0, 1), y.flatten()), y.numel(), logits)
    ignored = y == ignore
    count = ignored.numel() - ignored.sum()
    total = F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=ignore, reduction="sum")
    return Result(total / count.clamp(min=1), count, logits, ignored)  # of padding alone: 0


def perplexity(sums: Mapping[str, Tensor], count: float) -> float:
    """Returns exp of the mean loss; infinity if it is too large for a float."""
    mean = float(sums["loss"]) / count if count else math.nan
    try:
        return math.exp(mean)
    except OverflowError:
        return math.inf


def build(choice: LanguageModelling, shape: Any) -> Task:
    """Returns the task for data of this shape. Raises: SpecError."""
    if not isinstance(shape, TokenSequences):
        raise unfit("language_modelling", "a text of tokens", shape, TokenSequences)
    return NextToken(shape)
