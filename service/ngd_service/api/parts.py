"""What the routes are given: the controller's parts, and parameters that several routes share."""

import threading
from dataclasses import dataclass
from typing import Annotated, cast

from fastapi import Depends, Path, Query, Request

from ngd_service.auth.access import Access
from ngd_service.auth.tokens import Tokens
from ngd_service.control.jobs import Jobs
from ngd_service.control.reconciler import Reconciler
from ngd_service.dispatchers.files import AttemptFiles
from ngd_service.monitoring.metrics import ControllerMetrics
from ngd_service.monitoring.probe import Probe
from ngd_service.settings import Settings
from ngd_service.store.base import Census, Store

__all__ = ["MAX_CURSOR", "FromStep", "JobId", "MaxPoints", "Parts", "PartsDep"]


@dataclass(frozen=True, slots=True)
class Parts:
    """The controller, put together by app.py."""

    settings: Settings
    store: Store
    tokens: Tokens
    access: Access
    files: AttemptFiles
    reconciler: Reconciler
    jobs: Jobs
    metrics: ControllerMetrics
    database: Probe[None]  # whether it answers, and its schema fits
    census: Probe[Census]
    closing: threading.Event  # set when the server is told to stop: streams end


async def _parts(request: Request) -> Parts:  # not in a thread: those may all be waiting for the database
    return cast(Parts, request.app.state.parts)


MAX_CURSOR = 2**63 - 1  # of a database's integers

PartsDep = Annotated[Parts, Depends(_parts)]
JobId = Annotated[
    str, Path(pattern=r"^[^\x00]*$", description="The job's id.", examples=["job_01K3ZV5N1V4S6T9Q0C8W2XJ7RD"])
]
FromStep = Annotated[
    int, Query(ge=0, le=MAX_CURSOR, description="First step wanted; a client that has some asks for the rest.")
]
MaxPoints = Annotated[int, Query(ge=10, le=10_000, description="Points per curve, or columns; the last stays raw.")]
