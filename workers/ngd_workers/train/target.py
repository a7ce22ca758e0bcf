"""Whether a score reaches the job's target, in the metric's own direction."""

from collections.abc import Mapping
from typing import Literal

from ngd_workers.contract.errors import SpecError
from ngd_workers.contract.events import Metric
from ngd_workers.contract.spec import Target
from ngd_workers.tasks.base import Task

__all__ = ["is_reached", "reaches", "target_metric"]


def target_metric(target: Target, task: Task) -> Metric:
    """Returns the target's metric. Raises: SpecError if the task has no such metric, or it can't have that value."""
    known = {metric.name: metric for metric in task.metrics}
    if target.metric not in known:
        raise SpecError(
            f"target.metric must be a metric of the job's task, one of {', '.join(known)}, got {target.metric!r}; "
            f"another task has others (docs/guides/tasks.md)"
        )
    metric = known[target.metric]
    problem = target.problem_as_share(metric.label) if metric.unit == "share" else None
    if problem is not None:
        raise SpecError(problem)
    return metric


def reaches(target: Target, task: Task, tested: Mapping[str, float]) -> bool:
    """Returns whether the metrics of the test data reach the target."""
    return is_reached(target, target_metric(target, task).better, tested[target.metric])


def is_reached(target: Target, better: Literal["higher", "lower"], value: float) -> bool:
    """Returns whether the value of the target's metric is at least as good as the target's."""
    return value >= target.value if better == "higher" else value <= target.value
