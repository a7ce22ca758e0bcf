"""The table of `ngd compare`: a column for each job."""

import json
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from ngd_service.cli.listing import whole_width
from ngd_service.cli.terminal import harmless
from ngd_service.client.comparison import Goal, History
from ngd_service.client.scores import named, result, score
from ngd_service.client.units import NOTHING, duration
from ngd_service.resources import Job
from ngd_workers.contract.spec_differences import differences

__all__ = ["comparison_table"]


def comparison_table(
    jobs: Sequence[Job], histories: Sequence[History], goals: Sequence[Goal], console: Console
) -> Table:
    """Returns the settings that differ, how the jobs ended, and when each of them reached each goal."""
    table = Table(box=None, pad_edge=False)
    table.add_column("", no_wrap=True, overflow="ignore")
    for job in jobs:
        table.add_column(harmless(job.id), no_wrap=True, overflow="ignore")
    for path, values in differences([job.spec for job in jobs]).items():
        table.add_row(harmless(path), *(harmless(_shown(value)) for value in values))
    table.add_section()
    table.add_row("phase", *(job.status.phase for job in jobs))
    table.add_row("step", *(f"{job.status.progress.step:,}" for job in jobs))
    table.add_row("result", *(harmless(result(job) or NOTHING) for job in jobs))
    for goal in goals:
        (metric,) = named(jobs[0].metrics, [goal.metric])
        bound = f"{'at least' if goal.better == 'higher' else 'at most'} {score(metric, goal.value)}"
        table.add_row(harmless(f"{metric.label} {bound}"), *(_reached(history, goal) for history in histories))
    table.width = whole_width(table, console)
    return table


def _reached(history: History, goal: Goal) -> str:
    found = history.reached(goal)
    return "not reached" if found is None else f"step {found[0]:,} after {duration(found[1])}"


def _shown(value: object) -> str:
    return NOTHING if value is None else value if isinstance(value, str) else json.dumps(value)
