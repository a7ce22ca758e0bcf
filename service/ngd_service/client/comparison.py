"""Jobs side by side: when each reached each of their targets."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from ngd_service.client.client import Client
from ngd_service.resources import Job

__all__ = ["Goal", "History", "goals", "history_of"]

EVALUATIONS = 1000  # the newest of a job's; the dashboard's curves have no more points either


@dataclass(frozen=True, slots=True)
class Goal:
    """A target of one of the jobs, or of several."""

    metric: str
    value: float
    better: str

    def is_reached(self, value: float) -> bool:
        return value >= self.value if self.better == "higher" else value <= self.value


@dataclass(frozen=True, slots=True)
class History:
    """The test results of a job by step, and when its workers were up for the first time."""

    started_at: datetime | None
    evaluations: Sequence[tuple[int, datetime, Mapping[str, float]]]

    def reached(self, goal: Goal) -> tuple[int, float] | None:
        """Returns the first tested step that reaches the goal, and the seconds from the start; None: there is none."""
        for step, time, metrics in self.evaluations:
            if goal.metric in metrics and goal.is_reached(float(metrics[goal.metric])):
                return step, (time - (self.started_at or time)).total_seconds()
        return None


def goals(jobs: Iterable[Job]) -> list[Goal]:
    """Returns each different target of the jobs."""
    found: dict[Goal, None] = {}
    for job in jobs:
        target = job.spec.get("target")
        if target:
            better = next((m.better for m in job.metrics if m.name == target["metric"]), None)
            if better is not None:  # else its workers have never been up
                found[Goal(target["metric"], target["value"], better)] = None
    return list(found)


def history_of(client: Client, job_id: str) -> History:
    """Returns the job's history, as far as it goes by now."""
    first = client.events(job_id, limit=100).events
    started = next((event.time for event in first if event.kind == "started"), None)
    tested = client.events(job_id, limit=EVALUATIONS, newest_of=["evaluation"]).events
    return History(started, [(event.data["step"], event.time, event.data["metrics"]) for event in tested])
