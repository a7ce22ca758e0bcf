"""Runs the app on a socket of this machine until it is told to stop."""

import gc
import ipaddress
import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import cast

import uvicorn

from ngd_service.app import create_app
from ngd_service.connections import BROWSER_HEADERS, Connection, Limits
from ngd_service.errors import StartupError
from ngd_service.home import owned
from ngd_service.settings import Settings
from ngd_service.store.sql import SQLStore

__all__ = ["migrate", "serve"]

STREAMS_END_WITHIN_S = 3
BACKLOG = 64  # accepted all at once where the loop was busy, before any can be closed for being too many
OWN_USER_ONLY = 0o077  # umask of the controller and its drivers: the database, logs, specs and tokens are this user's


def serve(settings: Settings, *, announce: Callable[[Settings], None] = lambda _settings: None) -> None:
    """Serves until SIGINT or SIGTERM; running jobs go on. announce: told where, once the port is open.

    Raises: StartupError with one sentence, before anything is created.
    """
    with _bound(settings) as listener:
        port = listener.getsockname()[1]
        settings = settings.model_copy(update={"port": port})
        os.umask(OWN_USER_ONLY)
        with owned(settings.home):
            logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s %(message)s")
            logging.getLogger("ngd_service").setLevel(logging.INFO)
            app = create_app(settings)
            gc.freeze()  # what was imported stays; a collection that walks all of it takes 0.2 CPU s
            announce(settings)
            # A proxy's X-Forwarded headers are not needed, for NGD_PUBLIC_URL says what they would: none is trusted.
            config = uvicorn.Config(
                app,
                log_level="warning",
                timeout_graceful_shutdown=STREAMS_END_WITHIN_S,
                proxy_headers=False,
                http=_connections(settings),
                headers=BROWSER_HEADERS,
                backlog=BACKLOG,
            )
            _Server(config, app.state.container.closing.set).run(sockets=[listener])


def migrate(settings: Settings) -> str:
    """Brings the schema of the database up to date, whether or not a service is up; returns where it is then.

    Raises: StartupError.
    """
    os.umask(OWN_USER_ONLY)
    if not settings.database_url:  # the default one is a file in the home
        try:
            settings.home.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StartupError(f"can't use the folder {settings.home}: {error.strerror}; set NGD_HOME") from error
    store = SQLStore(settings.resolved_database_url)
    try:
        return f"the schema of {store.shown_url} is at revision {store.revision}"
    finally:
        store.close()


class _Server(uvicorn.Server):
    """Ends the event streams when it is told to stop, for they last as long as their jobs, and exits with 0.

    uvicorn itself dies of the signal it was sent once it has cleaned up. A second signal ends it at once.
    """

    def __init__(self, config: uvicorn.Config, on_exit: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_exit = on_exit

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._on_exit()
        self.force_exit = self.should_exit
        self.should_exit = True


def _connections(settings: Settings) -> type[Connection]:
    limits = Limits(max_connections=settings.max_connections, arrival_s=settings.arrival_s)
    return cast(type[Connection], partial(Connection, limits=limits))


def _shown(settings: Settings) -> str:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"http://{host}:{settings.port}"


@contextmanager
def _bound(settings: Settings) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6 and ipaddress.ip_address(settings.host).is_unspecified:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # :: is every address, those of IPv4 too
        try:
            listener.bind((settings.host, settings.port))
            listener.listen()
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise StartupError(
                f"can't listen on {_shown(settings)}: {reason}; stop what listens there, or choose another port with "
                "--port"
            ) from error
        yield listener
