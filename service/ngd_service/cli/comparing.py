"""The table of `ngd compare`: a column for each job."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from ngd_service.cli.listing import whole_width
from ngd_service.cli.terminal import harmless
from ngd_service.client.comparison import Goal, History, results, settings
from ngd_service.resources import Job

__all__ = ["comparison_table"]


def comparison_table(
    jobs: Sequence[Job], histories: Sequence[History], goals: Sequence[Goal], console: Console
) -> Table:
    """Returns the settings that differ, how the jobs ended, and when each of them reached each goal."""
    table = Table(box=None, pad_edge=False)
    table.add_column("", no_wrap=True, overflow="ignore")
    for job in jobs:
        table.add_column(harmless(job.id), no_wrap=True, overflow="ignore")
    for told in (settings(jobs), results(jobs, histories, goals)):
        for name, values in told.items():
            table.add_row(harmless(name), *map(harmless, values))
        table.add_section()
    table.width = whole_width(table, console)
    return table
