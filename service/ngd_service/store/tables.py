"""The tables. A change here needs a new file in migrations/versions/; a test compares the two."""

from datetime import UTC, datetime

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
)

__all__ = [
    "attempts",
    "evaluations",
    "events",
    "idempotency_keys",
    "installation",
    "jobs",
    "metadata",
    "spans",
    "steps",
]


class UTCDateTime(TypeDecorator[datetime]):
    """Aware UTC times on every database; SQLite itself keeps no time zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


RowId = BigInteger().with_variant(Integer, "sqlite")  # SQLite numbers rows by itself for INTEGER keys alone

metadata = MetaData(naming_convention={"fk": "fk_%(table_name)s_%(column_0_name)s", "pk": "pk_%(table_name)s"})

installation = Table(
    "installation",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=False),  # 1: a database has one
    Column("id", String(64), nullable=False),
    Column("home", Text, nullable=False),
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("name", String(63), nullable=False),
    Column("spec", JSON, nullable=False),
    Column("desired", String(16), nullable=False),
    Column("phase", String(16), nullable=False),
    Column("reason", String(64)),
    Column("message", Text),
    Column("attempt", Integer, nullable=False),
    Column("max_attempts", Integer, nullable=False),
    Column("cancel_requested_at", UTCDateTime),
    Column("retry_at", UTCDateTime),
    Column("progress", JSON, nullable=False),
    Column("metrics_latest", JSON, nullable=False),
    Column("result", Text),
    Column("created_at", UTCDateTime, nullable=False),
    Column("created_by", String(63)),
    Column("started_at", UTCDateTime),
    Column("finished_at", UTCDateTime),
    Column("resource_version", BigInteger, nullable=False),
    Column("lease_token", String(64)),
    Column("lease_expires_at", UTCDateTime),
    Index("ix_jobs_phase_id", "phase", "id"),
)

attempts = Table(
    "attempts",
    metadata,
    Column("id", String(80), primary_key=True),
    Column("job_id", ForeignKey("jobs.id"), nullable=False),
    Column("number", Integer, nullable=False),
    Column("is_submitted", Boolean, nullable=False),
    Column("has_started", Boolean, nullable=False),
    Column("stop", String(16), nullable=False),
    Column("stop_sent_at", UTCDateTime),
    Column("acknowledged_seq", BigInteger, nullable=False),
    Column("created_at", UTCDateTime, nullable=False),
    Column("ended_at", UTCDateTime),
    Column("last_seen_at", UTCDateTime),  # its last report, or the last time a dispatcher saw it running
    Column("is_left_running", Boolean),  # given up while nobody could end it
    Column("thinned_seq", BigInteger),  # up to which its steps are in spans; none: of an older version
    UniqueConstraint("job_id", "number", name="uq_attempts_job_id_number"),
    Index("ix_attempts_is_left_running", "is_left_running"),
)

events = Table(
    "events",
    metadata,
    Column("id", RowId, primary_key=True, autoincrement=True),
    Column("job_id", ForeignKey("jobs.id"), nullable=False),
    Column("attempt_id", ForeignKey("attempts.id")),
    Column("attempt", Integer),
    Column("seq", BigInteger),
    Column("kind", String(32), nullable=False),
    Column("time", UTCDateTime, nullable=False),
    Column("data", JSON, nullable=False),
    UniqueConstraint("attempt_id", "seq", name="uq_events_attempt_id_seq"),
    Index("ix_events_job_id_id", "job_id", "id"),
    Index("ix_events_job_id_kind_id", "job_id", "kind", "id"),
    sqlite_autoincrement=True,  # an id is a cursor: none may ever be used twice
)

steps = Table(
    "steps",
    metadata,
    Column("job_id", ForeignKey("jobs.id"), primary_key=True),
    Column("step", BigInteger, primary_key=True, autoincrement=False),
    Column("attempt", Integer, nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("json", Text, nullable=False),
)

evaluations = Table(
    "evaluations",
    metadata,
    Column("job_id", ForeignKey("jobs.id"), primary_key=True),
    Column("step", BigInteger, primary_key=True, autoincrement=False),
    Column("attempt", Integer, nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("json", Text, nullable=False),
)

spans = Table(
    "spans",
    metadata,
    Column("job_id", ForeignKey("jobs.id"), primary_key=True),
    Column("kind", String(16), primary_key=True),
    Column("level", Integer, primary_key=True, autoincrement=False),
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("last_step", BigInteger, nullable=False),
    Column("json", Text, nullable=False),
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("key", String(255), primary_key=True),
    Column("fingerprint", String(64), nullable=False),
    Column("job_id", ForeignKey("jobs.id"), nullable=False),
    Column("created_at", UTCDateTime, nullable=False),
)
