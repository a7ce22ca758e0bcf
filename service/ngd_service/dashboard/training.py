"""The curves of one job, kept up to date by asking for the new points alone."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from nicegui import ui

from ngd_service.client.client import AsyncClient
from ngd_service.dashboard.anatomy import Anatomy
from ngd_service.dashboard.cumulative import ALL_REFRESHED, SGD, Cumulative
from ngd_service.dashboard.curves import Curve, Curves, Goal
from ngd_service.dashboard.marks import MOST_MARKS, Mark, lines_of
from ngd_service.dashboard.measures import BYTES, PLAIN, RATE, SECONDS, SHARE
from ngd_service.dashboard.smoothing import aligned
from ngd_service.dashboard.trust import Trust
from ngd_service.dashboard.view import View
from ngd_service.resources import Event, Job, Metric, Metrics

__all__ = ["Training"]

MAX_POINTS = 1_000  # about one a pixel; twice as many held: they are asked for again, thinned
EVERY = "all refreshed"
TRAINING, TEST = Curve("training", may_be_smooth=True), Curve("test", dotted=True)


class Training:
    """All curves over steps; they share one reader, one cursor and one zoom.

    Their panels are laid out by three calls, each in its section of the page.
    """

    def __init__(self, view: View) -> None:
        self.view = view
        self.of_metric: dict[str, Curves] = {}
        self.marks: list[Mark] = []
        self.last_step: int | None = None

    def lay_out_metrics(self) -> None:
        """A chart for each of the task's metrics, which the workers name, then the pace and the learning rate."""
        self.place = ui.element("div").style("display: contents")
        rate = {"samples_per_s": Curve("throughput", may_be_smooth=True)}
        self.rate = Curves("Throughput", unit=RATE, curves=rate, view=self.view)
        lr = {"lr": Curve("learning rate")}
        self.lr = Curves("Learning rate", curves=lr, axis_name="learning rate", may_be_log=True, view=self.view)

    def lay_out_curvature(self) -> None:
        """Whether the curvature can be trusted."""
        self.trust = Trust(self.view)

    def lay_out_step(self) -> None:
        """Where the time of a step goes, and what it sends."""
        self.seconds = Curves("Time per step, by phase", unit=SECONDS, stacked=True, view=self.view)
        self.anatomy = Anatomy()
        self.bytes_sent = Curves("Sent per step, by kind", unit=BYTES, stacked=True, view=self.view, classes="wide")
        self.so_far = Cumulative(self.view)

    def lay_out_workers(self) -> None:
        """What the processes take of their machines."""
        self.cpu = OfRanks("CPU by rank", unit=PLAIN, axis_name="cores", view=self.view)
        self.memory = OfRanks("Memory by rank", unit=BYTES, view=self.view)

    @property
    def panels(self) -> list[Curves]:
        """All charts, in the order of the page."""
        own = [self.rate, self.lr, self.trust, self.so_far]
        return [*self.of_metric.values(), *own, *self.groups.values()]

    @property
    def groups(self) -> dict[str, Curves]:
        """The charts of which each part is a series, <group>.<part>."""
        return {
            "bytes_sent": self.bytes_sent,
            "seconds": self.seconds,
            "ranks.cpu": self.cpu,
            "ranks.memory_bytes": self.memory,
        }

    @property
    def names(self) -> list[str]:
        """The series of all charts, by which the API knows them."""
        alone = [name for panel in self.panels for name in panel.curves]
        return [*alone, *self.groups]

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
            ids = [panel.chart.id for panel in self.panels]
            window = self.view.window if is_first else None
            self._tell(f"{self.view.script}ngd.connect({json.dumps(ids)},{json.dumps(window)})")
        if whole:  # the steps of a long answer are thinned out
            await self._read_newest(api, job, step)
            await self.refine(api, job.id, self.view.window)
        else:
            self.anatomy.add(metrics)

    async def _read_newest(self, api: AsyncClient, job: Job, step: int) -> None:
        """Gives the table of phases the newest steps, each by itself."""
        from_step = max(1, step - self.anatomy.num_steps + 1)
        self.anatomy.add(await api.metrics(job.id, names=["seconds"], from_step=from_step, to_step=step), now=True)

    async def refine(self, api: AsyncClient, job_id: str, window: tuple[int, int] | None) -> None:
        """Reads the steps in view again where those of the whole run are thinned out; None: all are in view."""
        self.view.window = window
        if window is None or self.last_step is None or self.last_step <= MAX_POINTS:
            return
        first, last = window
        fine = await api.metrics(job_id, names=self.names, from_step=first, to_step=last, max_points=MAX_POINTS)
        points: dict[Curves, dict[str, list[tuple[int, float]]]] = {panel: {} for panel in self.panels}
        for name, series in fine.series.items():
            panel, key = self._place(name)
            within = [(s, v) for s, v in zip(series.steps, series.values, strict=True) if first <= s <= last]
            known = panel.points.get(key, [])
            before, after = ([p for p in known if p[0] < first], [p for p in known if p[0] > last])
            points[panel][key] = [*before, *within, *after]
        scripts = [
            panel.replace(aligned(of_panel) if panel.stacked else {**panel.points, **of_panel})
            for panel, of_panel in points.items()
        ]
        self._tell("".join(scripts))

    def redraw(self) -> None:
        """Draws all again, after the view has changed."""
        if self.last_step is not None:
            self._tell("".join(panel.redraw() for panel in self.panels))

    def started(self, event: Event) -> None:
        """Takes from the start of the workers what one of them would send otherwise."""
        ranks, parameters = event.data["world_size"], event.data.get("parameters")
        if parameters:
            of_sgd = 4 * parameters * 2 * (ranks - 1) // ranks  # float32, all-reduced as a ring sends it
            self.bytes_sent.goals = [Goal(of_sgd, label="SGD would send")] if of_sgd else []
            self.so_far.per_step = {SGD: of_sgd} if of_sgd else {}

    def redo(self, last_step: int) -> None:
        """The job went back to a checkpoint: the steps after it are about to be replaced."""
        if self.last_step is not None and self.last_step > last_step:
            self.last_step = last_step
            self.anatomy.redo(last_step)
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
                self.of_metric[metric.name] = chart = _chart_of(metric, target, self.view)
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
        if whole:
            self._compare_bytes(new[self.bytes_sent])
        scripts = [(panel.replace if whole else panel.extend)(points) for panel, points in new.items()]
        self._tell("".join(scripts))
        for panel in self.panels:  # one worker sends nothing, and a loop of the user's own may not tell its phases
            panel.show(is_needed=any(panel.points.values()))

    def _compare_bytes(self, sent: Mapping[str, list[tuple[int, float]]]) -> None:
        """Marks the bytes of the first step, in which every statistic is measured, if it is known."""
        first = [values[0] for values in sent.values() if values and values[0][0] == 1]
        goals = [goal for goal in self.bytes_sent.goals if goal.label != EVERY]
        total = sum(value for _, value in first)
        is_known = bool(sent.get("statistics") and total)
        self.bytes_sent.goals = goals + ([Goal(total, label=EVERY)] if is_known else [])
        self.so_far.per_step |= {ALL_REFRESHED: total} if is_known else {}

    def _place(self, name: str) -> tuple[Curves, str]:
        for group, panel in self.groups.items():
            if name.startswith(f"{group}."):
                return panel, name.removeprefix(f"{group}.")
        return next((panel, name) for panel in self.panels if name in panel.curves)

    def _tell(self, script: str) -> None:
        self.rate.tell(script)

    def _is_crowded(self) -> bool:
        return any(len(points) > 2 * MAX_POINTS for panel in self.panels for points in panel.points.values())


class OfRanks(Curves):
    """A line for each rank, over an axis from 0: a difference of ranks is seen at its size."""

    def _extent(self) -> dict[str, Any]:
        return super()._extent() | {"min": 0}

    def _curve(self, key: str) -> Curve:
        return Curve(f"rank {key}", may_be_smooth=True)


def _chart_of(metric: Metric, target: Mapping[str, Any], view: View) -> Curves:
    """Returns a chart of the metric in training and on the test data, in its unit, with a line at the job's target."""
    is_goal = target.get("metric") == metric.name
    unit = SHARE if metric.unit == "share" else PLAIN
    return Curves(
        metric.label[:1].upper() + metric.label[1:],
        unit=unit,
        curves={metric.name: TRAINING, f"test_{metric.name}": TEST},
        axis_name=unit.name or metric.label,
        may_be_log=unit is PLAIN and metric.better == "lower",  # such as a loss: above 0, and of any size
        goals=[Goal(target["value"], is_floor=metric.better == "higher")] if is_goal else [],
        view=view,
    )
