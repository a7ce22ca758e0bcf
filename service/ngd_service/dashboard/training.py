"""The curves of one job, kept up to date by asking for the new points alone."""

import json
from collections.abc import Sequence

from ngd_service.client.client import AsyncClient
from ngd_service.dashboard.curves import BYTES, SECONDS, SHARE, Curve, Curves, Mark, lines_of
from ngd_service.resources import Metrics

__all__ = ["Training"]

MAX_POINTS = 1_000  # about one a pixel; twice as many held: they are asked for again, thinned
NAMES = ("loss", "accuracy", "samples_per_s", "lr", "damping", "test_loss", "test_accuracy", "seconds", "bytes_sent")
TRAINING, TEST = Curve("training"), Curve("test", dotted=True)


class Training:
    """All curves over steps; they share one cursor and one zoom."""

    def __init__(self) -> None:
        self.loss = Curves("Loss", axis_name="loss", curves={"loss": TRAINING, "test_loss": TEST}, may_be_log=True)
        self.accuracy = Curves("Accuracy", unit=SHARE, curves={"accuracy": TRAINING, "test_accuracy": TEST})
        self.rate = Curves("Throughput", axis_name="samples/s", curves={"samples_per_s": Curve("throughput")})
        self.seconds = Curves("Time per step, by phase", unit=SECONDS, stacked=True)
        self.bytes_sent = Curves("Sent per step, by kind", unit=BYTES, stacked=True)
        settings = {"lr": Curve("learning rate"), "damping": Curve("damping")}
        self.lr = Curves("Learning rate and damping", curves=settings, may_be_log=True)
        self.panels = (self.loss, self.accuracy, self.rate, self.seconds, self.bytes_sent, self.lr)
        self.last_step: int | None = None

    async def refresh(self, api: AsyncClient, job_id: str, step: int, *, whole: bool = False) -> None:
        """Fetches and draws what is new up to this step, which the job is at; everything again if `whole`."""
        if self.last_step is None or step - self.last_step > MAX_POINTS or self._is_crowded():
            whole = True
        # The newest step is asked for again: its evaluation may have come after it.
        from_step = 0 if whole or self.last_step is None else self.last_step
        metrics = await api.metrics(job_id, names=NAMES, from_step=from_step, to_step=step, max_points=MAX_POINTS)
        if not metrics.series:
            return
        is_first, self.last_step = self.last_step is None, step
        self._draw(metrics, whole=whole)
        if is_first:
            self.loss.tell(f"ngd.connect({json.dumps([panel.chart.id for panel in self.panels])})")

    def redo(self, last_step: int) -> None:
        """The job went back to a checkpoint: the steps after it are about to be replaced."""
        if self.last_step is not None and self.last_step > last_step:
            self.last_step = last_step
            self.loss.tell("".join(panel.cut(last_step) for panel in self.panels))

    def mark(self, marks: Sequence[Mark]) -> None:
        """Draws more vertical lines in all curves."""
        for panel in self.panels:
            panel.mark(marks)
        ids = [panel.chart.id for panel in self.panels]
        self.loss.tell(f"ngd.mark({json.dumps(ids)}, {json.dumps(lines_of(marks))})")

    def _draw(self, metrics: Metrics, *, whole: bool) -> None:
        new: dict[Curves, dict[str, list[tuple[int, float]]]] = {panel: {} for panel in self.panels}
        for name, series in metrics.series.items():
            panel, key = self._place(name)
            known = panel.points.get(key)
            after = known[-1][0] if known and not whole else 0
            read = zip(series.steps, series.values, strict=True)
            new[panel][key] = [(step, value) for step, value in read if step > after]
        scripts = [(panel.replace if whole else panel.extend)(points) for panel, points in new.items()]
        self.loss.tell("".join(scripts))

    def _place(self, name: str) -> tuple[Curves, str]:
        group, _, part = name.partition(".")
        if part:
            return {"seconds": self.seconds, "bytes_sent": self.bytes_sent}[group], part
        return next((panel, name) for panel in self.panels if name in panel.curves)

    def _is_crowded(self) -> bool:
        return any(len(points) > 2 * MAX_POINTS for panel in self.panels for points in panel.points.values())
