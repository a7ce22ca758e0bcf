"""/internal: the routes of workers, each with the token of its attempt and no other."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Request
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import FailFast, ValidationError

from ngd_service.api.body import read_apart
from ngd_service.api.container import Container, ContainerDep
from ngd_service.errors import BodyTooLargeError, UnauthorizedError
from ngd_workers.contract.events import EventBatch, EventReply, Numbered

__all__ = ["INTERNAL_PREFIX", "MAX_BATCH_BYTES", "router"]

MAX_BATCH_BYTES = 8 << 20  # one event of 64 steps with 10,000 statistics each; the reporter's batches are far smaller
MAX_BATCH_PARTS = 100_000  # lists and objects; a step has twelve, and a batch of empty ones would take seconds to read
INTERNAL_PREFIX = "/api/v1/internal"
BATCH_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/EventBatch"}}},
    }
}
SHOWN_BATCH_BYTES = 64 << 10  # of a longer one no part is shown: making it costs as much as reading it all
router = APIRouter(prefix=INTERNAL_PREFIX, tags=["internal"])
bearer = HTTPBearer(auto_error=False, description="The attempt's own token.")


class Batch(EventBatch):
    """A batch as it is read: parsing stops at the first invalid event, so that a huge bad batch stalls nothing."""

    events: Annotated[list[Numbered], FailFast()]


async def _authorized(
    container: ContainerDep,
    attempt_id: Annotated[str, Path(description="The attempt's id.")],
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)],
) -> str:
    if credentials is None:
        raise UnauthorizedError("send the attempt's token as Authorization: Bearer <token>")
    if not container.tokens.is_of_attempt(attempt_id, credentials.credentials):
        raise UnauthorizedError(f"the token is not that of attempt {attempt_id!r}")
    return attempt_id


@router.post("/attempts/{attempt_id}/events", openapi_extra=BATCH_BODY)
async def post_events(
    request: Request, container: ContainerDep, attempt_id: Annotated[str, Depends(_authorized)]
) -> EventReply:
    """Stores an attempt's events; a repeated delivery changes nothing. The reply says which state the user desires."""
    # Not a parameter: the framework would read a body before the sender is known, and parse it while all others wait.
    events = await read_apart(_events, await request.body())
    return await asyncio.to_thread(_store, container, attempt_id, events)


def _events(body: bytes) -> list[Numbered]:
    if body.count(b"{") + body.count(b"[") > MAX_BATCH_PARTS:
        raise BodyTooLargeError(f"a batch may hold {MAX_BATCH_PARTS:,} lists and objects; send fewer events at once")
    try:
        return Batch.model_validate_json(body).events
    except ValidationError as error:
        items = error.errors(include_input=len(body) <= SHOWN_BATCH_BYTES)
        raise RequestValidationError([{**item, "loc": ("body", *item["loc"])} for item in items]) from error


def _store(container: Container, attempt_id: str, events: list[Numbered]) -> EventReply:
    stored = container.store.ingest(attempt_id, events)
    container.metrics.events_ingested(stored.new_events)
    return EventReply(desired=stored.desired.value, acknowledged_seq=stored.acknowledged_seq)
