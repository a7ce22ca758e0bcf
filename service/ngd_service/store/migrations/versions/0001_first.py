"""The installation, jobs, attempts, events, steps, evaluations and idempotency keys."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

TIME = sa.DateTime(timezone=True)
ROW_ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    op.create_table(
        "installation",
        sa.Column("number", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("home", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("number", name="pk_installation"),
    )
    _jobs_and_attempts()
    _events()
    for table in ("steps", "evaluations"):
        op.create_table(
            table,
            sa.Column("job_id", sa.String(64), sa.ForeignKey("jobs.id", name=f"fk_{table}_job_id"), nullable=False),
            sa.Column("step", sa.BigInteger, autoincrement=False, nullable=False),
            sa.Column("attempt", sa.Integer, nullable=False),
            sa.Column("seq", sa.BigInteger, nullable=False),
            sa.Column("json", sa.Text, nullable=False),
            sa.PrimaryKeyConstraint("job_id", "step", name=f"pk_{table}"),
        )
    op.create_table(
        "idempotency_keys",
        sa.Column("key", sa.String(255), nullable=False),
        sa.Column("fingerprint", sa.String(64), nullable=False),
        sa.Column("job_id", sa.String(64), sa.ForeignKey("jobs.id", name="fk_idempotency_keys_job_id"), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("key", name="pk_idempotency_keys"),
    )


def _jobs_and_attempts() -> None:
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("name", sa.String(63), nullable=False),
        sa.Column("spec", sa.JSON, nullable=False),
        sa.Column("desired", sa.String(16), nullable=False),
        sa.Column("phase", sa.String(16), nullable=False),
        sa.Column("reason", sa.String(64)),
        sa.Column("message", sa.Text),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("max_attempts", sa.Integer, nullable=False),
        sa.Column("cancel_requested_at", TIME),
        sa.Column("retry_at", TIME),
        sa.Column("progress", sa.JSON, nullable=False),
        sa.Column("metrics_latest", sa.JSON, nullable=False),
        sa.Column("result", sa.Text),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("started_at", TIME),
        sa.Column("finished_at", TIME),
        sa.Column("resource_version", sa.BigInteger, nullable=False),
        sa.Column("lease_token", sa.String(64)),
        sa.Column("lease_expires_at", TIME),
        sa.PrimaryKeyConstraint("id", name="pk_jobs"),
    )
    op.create_index("ix_jobs_phase_id", "jobs", ["phase", "id"])
    op.create_table(
        "attempts",
        sa.Column("id", sa.String(80), nullable=False),
        sa.Column("job_id", sa.String(64), sa.ForeignKey("jobs.id", name="fk_attempts_job_id"), nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("is_submitted", sa.Boolean, nullable=False),
        sa.Column("has_started", sa.Boolean, nullable=False),
        sa.Column("stop", sa.String(16), nullable=False),
        sa.Column("stop_sent_at", TIME),
        sa.Column("acknowledged_seq", sa.BigInteger, nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("ended_at", TIME),
        sa.PrimaryKeyConstraint("id", name="pk_attempts"),
        sa.UniqueConstraint("job_id", "number", name="uq_attempts_job_id_number"),
    )


def _events() -> None:
    op.create_table(
        "events",
        sa.Column("id", ROW_ID, autoincrement=True, nullable=False),
        sa.Column("job_id", sa.String(64), sa.ForeignKey("jobs.id", name="fk_events_job_id"), nullable=False),
        sa.Column("attempt_id", sa.String(80), sa.ForeignKey("attempts.id", name="fk_events_attempt_id")),
        sa.Column("attempt", sa.Integer),
        sa.Column("seq", sa.BigInteger),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("time", TIME, nullable=False),
        sa.Column("data", sa.JSON, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_events"),
        sa.UniqueConstraint("attempt_id", "seq", name="uq_events_attempt_id_seq"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_events_job_id_id", "events", ["job_id", "id"])
    op.create_index("ix_events_job_id_kind_id", "events", ["job_id", "kind", "id"])
