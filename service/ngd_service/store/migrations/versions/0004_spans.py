"""Spans of steps, thinned out; up to which of its events an attempt's are there."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.create_table(
        "spans",
        sa.Column("job_id", sa.String(64), sa.ForeignKey("jobs.id", name="fk_spans_job_id"), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("level", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("number", sa.BigInteger, autoincrement=False, nullable=False),
        sa.Column("last_step", sa.BigInteger, nullable=False),
        sa.Column("json", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("job_id", "kind", "level", "number", name="pk_spans"),
    )
    op.add_column("attempts", sa.Column("thinned_seq", sa.BigInteger))
