"""The record of an optimizer step, from what the optimizer tells of it."""

import math
import time
from collections.abc import Mapping

from torch import optim

from ngd_dist import NGD
from ngd_workers.contract.events import Judged, StepRecord
from ngd_workers.train.optimizers import chooses_lr, step_stats

__all__ = ["MOST_JUDGED", "judged", "step_record"]

MOST_JUDGED = 2_000  # of some 26 bytes: 64 steps of them, and of the ages of 10,000 statistics, fit into one batch


def step_record(
    optimizer: optim.Optimizer,
    *,
    step: int,
    epoch: float,
    metrics: dict[str, float],
    samples_per_s: float,
    seconds: Mapping[str, float],
    bytes_sent: Mapping[str, int],
    skipped_samples: int,
) -> StepRecord:
    """Returns the record of the newest step. seconds, bytes_sent: those outside the optimizer."""
    stats, settings = step_stats(optimizer), optimizer.param_groups[0]
    phases = {**seconds, **stats.seconds}
    phases["forward_backward"] -= phases.get("capture", 0.0)  # the hooks run inside: no second is counted twice
    return StepRecord(
        step=step,
        epoch=epoch,
        time_s=time.time(),
        metrics=metrics,
        lr=settings["lr"],
        samples_per_s=samples_per_s,
        seconds=phases,
        bytes_sent={**bytes_sent, **stats.bytes_sent},
        ages=list(stats.ages),
        intervals=list(stats.intervals),
        judged=judged(optimizer) if isinstance(optimizer, NGD) else None,
        failed_inversions=stats.failed_inversions,
        skipped_samples=skipped_samples,
        skipped_steps=stats.skipped_steps,
        damping=settings.get("damping"),
        momentum=settings["momentum"] if chooses_lr(optimizer) else None,
        reduction_ratio=stats.adapted.reduction_ratio,
    )


def judged(optimizer: NGD) -> Judged | None:
    """Returns what decided on the statistics that were due; None if nothing was measured and no inversion failed.

    An infinite number is one that was not measured.
    """
    told = [
        one
        for one in optimizer.stats.refreshes
        if math.isfinite(one.change) or math.isfinite(one.error) or one.ending != "OK"
    ]
    if not told:
        return None
    told = told[:MOST_JUDGED]
    place = {name: i for i, name in enumerate(optimizer.statistic_names)}
    return Judged.model_construct(  # as it is: checking what was made here would double the cost
        statistics=[place[one.statistic] for one in told],
        changes=[_short(one.change) for one in told],
        noises=[_short(one.noise) for one in told],
        thresholds=[_short(one.threshold) for one in told],
        errors=[_short(one.error) for one in told],
        failed={place[one.statistic]: one.ending for one in told if one.ending != "OK"},
    )


def _short(value: float) -> float | None:
    """Returns four digits; None: not measured."""
    return float(f"{value:.4g}") if math.isfinite(value) else None
