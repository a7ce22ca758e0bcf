"""How the jobs stand, counted in four queries that an index answers each."""

import sqlalchemy as sa

from ngd_service.job_state import PASSING, Phase
from ngd_service.store import tables as t
from ngd_service.store.base import JobCounts

__all__ = ["job_counts"]


def job_counts(connection: sa.Connection) -> JobCounts:
    """Returns the counts of this moment."""
    phase, created_at = t.jobs.c.phase, t.jobs.c.created_at
    counted = connection.execute(sa.select(phase, sa.func.count()).group_by(phase)).all()
    # Ids sort by time of creation, so the oldest one is the first in the index of phases.
    oldest = sa.select(created_at).where(phase == Phase.QUEUED).order_by(t.jobs.c.id).limit(1)
    of_job = t.events.alias()
    of_this = sa.select(sa.func.max(of_job.c.id)).where(of_job.c.job_id == t.jobs.c.id)
    newest, change = of_this.scalar_subquery(), of_this.where(of_job.c.kind == "phase").scalar_subquery()
    reports = sa.select(t.jobs.c.id, t.events.c.time).join_from(t.jobs, t.events, t.events.c.id == newest)
    changed = sa.select(phase, sa.func.min(t.events.c.time)).join_from(t.jobs, t.events, t.events.c.id == change)
    passing = connection.execute(changed.where(phase.in_(PASSING)).group_by(phase)).all()
    return JobCounts(
        num_in_phase={Phase(name): number for name, number in counted},
        oldest_queued_at=connection.execute(oldest).scalar_one_or_none(),
        last_report_at={row.id: row.time for row in connection.execute(reports.where(phase == Phase.RUNNING))},
        in_phase_since={Phase(name): since for name, since in passing},
    )
