"""How good a job's model is, in words: its task's metrics, the one that counts first, each in its own unit."""

from collections.abc import Iterable, Mapping

from ngd_service.client.units import number, percent
from ngd_service.resources import Job, Metric

__all__ = ["bound", "listed", "named", "result", "score"]

Values = Mapping[str, float | str]  # NaN and infinity travel as strings


def score(metric: Metric, value: float | str | None) -> str:
    """Returns a value in its metric's unit; a dash for None.

    >>> score(Metric(name="iou", label="mean IoU", unit="share"), 0.986)
    '98.60%'
    """
    known = None if value is None else float(value)
    return percent(known) if metric.unit == "share" else number(known)


def named(metrics: Iterable[Metric], names: Iterable[str]) -> list[Metric]:
    """Returns the metrics of these names, in the order of `metrics`; then those of which it does not tell."""
    wanted, known = list(names), {metric.name: metric for metric in metrics}
    plain = [Metric(name=name, label=name.replace("_", " ")) for name in wanted if name not in known]
    return [metric for name, metric in known.items() if name in wanted] + plain


def listed(metrics: Iterable[Metric], values: Values) -> str:
    """Returns each of the values after its metric's label: "perplexity 5.31, loss 1.67"."""
    return ", ".join(f"{metric.label} {score(metric, values[metric.name])}" for metric in named(metrics, values))


def result(job: Job) -> str | None:
    """Returns the newest value of the metric that counts, of the test data if there is one; None: there is none yet."""
    for metric in job.metrics[:1]:
        for name, where in ((f"test_{metric.name}", ""), (metric.name, " in training")):
            if name in job.metrics_latest:
                return f"{metric.label} {score(metric, job.metrics_latest[name])}{where}"
    return None


def bound(job: Job) -> tuple[Metric, str] | None:
    """Returns the target's metric and the bound that it has to reach: "at most 5.4"; None: the job has no target."""
    target = job.spec.get("target")
    if not target:
        return None
    (metric,) = named(job.metrics, [target["metric"]])
    direction = {"higher": "at least ", "lower": "at most "}.get(metric.better or "", "")
    return metric, f"{direction}{score(metric, target['value'])}"
