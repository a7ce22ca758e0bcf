"""Everything is averaged on all ranks; each rank does all the work, so directions need not travel."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ngd_dist.statistics import Key
from ngd_dist.strategies.base import REPORT_NUMBERS, Collected, Local, Report, Strategy, collected, split_like

__all__ = ["AllReduce"]


class AllReduce(Strategy):
    """Most bytes and most work per rank; no rank waits for another's inverse."""

    def holds(self, layer: str) -> bool:
        return True

    def collect(self, local: Local) -> Collected:
        statistics = self._sum("statistics", list(local.due.values()), self.wire_dtype)
        gradients, plain, scale = local.gradients, local.plain, self.gradient_scale
        travelling = [] if scale is None else [*gradients.values(), *plain]
        sums = self._sum("gradients", [*local.counts.values(), *travelling], self.dtype)
        counts = dict(zip(local.counts, sums, strict=False))
        if scale is not None:
            means = [total.mul_(scale) for total in sums[len(counts) :]]
            gradients, plain = dict(zip(gradients, means, strict=False)), means[len(gradients) :]
        return collected(dict(zip(local.due, statistics, strict=True)), counts, gradients, plain)

    def publish(
        self, directions: Mapping[str, Tensor], reports: Mapping[Key, Report], due: Sequence[Key]
    ) -> tuple[dict[str, Tensor], dict[Key, Report]]:
        """Only the reports travel, on steps that have any: a sum in which all but the reporting rank put zeros."""
        if not due:
            return dict(directions), {}
        zeros = [0.0] * REPORT_NUMBERS
        numbers = [reports[key].numbers() if self.reports(key.layer) else zeros for key in due]
        buffer = torch.tensor(numbers, dtype=self.dtype, device=self.device)
        self.comm.all_reduce("reports", buffer, kind="reports")
        return dict(directions), {key: Report.parse(row) for key, row in zip(due, buffer.tolist(), strict=True)}

    def _sum(self, name: str, tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        if not tensors:
            return []
        buffer = self.flatten(tensors, dtype)
        self.comm.all_reduce(name, buffer, kind=name)
        return [part.to(self.dtype) for part in split_like(buffer, tensors)]
