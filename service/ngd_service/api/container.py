"""The controller's components that routes work with, and parameters that several routes share."""

import threading
from dataclasses import dataclass
from typing import Annotated, cast

from fastapi import Depends, Path, Query, Request

from ngd_service.auth.access import Access
from ngd_service.auth.tokens import Tokens
from ngd_service.control.jobs import Jobs
from ngd_service.control.model_cards import ModelCards
from ngd_service.control.reconciler import Reconciler
from ngd_service.dispatchers.files import AttemptFiles
from ngd_service.monitoring.metrics import ControllerMetrics
from ngd_service.monitoring.probe import Probe
from ngd_service.settings import Settings
from ngd_service.store.base import JobCounts, Store

__all__ = ["MAX_CURSOR", "Container", "ContainerDep", "FromStep", "JobId", "MaxPoints"]


@dataclass(frozen=True, slots=True)
class Container:
    """The components of the controller; app.py makes them."""

    settings: Settings
    store: Store
    tokens: Tokens
    access: Access
    files: AttemptFiles
    reconciler: Reconciler
    jobs: Jobs
    cards: ModelCards
    metrics: ControllerMetrics
    database: Probe[None]  # whether it answers, and its schema fits
    job_counts: Probe[JobCounts]
    closing: threading.Event  # set when the server is told to stop: streams end


async def _container(request: Request) -> Container:  # not in a thread: those may all be waiting for the database
    return cast(Container, request.app.state.container)


MAX_CURSOR = 2**63 - 1  # of a database's integers

ContainerDep = Annotated[Container, Depends(_container)]
JobId = Annotated[
    str, Path(pattern=r"^[^\x00]*$", description="The job's id.", examples=["job_01K3ZV5N1V4S6T9Q0C8W2XJ7RD"])
]
FromStep = Annotated[
    int, Query(ge=0, le=MAX_CURSOR, description="First step wanted; a client that has some asks for the rest.")
]
MaxPoints = Annotated[int, Query(ge=10, le=10_000, description="Points per curve, or columns; the last stays raw.")]
