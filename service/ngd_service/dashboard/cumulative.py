"""The bytes of all steps so far, beside those that a run without saving and one of SGD would have sent."""

from collections.abc import Mapping

from ngd_service.client.units import binary_bytes, number
from ngd_service.dashboard.curves import Curve, Curves
from ngd_service.dashboard.measures import BYTES
from ngd_service.dashboard.smoothing import Points
from ngd_service.dashboard.view import View

__all__ = ["Cumulative"]

SENT, ALL_REFRESHED, SGD = "bytes_so_far", "all_refreshed", "sgd"
LABELS = {SENT: "sent", ALL_REFRESHED: "if all were refreshed", SGD: "SGD would have sent"}


class Cumulative(Curves):
    """Lines that rise; `per_step` has what a step would send otherwise, as far as it is known."""

    def __init__(self, view: View) -> None:
        self.per_step: dict[str, float] = {}
        super().__init__("Sent so far", unit=BYTES, curves={SENT: Curve(LABELS[SENT])}, view=view, classes="wide")

    def replace(self, points: Mapping[str, Points]) -> str:
        return super().replace(self._with_others(points, []))

    def extend(self, points: Mapping[str, Points]) -> str:
        return super().extend(self._with_others(points, self.points[SENT]))

    def _curve(self, key: str) -> Curve:
        return Curve(LABELS[key])

    def _with_others(self, points: Mapping[str, Points], known: Points) -> dict[str, Points]:
        """Counts steps from the first one on: a job may go on from another one's checkpoint."""
        sent = points.get(SENT, [])
        if not any(value for _, value in [*known[-1:], *sent]):  # one rank sends nothing
            return {SENT: []}
        first = (known or sent)[0][0]
        others = {
            key: [(step, per_step * (step - first + 1)) for step, _ in sent] for key, per_step in self.per_step.items()
        }
        return {SENT: sent, **others}

    def sentence(self) -> str:
        if not self.points[SENT]:
            return "No data yet"
        step, sent = self.points[SENT][-1]
        said = [f"rank 0 has sent {binary_bytes(sent)} by step {step:,}"]
        for key, words in ((ALL_REFRESHED, "of refreshing all at each step"), (SGD, "of SGD's bytes")):
            if self.points.get(key):
                said.append(f"{number(100 * sent / self.points[key][-1][1])}% {words}")
        return "; ".join(said)
