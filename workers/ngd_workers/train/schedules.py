"""The factor on the optimizer's lr at each step: a pure function, so that no state is saved."""

from ngd_workers.contract.spec import PolynomialLR, Schedule

__all__ = ["lr_factor", "total_steps"]


def total_steps(schedule: Schedule, steps_per_epoch: int) -> int:
    """Returns the number of the job's optimizer steps."""
    if schedule.steps is not None:
        return schedule.steps
    assert schedule.epochs is not None  # the spec holds exactly one of the two
    return schedule.epochs * steps_per_epoch


def lr_factor(schedule: Schedule, step: int, total: int) -> float:
    """Returns the factor on lr at `step`, which counts from 1 to `total`: warm-up times decay. Source: [OT20]."""
    warmup = min(1.0, step / schedule.warmup_steps) if schedule.warmup_steps else 1.0
    if not isinstance(schedule.lr, PolynomialLR):
        return warmup
    start, end = schedule.lr.start_fraction * total, schedule.lr.end_fraction * total
    left = 1.0 - (step - 1 - start) / (end - start)
    return float(warmup * min(1.0, max(0.0, left)) ** schedule.lr.power)
