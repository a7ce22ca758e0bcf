"""Two tasks of one's own for `task: {kind: function}`: a training step, and a task with metrics and a likelihood."""

import torch
import torch.nn.functional as F

from ngd_dist.config import Bernoulli
from ngd_workers.contract.events import Metric
from ngd_workers.tasks.base import LOSS, Result, Task, logits_of


def huber(model, batch, delta=1.0):
    """task: {kind: function, function: "own_task:huber", options: {delta: 0.5}}"""
    x, y = batch
    return F.huber_loss(model(x), y, delta=delta)


class Tagging(Task):
    """task: {kind: function, function: "own_task:Tagging", options: {threshold: 0.4}}

    Batches (x, y): y float32 [N, tags], 1 for each tag that a sample has.
    """

    metrics = (Metric(name="recall", label="recall", better="higher", unit="share"), LOSS)
    likelihood = Bernoulli()  # each output is the logit of one event: this lets a Fisher draw labels

    def __init__(self, shape, threshold=0.5):
        self.threshold = threshold

    def train_batch(self, model, batch):
        x, y = batch
        logits = logits_of(model(x))
        # The likelihood is of a sample's tags together, so their losses add up.
        loss = F.binary_cross_entropy_with_logits(logits, y, reduction="sum") / len(y)
        hits = (torch.sigmoid(logits.detach()) >= self.threshold) & (y == 1)
        return Result(loss, len(y), logits, sums={"hits": hits.sum(), "tags": (y == 1).sum()})

    def summarize(self, sums, count):
        return {"recall": float(sums["hits"] / sums["tags"])}
