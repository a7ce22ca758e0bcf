"""/jobs:plan: the cost of a job before it runs."""

from typing import Any

from fastapi import APIRouter, Request

from ngd_dist.cost.plan import Plan
from ngd_service.api.body import read_apart, read_value
from ngd_service.planning import plan_of, read_plan_request
from ngd_service.validation import refused

__all__ = ["router"]

router = APIRouter(prefix="/api/v1", tags=["jobs"])
PLAN_SCHEMA = {"schema": {"$ref": "#/components/schemas/PlanRequest"}}
PLAN_BODY: dict[str, Any] = {
    "requestBody": {"required": True, "content": {"application/json": PLAN_SCHEMA, "application/yaml": PLAN_SCHEMA}}
}


@router.post("/jobs:plan", openapi_extra=PLAN_BODY)
async def plan_job(request: Request) -> Plan:
    """Returns memory, bytes, seconds and scaling of a job on a cluster; nothing is created."""
    value = await read_value(request)
    return await read_apart(_planned, value)


def _planned(value: object) -> Plan:
    with refused():
        return plan_of(read_plan_request(value))
