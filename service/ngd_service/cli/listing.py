"""The table of `ngd jobs`: a line for each job, whole, whatever the width of the terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from ngd_service.cli.follow import mark, steps
from ngd_service.cli.terminal import harmless
from ngd_service.client.scores import result
from ngd_service.client.units import number
from ngd_service.resources import Job

__all__ = ["job_table", "whole_width"]

WIDEST = 1000
LEFT_OUT_FIRST = ("loss", "result", "step", "created")  # where a terminal is too narrow for all columns


def job_table(jobs: Sequence[Job], console: Console) -> Table:
    """Returns the jobs with as many columns as fit; in a pipe all of them do."""
    table, left_out = _table(jobs, set()), set[str]()
    for name in LEFT_OUT_FIRST:
        if not console.is_terminal or whole_width(table, console) <= console.width:
            break
        left_out.add(name)
        table = _table(jobs, left_out)
    table.width = whole_width(table, console)  # else cells would be cut to the terminal's width
    return table


def whole_width(table: Table, console: Console) -> int:
    """Returns the columns that the table takes where nothing is cut."""
    return Measurement.get(console, console.options.update(max_width=WIDEST), table).maximum


def _table(jobs: Sequence[Job], left_out: set[str]) -> Table:
    rows = [_row(job) for job in jobs]
    table = Table(box=None, pad_edge=False)
    for name in rows[0]:
        if name not in left_out:
            table.add_column(name, no_wrap=True, overflow="ignore")
    for row in rows:
        table.add_row(*(text for name, text in row.items() if name not in left_out))
    return table


def _row(job: Job) -> dict[str, str]:
    loss = job.metrics_latest.get("loss")
    return {
        "id": job.id,
        "name": harmless(job.name),
        "phase": f"{mark(job)} {job.status.phase}",
        "step": steps(job) or "-",
        "loss": "-" if loss is None else number(loss),
        "result": harmless(result(job) or "-"),
        "created": f"{job.created_at:%Y-%m-%d %H:%MZ}",
    }
