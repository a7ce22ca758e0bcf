"""The curves of one job, kept up to date by asking for the new points alone."""

from collections.abc import Mapping, Sequence

from service.client import AsyncClient
from service.dashboard.curves import BYTES, SECONDS, SHARE, Curve, Curves, Mark, connect
from service.resources import Metrics

__all__ = ["Training", "aligned"]

MAX_POINTS = 1_000  # about one a pixel; twice as many held: they are asked for again, thinned
NAMES = ("loss", "accuracy", "samples_per_s", "lr", "damping", "test_loss", "test_accuracy", "seconds", "bytes_sent")
Points = list[tuple[float, float | None]]
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
        self.redone_until = 0
        self.is_connected = False

    async def refresh(self, api: AsyncClient, job_id: str, *, whole: bool = False) -> None:
        """Fetches and draws what is new; everything again if `whole`."""
        whole = whole or self.last_step is None or self._is_crowded() or self.last_step <= self.redone_until
        # The newest step is asked for again: its evaluation may have come after it.
        metrics = await api.metrics(
            job_id, names=NAMES, from_step=None if whole else self.last_step, max_points=MAX_POINTS
        )
        if metrics.last_step:
            self.last_step = metrics.last_step
            self._draw(metrics, whole=whole)

    def redo(self) -> None:
        """The job went back to a checkpoint: the steps known so far are about to be replaced."""
        self.redone_until = self.last_step or 0

    def mark(self, marks: Sequence[Mark]) -> None:
        """Draws vertical lines in all curves."""
        for panel in self.panels:
            panel.mark(marks)

    def _draw(self, metrics: Metrics, *, whole: bool) -> None:
        sorted_out: dict[Curves, dict[str, Points]] = {panel: {} for panel in self.panels}
        for name, series in metrics.series.items():
            panel, key = self._place(name)
            known = panel.points.get(key)
            after = known[-1][0] if known and not whole else 0
            read = zip(series.steps, series.values, strict=True)
            sorted_out[panel][key] = [(step, value) for step, value in read if step > after]
        for panel, points in sorted_out.items():
            if panel.stacked:
                points = aligned(points, is_thinned=whole and metrics.last_step > MAX_POINTS)
            (panel.replace if whole else panel.extend)(points)
        if not self.is_connected:
            connect(self.panels)
            self.is_connected = True

    def _place(self, name: str) -> tuple[Curves, str]:
        group, _, part = name.partition(".")
        if part:
            return {"seconds": self.seconds, "bytes_sent": self.bytes_sent}[group], part
        return next((panel, name) for panel in self.panels if name in panel.curves)

    def _is_crowded(self) -> bool:
        return any(len(points) > 2 * MAX_POINTS for panel in self.panels for points in panel.points.values())


def aligned(points: Mapping[str, Points], *, is_thinned: bool) -> dict[str, Points]:
    """The same steps for every series, as stacking needs them.

    A part that a step did not report took nothing; in a thinned reply its value may merely be left out, and is taken to
    be the one before.
    """
    steps = sorted({step for values in points.values() for step, _ in values})
    filled: dict[str, Points] = {}
    for name, values in points.items():
        known, held = dict(values), 0.0
        filled[name] = []
        for step in steps:
            value = known.get(step, held if is_thinned else 0.0)
            filled[name].append((step, value))
            held = value or 0.0
    return filled
