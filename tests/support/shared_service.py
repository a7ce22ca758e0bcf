"""`ngd serve` whose attempts lie in a folder that other controllers see too, as on a cluster.

    python -m tests.support.shared_service

The folder is NGD_DATA_DIR, which nothing else of a test's service needs. On one machine the local dispatcher finds the
processes that another controller has started, so it stands in for one whose attempts run on a cluster.
"""

from fastapi import FastAPI

from service.app import create_app
from service.dispatchers.base import Dispatcher
from service.dispatchers.local import LocalDispatcher
from service.failpoint import Failpoint
from service.server import serve
from service.settings import Settings, load_settings


def make_app(settings: Settings) -> FastAPI:
    assert settings.data_dir is not None
    shared: Dispatcher = LocalDispatcher(
        runs_dir=settings.data_dir,
        data_dir=None,
        url=settings.url,
        command=settings.driver_command,
        failpoint=Failpoint(settings.failpoint),
    )
    return create_app(settings, shared)


def announce(settings: Settings) -> None:
    print(f"serves on {settings.url}; shared", flush=True)  # noqa: T201


if __name__ == "__main__":
    serve(load_settings(), announce=announce, make_app=make_app)
