"""START HERE. The service as a FastAPI app: its components, and what runs while it is up."""

import socket
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI

from ngd_service import dashboard
from ngd_service.api.application import api_application
from ngd_service.api.container import Container
from ngd_service.auth.access import Access
from ngd_service.auth.api_keys import ApiKeys
from ngd_service.auth.tokens import Tokens, read_key, read_or_create_key
from ngd_service.control.jobs import Jobs
from ngd_service.control.model_cards import ModelCards
from ngd_service.control.reconciler import Reconciler
from ngd_service.dispatchers.files import AttemptFiles
from ngd_service.errors import StartupError
from ngd_service.failpoint import Failpoint
from ngd_service.home import KEY
from ngd_service.job_state import Policy
from ngd_service.monitoring.metrics import ControllerMetrics
from ngd_service.monitoring.probe import Probe
from ngd_service.settings import Settings
from ngd_service.store.sql import SQLStore

__all__ = ["create_app"]


def create_app(settings: Settings) -> FastAPI:
    """Returns the app, its database open and up to date. Raises: StartupError with one sentence.

    The folder settings.home must be there.
    """
    container = _assemble(settings)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        container.reconciler.start()
        try:
            yield
        finally:
            container.closing.set()
            container.cards.close()
            container.reconciler.stop()
            container.store.close()

    app = api_application(lifespan, container)
    dashboard.mount(app, settings, container.access)
    return app


def _open(settings: Settings) -> tuple[SQLStore, Tokens]:
    """Returns the store, bound to this installation, and the installation's tokens.

    Attempts that are processes of this machine are the home's own, so then the database is this home's alone; otherwise
    it is that of all homes with the same signing key.
    """
    given = None if settings.signing_key_file is None else Tokens(read_key(settings.signing_key_file))
    store = SQLStore(settings.resolved_database_url)
    try:
        _make_runs_dir(settings)
        tokens_of_home = Tokens(read_or_create_key(settings.home / KEY))
        tokens = given or tokens_of_home
        owner = tokens_of_home if settings.dispatcher_class.owns_processes else tokens
        store.bind(owner.installation_id, f"{socket.gethostname()}:{settings.home}")
    except OSError as error:
        store.close()
        raise StartupError(f"can't use the folder {settings.home}: {error.strerror}; set NGD_HOME") from error
    except StartupError:
        store.close()
        raise
    return store, tokens


def _make_runs_dir(settings: Settings) -> None:
    try:
        settings.resolved_runs_dir.mkdir(exist_ok=True)
    except OSError as error:
        name = "NGD_HOME" if settings.runs_dir is None else "NGD_RUNS_DIR"
        raise StartupError(
            f"can't use the folder of runs {settings.resolved_runs_dir}: {error.strerror}; set {name} to one whose "
            "parent is there and that this user may write to"
        ) from error


def _assemble(settings: Settings) -> Container:
    keys = None if settings.api_keys_dir is None else ApiKeys(settings.api_keys_dir)
    metrics = ControllerMetrics(version("ngd-dist"))
    failpoint = Failpoint(settings.failpoint)
    files = AttemptFiles(
        runs_dir=settings.resolved_runs_dir,
        data_dir=settings.data_dir,
        worker_url=settings.resolved_worker_url,
        cluster=settings.dispatcher_class.ray,
        function_modules=settings.function_modules,
        secrets_dir=settings.secrets_dir,
        takes_images=settings.dispatcher_class.takes_images,
    )
    dispatcher = settings.dispatcher_class.of(
        settings, files, command=settings.resolved_driver_command, failpoint=failpoint
    )
    store, tokens = _open(settings)  # last: a start that fails leaves the database's schema as it was
    reconciler = Reconciler(
        store=store,
        dispatcher=dispatcher,
        files=files,
        token_of=tokens.of_attempt,
        policy=Policy(
            retry_backoff_s=settings.retry_backoff_s,
            cancel_grace_s=settings.cancel_grace_s,
            interrupt_grace_s=settings.interrupt_grace_s,
            unreachable_s=settings.unreachable_s,
            max_failed_starts=settings.max_failed_starts,
            start_backoff_s=settings.start_backoff_s,
            start_within_s=settings.start_within_s,
        ),
        max_running_jobs=settings.max_running_jobs,
        tick_s=settings.tick_s,
        lease_s=settings.lease_s,
        max_log_bytes=settings.max_log_mib << 20,
        failpoint=failpoint,
        metrics=metrics,
    )
    return Container(
        settings=settings,
        store=store,
        tokens=tokens,
        access=Access(keys, tokens),
        files=files,
        reconciler=reconciler,
        jobs=Jobs(store, tokens, reconciler.wake, settings.max_running_jobs),
        cards=ModelCards(files.archives, settings.data_dir, is_here=settings.dispatcher_class.owns_processes),
        metrics=metrics,
        database=Probe(store.check),
        job_counts=Probe(store.job_counts),
        closing=threading.Event(),
    )
