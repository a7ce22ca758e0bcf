"""Jobs side by side: what differs in their specs, how they ended, and when each reached each target.

`ngd compare` and the page at /compare show the same words.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from ngd_service.client.scores import named, result, score
from ngd_service.client.units import NOTHING, counted, duration, seconds
from ngd_service.resources import EventPage, Job
from ngd_workers.contract.spec_differences import differences

__all__ = ["KINDS", "Goal", "History", "address", "goals", "labels", "results", "settings", "verdict"]

KINDS = ("started", "evaluation")  # of the events that a history is made of


@dataclass(frozen=True, slots=True)
class Goal:
    """A target of one of the jobs, or of several."""

    metric: str
    value: float
    better: str
    words: str = field(default="", compare=False)

    def is_reached(self, value: float) -> bool:
        return value >= self.value if self.better == "higher" else value <= self.value


@dataclass(slots=True)
class History:
    """The test results of a job by step, and when its workers were up for the first time; grows by more events."""

    started_at: datetime | None = None
    evaluations: list[tuple[int, datetime, Mapping[str, float]]] = field(default_factory=list)
    num_starts: int = 0
    next_after: int = 0

    def add(self, page: EventPage) -> None:
        """Takes what has happened since."""
        for event in page.events:
            if event.kind == "started":
                self.started_at = self.started_at or event.time
                self.num_starts += 1
            elif event.kind == "evaluation":
                self.evaluations.append((event.data["step"], event.time, event.data["metrics"]))
        self.next_after = page.next_after

    def reached(self, goal: Goal) -> tuple[int, float] | None:
        """Returns the first tested step that reaches the goal, and the seconds from the start; None: there is none."""
        for step, time, metrics in self.evaluations:
            if goal.metric in metrics and goal.is_reached(float(metrics[goal.metric])):
                return step, (time - (self.started_at or time)).total_seconds()
        return None

    def best(self, metric: str, better: str | None) -> tuple[float, int] | None:
        """Returns the best test result and its step; None: there is none, or it is not known which is better."""
        tested = [(float(values[metric]), step) for step, _, values in self.evaluations if metric in values]
        finite = [(value, step) for value, step in tested if abs(value) < float("inf")]
        if better is None or not finite:
            return None
        return (max if better == "higher" else min)(finite, key=lambda one: one[0])


def address(base_url: str, job_ids: Iterable[str]) -> str:
    """Returns where the dashboard shows these jobs side by side.

    >>> address("http://127.0.0.1:8000", ["job_1", "job_2"])
    'http://127.0.0.1:8000/compare?jobs=job_1,job_2'
    """
    return f"{base_url}/compare?jobs={','.join(job_ids)}"


def labels(jobs: Sequence[Job]) -> list[str]:
    """Returns a name for each job, with the end of its id if others of them have the same name."""
    names = [job.name for job in jobs]
    return [job.name if names.count(job.name) == 1 else f"{job.name} (...{job.id[-4:]})" for job in jobs]


def goals(jobs: Iterable[Job]) -> list[Goal]:
    """Returns each different target of the jobs."""
    found: dict[Goal, None] = {}
    for job in jobs:
        target = job.spec.get("target")
        if target:
            metric = next((metric for metric in job.metrics if metric.name == target["metric"]), None)
            if metric is not None and metric.better is not None:  # else its workers have never been up
                bound = "at least" if metric.better == "higher" else "at most"
                words = f"{metric.label} {bound} {score(metric, target['value'])}"
                found[Goal(target["metric"], target["value"], metric.better, words)] = None
    return list(found)


def settings(jobs: Sequence[Job]) -> dict[str, list[str]]:
    """Returns the settings that differ, by dotted path, with the value of each job."""
    differing = differences([job.spec for job in jobs])
    return {path: [_shown(value) for value in values] for path, values in differing.items()}


def results(jobs: Sequence[Job], histories: Sequence[History], goals: Sequence[Goal]) -> dict[str, list[str]]:
    """Returns how the jobs stand or ended, by what is told, with the words for each job."""
    told = {
        "phase": [job.status.phase for job in jobs],
        "step": [f"{job.status.progress.step:,}" for job in jobs],
        "result": [result(job) or NOTHING for job in jobs],
        "best test result": [_best(*pair) for pair in zip(jobs, histories, strict=True)],
        "training took": [_training(job) for job in jobs],
        "with start and tests": [_duration(job) for job in jobs],
    }
    for goal in goals:
        told[goal.words] = [_reached(history, goal) for history in histories]
    return told


def verdict(runs: Mapping[str, tuple[Job, History]], goal: Goal) -> str:
    """Returns who reached the goal first, in steps and in seconds, in one sentence. runs: by the name to call each."""
    reached = {name: history.reached(goal) for name, (_, history) in runs.items()}
    arrived = {name: result for name, result in reached.items() if result is not None}
    late = [name for name in runs if name not in arrived]
    is_over = all(runs[name][0].status.is_terminal for name in late)
    if not arrived:
        return f"None of them {'reached' if is_over else 'has reached'} {goal.words}{'' if is_over else ' yet'}."
    missed = "did not reach it" if is_over else f"{'has' if len(late) == 1 else 'have'} not reached it yet"
    rest = f"; {_listed(late)} {missed}" if late else ""
    if len(arrived) == 1:
        ((name, (step, time_s)),) = arrived.items()
        return f"Only {name} reached {goal.words}, at step {step:,} after {seconds(time_s)}{rest}."
    first, in_steps = _first({name: (step, counted(step, "step")) for name, (step, _) in arrived.items()})
    faster, in_seconds = _first({name: (time_s, seconds(time_s)) for name, (_, time_s) in arrived.items()})
    then = f" and in seconds ({in_seconds})" if first == faster else f", and {faster} first in seconds ({in_seconds})"
    return f"To {goal.words}, {first} first in steps ({in_steps}){then}{rest}."


def _first(taken: Mapping[str, tuple[float, str]]) -> tuple[str, str]:
    """Returns "x was", or "x and y were", of who took least, and how much that is beside the next one's."""
    least = min(value for value, _ in taken.values())
    first = [label for label, (value, _) in taken.items() if value == least]
    others = sorted((value, words, label) for label, (value, words) in taken.items() if value > least)
    said = [taken[first[0]][1], *(f"{label} took {words}" for _, words, label in others[:1])]
    return f"{_listed(first)} {'was' if len(first) == 1 else 'were'}", "; ".join(said)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _best(job: Job, history: History) -> str:
    for metric in job.metrics[:1]:
        best = history.best(metric.name, metric.better)
        if best is not None:
            (known,) = named(job.metrics, [metric.name])
            return f"{known.label} {score(known, best[0])} at step {best[1]:,}"
    return NOTHING


def _training(job: Job) -> str:
    ended = job.status.result
    return NOTHING if ended is None or ended.seconds is None else seconds(ended.seconds)


def _duration(job: Job) -> str:
    if job.started_at is None or job.finished_at is None:
        return NOTHING
    return duration((job.finished_at - job.started_at).total_seconds())


def _reached(history: History, goal: Goal) -> str:
    found = history.reached(goal)
    return "not reached" if found is None else f"step {found[0]:,} after {seconds(found[1])}"


def _shown(value: object) -> str:
    return NOTHING if value is None else value if isinstance(value, str) else json.dumps(value)
