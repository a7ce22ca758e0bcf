"""The schema's version: migrations/ applied at the start, by Alembic.

A revision is a number of four digits, and its first digit an epoch: within an epoch a migration only adds, so that the
version before goes on with the schema of the next one (docs/decisions/0011).
"""

from functools import cache
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

__all__ = ["is_usable", "revision", "upgrade"]

MIGRATIONS = Path(__file__).parent / "migrations"
EPOCHS = frozenset("0")  # whose schemas this version takes; the next one joins once nothing here needs what it drops
UPGRADING = 0x6E6764_0001  # PostgreSQL's number for the lock: "ngd", 1


def upgrade(connection: sa.Connection) -> None:
    """Brings the schema to this version's, within the connection's transaction; one that is newer stays as it is.

    Several controllers may do so at once: the first does the work, the others wait for it.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(UPGRADING)))
    if not is_usable(connection):
        config = _config()
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def is_usable(connection: sa.Connection) -> bool:
    """Returns whether the database has this version's schema, or one that a newer version has only added to."""
    current, head = revision(connection), _head()
    return current == head or (current is not None and current > head and current[0] in EPOCHS)


def revision(connection: sa.Connection) -> str | None:
    """Returns the revision of the database's schema; None: it has none yet."""
    return MigrationContext.configure(connection).get_current_revision()


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    return config


@cache
def _head() -> str:
    head = ScriptDirectory.from_config(_config()).get_current_head()
    assert head is not None
    return head
