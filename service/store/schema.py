"""The schema's version: migrations/ applied at the start, by Alembic."""

from functools import cache
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

__all__ = ["is_newest", "upgrade"]

MIGRATIONS = Path(__file__).parent / "migrations"


def upgrade(connection: sa.Connection) -> None:
    """Brings the schema to the newest version, within the connection's transaction."""
    config = _config()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def is_newest(connection: sa.Connection) -> bool:
    """Returns whether the database's schema is the one this version was written for."""
    return MigrationContext.configure(connection).get_current_revision() == _head()


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    return config


@cache
def _head() -> str | None:
    return ScriptDirectory.from_config(_config()).get_current_head()
