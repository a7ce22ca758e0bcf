"""/healthz: the process answers. /readyz: it can do its work."""

from fastapi import APIRouter, Response

from ngd_service.api.container import ContainerDep
from ngd_service.errors import StoreUnavailableError
from ngd_service.resources import Health

__all__ = ["router"]

router = APIRouter(tags=["health"])

DATABASE_WITHIN_S = 0.8  # a probe of Kubernetes waits for 1 s by default
STALE_TICKS, STALE_S = 10, 30.0  # that many missed ticks, and at least that long, mean that the reconciler hangs


@router.head("/healthz", include_in_schema=False)
@router.get("/healthz")
async def healthz() -> Health:
    """The process answers; neither the database nor the reconciler is asked."""
    return Health(status="ok")


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz", responses={503: {"model": Health, "description": "Not ready; checks says why."}})
async def readyz(container: ContainerDep, response: Response) -> Health:
    """The database answers in time and the reconciler does not hang; otherwise the status is 503."""
    checks = {"database": await _database(container), "reconciler": _reconciler(container)}
    is_ready = all(check == "ok" for check in checks.values())
    response.status_code = 200 if is_ready else 503
    return Health(status="ok" if is_ready else "unavailable", checks=checks)


async def _database(container: ContainerDep) -> str:
    try:
        await container.database.answer(within_s=DATABASE_WITHIN_S)
    except StoreUnavailableError as error:
        return error.detail
    except TimeoutError:
        return f"the database has not answered for {container.database.waited_s:.0f} s"
    return "ok"


def _reconciler(container: ContainerDep) -> str:
    age_s, limit_s = container.reconciler.tick_age_s, max(STALE_TICKS * container.settings.tick_s, STALE_S)
    return "ok" if age_s < limit_s else f"last tick {age_s:.0f} s ago; the limit is {limit_s:.0f} s"
