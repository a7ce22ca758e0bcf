"""When an attempt was last known to live, and whether one that was given up may still have to be ended."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column("attempts", sa.Column("last_seen_at", sa.DateTime(timezone=True)))
    op.add_column("attempts", sa.Column("is_left_running", sa.Boolean))
    op.create_index("ix_attempts_is_left_running", "attempts", ["is_left_running"])
