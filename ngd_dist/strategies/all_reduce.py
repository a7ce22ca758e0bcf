"""Everything is averaged on all ranks; each rank does all the work, so directions need not travel."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ngd_dist.statistics import Key
from ngd_dist.strategies.base import (
    REPORT_NUMBERS,
    Collected,
    Findings,
    Local,
    Report,
    Strategy,
    collected,
    split_like,
)

__all__ = ["AllReduce"]


class AllReduce(Strategy):
    """Most bytes and most work per rank; no rank waits for another's inverse."""

    is_replicated = True

    def holds(self, layer: str) -> bool:
        return True

    def collect(self, local: Local) -> Collected:
        statistics = self._sum("statistics", list(local.due.values()), self.wire_dtype)
        gradients, plain, scale = local.gradients, local.plain, self.gradient_scale
        # What DDP has averaged is finite on all ranks or on none.
        travelling = [] if scale is None else [local.non_finite, *gradients.values(), *plain]
        sums = self._sum("gradients", [*local.tallies.values(), *travelling], self.dtype)
        tallies, rest = dict(zip(local.tallies, sums, strict=False)), sums[len(local.tallies) :]
        non_finite = local.non_finite
        if scale is not None:
            non_finite, *totals = rest
            means = [total.mul_(scale) for total in totals]
            gradients, plain = dict(zip(gradients, means, strict=False)), means[len(gradients) :]
        return collected(non_finite, dict(zip(local.due, statistics, strict=True)), tallies, gradients, plain)

    def publish(self, findings: Findings, due: Sequence[Key]) -> Findings:
        """Only the reports travel, on steps that have any: a sum in which all but the reporting rank put zeros."""
        if not due:
            return findings
        zeros = [0.0] * REPORT_NUMBERS
        numbers = [findings.reports[key].numbers() if self.reports(key.layer) else zeros for key in due]
        buffer = torch.tensor(numbers, dtype=self.dtype, device=self.device)
        self.comm.all_reduce("reports", buffer, kind="reports")
        return replace(
            findings, reports={key: Report.parse(row) for key, row in zip(due, buffer.tolist(), strict=True)}
        )

    def _sum(self, name: str, tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        if not tensors:
            return []
        buffer = self.flatten(tensors, dtype)
        self.comm.all_reduce(name, buffer, kind=name)
        return [part.to(self.dtype) for part in split_like(buffer, tensors)]
