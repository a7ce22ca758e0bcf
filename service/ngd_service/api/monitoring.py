"""/metrics: the route of Prometheus."""

import logging

from fastapi import APIRouter, Response

from ngd_service.api.container import ContainerDep
from ngd_service.errors import StoreUnavailableError
from ngd_service.monitoring.metrics import CONTENT_TYPE

__all__ = ["router"]

log = logging.getLogger(__name__)

router = APIRouter(tags=["health"])

COUNTS_WITHIN_S = 3.0  # Prometheus gives up after 10 by default


@router.head("/metrics", include_in_schema=False)
@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {}}, "description": "Prometheus' text format."}},
)
async def get_metrics_of_service(container: ContainerDep) -> Response:
    """Returns the service's own metrics; those of jobs are missing while the database does not answer."""
    try:
        job_counts = await container.job_counts.answer(within_s=COUNTS_WITHIN_S)
    except (StoreUnavailableError, TimeoutError) as error:
        log.error("metrics_without_jobs error=%s", error or "the database has not answered in time")
        job_counts = None
    return Response(container.metrics.exposition(job_counts), media_type=CONTENT_TYPE)
