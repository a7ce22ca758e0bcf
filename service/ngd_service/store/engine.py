"""How a database is opened and how its transactions begin and fail."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    InterfaceError,
    NoSuchModuleError,
    OperationalError,
    SQLAlchemyError,
    TimeoutError,
)

from ngd_service.errors import StartupError, StoreUnavailableError

__all__ = ["INSERT", "READ_ONLY", "describe", "open_engine", "reported"]

BUSY_TIMEOUT_S = 30.0
# Of a PostgreSQL that is gone, or of one that a controller has vanished from in the middle of a transaction: for this
# long its row locks would keep a job from the other controllers.
CONNECT_TIMEOUT_S, SILENCE_TIMEOUT_S = 10, 30
# By the dialect's name: an insert that may say what to do on a conflict.
INSERT: dict[str, Any] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}
READ_ONLY = "ngd_read_only"  # execution option of connections that only read


def open_engine(url: str) -> sa.Engine:
    """Returns the engine; nothing is connected yet. Raises: StartupError for a URL that names no known database."""
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() == "sqlite":
            return _sqlite(parsed)
        if parsed.get_backend_name() == "postgresql":
            return _postgresql(parsed)
    except ValueError as error:  # its text may hold the password: what follows a ":" counts as a port
        raise StartupError(
            "can't use NGD_DATABASE_URL: its port, or another number in it, is none; write user:password@host:port/"
            "name, with %40, %3A and %2F for '@', ':' and '/' in the password"
        ) from error
    except (ArgumentError, NoSuchModuleError, ImportError) as error:
        raise StartupError(f"can't use NGD_DATABASE_URL: {str(error).partition(chr(10))[0]}") from error
    raise StartupError(
        f"NGD_DATABASE_URL must be a URL of sqlite or postgresql, got {parsed.get_backend_name()!r}; "
        "leave it out for a file in NGD_HOME"
    )


def _sqlite(url: URL) -> sa.Engine:
    # isolation_level=None: the driver begins no transaction by itself, so that the BEGIN below is the only one.
    engine = sa.create_engine(url, connect_args={"isolation_level": None, "timeout": BUSY_TIMEOUT_S})

    @sa.event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: Any) -> None:
        # FULL: what was acknowledged survives a power cut too, not only the death of a process.
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
            connection.execute(f"PRAGMA {pragma}")

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        # A transaction that reads and then writes would fail when another has written in between: lock at once.
        is_read_only = connection.get_execution_options().get(READ_ONLY, False)
        connection.exec_driver_sql("BEGIN" if is_read_only else "BEGIN IMMEDIATE")

    return engine


def _postgresql(url: URL) -> sa.Engine:
    defaults = {"connect_timeout": str(CONNECT_TIMEOUT_S), "tcp_user_timeout": str(1000 * SILENCE_TIMEOUT_S)}
    missing = {name: value for name, value in defaults.items() if name not in url.query}
    full = url.set(drivername="postgresql+psycopg").update_query_dict(missing)
    engine = sa.create_engine(full, pool_pre_ping=True)

    @sa.event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: Any) -> None:
        connection.execute(f"SET idle_in_transaction_session_timeout = '{SILENCE_TIMEOUT_S}s'")
        connection.commit()

    return engine


@contextmanager
def reported() -> Iterator[None]:
    """Turns trouble that may pass into StoreUnavailableError; a mistake, ours or in the data, goes to the caller."""
    try:
        yield
    except (OperationalError, InterfaceError, TimeoutError) as error:
        raise StoreUnavailableError(f"the database does not answer: {describe(error)}") from error


def describe(error: SQLAlchemyError) -> str:
    """Returns the first line of what the database itself said."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    return str(cause).strip().partition("\n")[0]
