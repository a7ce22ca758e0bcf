"""The curves of one job, kept up to date by asking for the new points alone."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from nicegui import ui

from ngd_service.client.client import AsyncClient
from ngd_service.dashboard.curves import (
    BYTES,
    MOST_MARKS,
    PLAIN,
    RATE,
    SECONDS,
    SHARE,
    Curve,
    Curves,
    Goal,
    Mark,
    lines_of,
)
from ngd_service.resources import Job, Metric, Metrics

__all__ = ["Training"]

MAX_POINTS = 1_000  # about one a pixel; twice as many held: they are asked for again, thinned
TRAINING, TEST = Curve("training"), Curve("test", dotted=True)


class Training:
    """All curves over steps; they share one cursor and one zoom. A chart for each of the task's metrics comes first."""

    def __init__(self) -> None:
        self.place = ui.element("div").style("display: contents")  # of the metrics, which the workers name
        self.of_metric: dict[str, Curves] = {}
        self.rate = Curves("Throughput", unit=RATE, curves={"samples_per_s": Curve("throughput")})
        self.seconds = Curves("Time per step, by phase", unit=SECONDS, stacked=True)
        self.bytes_sent = Curves("Sent per step, by kind", unit=BYTES, stacked=True)
        settings = {"lr": Curve("learning rate"), "damping": Curve("damping")}
        self.lr = Curves("Learning rate and damping", curves=settings, may_be_log=True)
        self.marks: list[Mark] = []
        self.last_step: int | None = None

    @property
    def panels(self) -> list[Curves]:
        """All charts, in the order of the page."""
        return [*self.of_metric.values(), self.rate, self.seconds, self.bytes_sent, self.lr]

    @property
    def names(self) -> list[str]:
        """The series of all charts, by which the API knows them."""
        alone = [name for panel in self.panels if not panel.stacked for name in panel.curves]
        return [*alone, "seconds", "bytes_sent"]

    async def refresh(self, api: AsyncClient, job: Job, *, whole: bool = False) -> None:
        """Fetches and draws what is new up to the step which the job is at; everything again if `whole`."""
        step, has_new_chart = job.status.progress.step, self._add_charts(job)
        if has_new_chart or self.last_step is None or step - self.last_step > MAX_POINTS or self._is_crowded():
            whole = True
        # The newest step is asked for again: its evaluation may have come after it.
        from_step = 0 if whole or self.last_step is None else self.last_step
        metrics = await api.metrics(job.id, names=self.names, from_step=from_step, to_step=step, max_points=MAX_POINTS)
        if not metrics.series:
            return
        is_first, self.last_step = self.last_step is None, step
        self._draw(metrics, whole=whole)
        if is_first or has_new_chart:
            self._tell(f"ngd.connect({json.dumps([panel.chart.id for panel in self.panels])})")

    def redo(self, last_step: int) -> None:
        """The job went back to a checkpoint: the steps after it are about to be replaced."""
        if self.last_step is not None and self.last_step > last_step:
            self.last_step = last_step
            self._tell("".join(panel.cut(last_step) for panel in self.panels))

    def mark(self, marks: Sequence[Mark]) -> None:
        """Draws more vertical lines in all curves."""
        self.marks = [*self.marks, *marks][-MOST_MARKS:]
        for panel in self.panels:
            panel.mark(marks)
        ids = [panel.chart.id for panel in self.panels]
        self._tell(f"ngd.mark({json.dumps(ids)}, {json.dumps(lines_of(marks))})")

    def _add_charts(self, job: Job) -> bool:
        """Makes the charts of metrics that have none yet, the loss first; returns whether there were any."""
        new = [metric for metric in job.metrics if metric.name not in self.of_metric]
        target = job.spec.get("target") or {}
        with self.place:
            for metric in sorted(new, key=lambda metric: metric.name != "loss"):
                self.of_metric[metric.name] = chart = _chart_of(metric, target)
                chart.mark(self.marks)
        return bool(new)

    def _draw(self, metrics: Metrics, *, whole: bool) -> None:
        new: dict[Curves, dict[str, list[tuple[int, float]]]] = {panel: {} for panel in self.panels}
        for name, series in metrics.series.items():
            panel, key = self._place(name)
            known = panel.points.get(key)
            after = known[-1][0] if known and not whole else 0
            read = zip(series.steps, series.values, strict=True)
            new[panel][key] = [(step, value) for step, value in read if step > after]
        scripts = [(panel.replace if whole else panel.extend)(points) for panel, points in new.items()]
        self._tell("".join(scripts))
        for panel in self.panels:  # one worker sends nothing, and a loop of the user's own may not tell its phases
            panel.show(is_needed=any(panel.points.values()))

    def _place(self, name: str) -> tuple[Curves, str]:
        group, _, part = name.partition(".")
        if part:
            return {"seconds": self.seconds, "bytes_sent": self.bytes_sent}[group], part
        return next((panel, name) for panel in self.panels if name in panel.curves)

    def _tell(self, script: str) -> None:
        self.rate.tell(script)

    def _is_crowded(self) -> bool:
        return any(len(points) > 2 * MAX_POINTS for panel in self.panels for points in panel.points.values())


def _chart_of(metric: Metric, target: Mapping[str, Any]) -> Curves:
    """Returns a chart of the metric in training and on the test data, in its unit, with a line at the job's target."""
    is_goal = target.get("metric") == metric.name
    unit = SHARE if metric.unit == "share" else PLAIN
    return Curves(
        metric.label[:1].upper() + metric.label[1:],
        unit=unit,
        curves={metric.name: TRAINING, f"test_{metric.name}": TEST},
        axis_name=unit.name or metric.label,
        may_be_log=unit is PLAIN and metric.better == "lower",  # such as a loss: above 0, and of any size
        goal=Goal(target["value"], is_floor=metric.better == "higher") if is_goal else None,
    )
