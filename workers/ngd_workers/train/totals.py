"""Sums over micro-batches and ranks from which a pass's loss and metrics follow."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ngd_dist.distributed.comm import Communicator
from ngd_workers.tasks.base import Result, Task
from ngd_workers.train.loading import MicroBatch

__all__ = ["Totals"]

F64 = torch.float64


class Totals:
    """Loss, count, skipped samples and the task's own sums of the results that were added."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._shapes: dict[str, torch.Size] = {}
        self._values = torch.zeros(3, dtype=F64, device=device)  # loss, count, skipped; then the sums, flat, by name

    def add(self, result: Result, batch: MicroBatch) -> None:
        """Adds the result of one micro-batch; if it does not count, zeros of the same shape."""
        count = batch.samples if result.count is None else result.count
        sums = {"loss": result.loss.detach() * count, "count": count, "skipped": batch.skipped}
        sums |= dict(sorted(result.sums.items()))
        parts = {name: torch.as_tensor(value, dtype=F64, device=self._device) for name, value in sums.items()}
        if not self._shapes:
            self._shapes = {name: part.shape for name, part in parts.items()}
            self._values = torch.zeros(sum(part.numel() for part in parts.values()), dtype=F64, device=self._device)
        if batch.counts:
            self._values += torch.cat([part.flatten() for part in parts.values()])

    def reduce(self, comm: Communicator, name: str, extra: Sequence[float] = ()) -> list[float]:
        """Collective. Adds those of all ranks; returns the sums of `extra`, which travel along."""
        values = torch.cat((self._values, self._values.new_tensor(extra)))
        comm.all_reduce(name, values)
        values = values.cpu()  # the one synchronisation of a step with the host
        self._values, sums = values.split([len(values) - len(extra), len(extra)])
        told: list[float] = sums.tolist()
        return told

    @property
    def skipped(self) -> int:
        return int(self._sums()["skipped"])

    def metrics(self, task: Task) -> dict[str, float]:
        """Returns the mean loss and what the task makes of the sums, in the order of `Task.metrics`."""
        sums = self._sums()
        count = float(sums.pop("count"))
        loss = float(sums["loss"]) / count if count else float("nan")
        found = {"loss": loss} | task.summarize(sums, count)
        return {metric.name: found[metric.name] for metric in task.metrics if metric.name in found}

    def _sums(self) -> dict[str, Tensor]:
        parts = self._values.split([shape.numel() for shape in self._shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)}
