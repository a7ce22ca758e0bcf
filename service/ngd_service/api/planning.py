"""/jobs:plan: the cost of a job before it runs."""

import asyncio
from typing import Any

from fastapi import APIRouter, Request

from ngd_dist.cost.plan import Plan
from ngd_service.api.body import read_apart, read_value
from ngd_service.api.container import Container, ContainerDep
from ngd_service.planning import PlanRequest, plan_of, read_plan_request
from ngd_service.validation import parse_spec, refuse_unlisted, refused
from ngd_workers.contract.spec import JobSpec

__all__ = ["router"]

router = APIRouter(prefix="/api/v1", tags=["jobs"])
PLAN_SCHEMA = {"schema": {"$ref": "#/components/schemas/PlanRequest"}}
PLAN_BODY: dict[str, Any] = {
    "requestBody": {"required": True, "content": {"application/json": PLAN_SCHEMA, "application/yaml": PLAN_SCHEMA}}
}


@router.post("/jobs:plan", openapi_extra=PLAN_BODY)
async def plan_job(request: Request, container: ContainerDep) -> Plan:
    """Returns memory, bytes, seconds and scaling of a job on a cluster; nothing is created.

    A service that trains jobs on its own machine makes a card that is left out; the others want it.
    """
    wanted = await read_apart(_read, await read_value(request))
    if wanted.card is None:
        wanted = await asyncio.to_thread(_with_card, container, wanted)
    return await read_apart(_planned, wanted)


def _read(value: object) -> PlanRequest:
    with refused():
        return read_plan_request(value)


def _with_card(container: Container, wanted: PlanRequest) -> PlanRequest:
    spec = parse_spec(wanted.job)
    if not isinstance(spec, JobSpec):
        return wanted
    refuse_unlisted(spec, container.settings.function_modules)
    return wanted.model_copy(update={"card": container.cards.of(spec)})


def _planned(wanted: PlanRequest) -> Plan:
    with refused():
        return plan_of(wanted)
